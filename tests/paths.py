"""Where tests look for real data that is not part of the project."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_shared = ROOT.parent / "shared" / "data"
SHARED: Path | None = _shared if _shared.is_dir() else None
