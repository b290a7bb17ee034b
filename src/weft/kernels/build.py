"""Compiles the C++ kernels once a machine, with the compiler that torch.compile uses too."""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import filelock
import torch

from weft.files import cache_home

SOURCES = ("vectors.h", "rows.cpp", "attend.cpp", "matmul.cpp", "layers.cpp")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-std=c++20", "-shared", "-fPIC")
HERE = Path(__file__).parent


def kernel_folder() -> Path | None:
    """Where compiled kernels are kept: $WEFT_KERNELS, or `kernels` in the cache folder; None where $WEFT_KERNELS is "off"."""
    given = os.environ.get("WEFT_KERNELS")
    if given == "off":
        return None
    return Path(given).expanduser() if given else cache_home() / "kernels"


def compiled_library() -> Path | None:
    """The library for this machine, compiled now if it has not been; None where that is switched off or impossible."""
    folder, compiler = kernel_folder(), os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if folder is None or compiler is None or sys.platform == "win32":
        return None
    path = folder / f"weft-{_fingerprint(compiler)}.so"
    if path.is_file():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / "build.lock"):
            return path if path.is_file() or _compile(compiler, path) else None
    except OSError as error:
        print(f"weft: {folder} cannot hold compiled kernels ({error.strerror}); going on with slower ones.", file=sys.stderr)
        return None


def _fingerprint(compiler: str) -> str:
    """Changes with the sources, torch, the compiler and the processor."""
    parts = [(HERE / name).read_text(encoding="utf-8") for name in SOURCES]
    parts += [*FLAGS, torch.__version__, compiler, platform.machine()]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        parts += [line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features"))][:1]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, path: Path) -> bool:
    """Write the library in one piece, or say why not."""
    print("weft: compiling kernels for this processor, once (about 20 s) …", file=sys.stderr, flush=True)
    home = Path(torch.__file__).parent
    includes = [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}", f"-I{HERE}"]
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        whole, made = Path(scratch, "kernels.cpp"), Path(scratch, path.name)
        whole.write_text("".join(f'#include "{name}"\n' for name in SOURCES if name.endswith(".cpp")))
        command = [compiler, *FLAGS, *includes, str(whole), "-o", str(made), f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10"]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode == 0:
            os.replace(made, path)
            return True
    reason = next((line for line in run.stderr.splitlines() if "error" in line), run.stderr.strip()[:200])
    print(f"weft: {compiler} cannot compile the kernels ({reason}); going on with slower ones.", file=sys.stderr)
    return False
