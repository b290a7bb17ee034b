"""The allocator setting: memory that is freed is taken again, and not cleared by the system each time."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from weft.train.heap import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(12_000_000)
before = faults()
for _ in range(100):
    torch.ones(12_000_000)
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_freed_memory_stays():
    def faults(how):
        run = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
        return int(run.stdout)

    kept, plain = faults("kept"), faults("plain")
    assert plain > 1_000_000, "control: without the setting, 48 MB are cleared page by page, a hundred times"
    assert kept < plain / 4, "a small block may lie in the way a few times, not always"
