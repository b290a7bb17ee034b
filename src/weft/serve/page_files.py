"""The chat page: the files of one folder of this package, each under its own name, and no others."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.responses import FileResponse, Response

FOLDER = Path(__file__).parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".webmanifest": "application/manifest+json",
}
# Nothing from elsewhere is loaded, run or reached, and no other site may put the page in a frame.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; connect-src 'self'; "
    "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_routes(app: FastAPI) -> list[str]:
    """Serve index.html at / and the other files beside it under their names. Returns the paths."""
    files = {f"/{path.name}": path for path in sorted(FOLDER.glob("*")) if path.suffix in TYPES and path.is_file()}
    if "/index.html" in files:
        files["/"] = files.pop("/index.html")
    for path, file in files.items():
        app.add_api_route(path, _handler(file), methods=["GET"], include_in_schema=False, response_model=None)
    return list(files)


def _handler(file: Path) -> Any:
    async def serve_file() -> Response:
        return FileResponse(file, media_type=TYPES[file.suffix], headers=HEADERS)

    return serve_file
