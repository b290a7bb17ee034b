"""The commands of every page in docs/ run, top to bottom, in an empty folder.

A fence marked ```bash is run; ```bash skip is shown only (it takes long, or needs what a reader brings); ```bash net needs a network.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from paths import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"^```bash *(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def fences(page: Path, *marks: str) -> list[str]:
    return [body for mark, body in FENCE.findall(page.read_text(encoding="utf-8")) if mark in marks]


def run(script: list[str], folder: Path) -> None:
    tools = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "WEFT_HOME": str(folder / ".weft"),
        "OMP_NUM_THREADS": "1",
    }
    work = folder / "work"
    work.mkdir()
    text = "set -euo pipefail\n" + "\n".join(script)
    done = subprocess.run(["bash", "-c", text], cwd=work, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{text}\n--- stdout\n{done.stdout[-2000:]}\n--- stderr\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("page", [page for page in PAGES if fences(page, "")], ids=lambda page: page.stem)
def test_commands_of_the_page_run(page, tmp_path):
    run(fences(page, ""), tmp_path)


@pytest.mark.net
@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if fences(page, "net")], ids=lambda page: page.stem)
def test_commands_that_need_a_network_run(page, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    run(fences(page, "", "net"), tmp_path)


def test_a_command_that_fails_is_noticed(tmp_path):
    with pytest.raises(AssertionError, match="there is no verb"):
        run(["weft modles | cat"], tmp_path)
