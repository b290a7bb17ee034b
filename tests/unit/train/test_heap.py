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


HOLES = """
import sys, torch
from weft.train.heap import Heap, keep_freed_memory, resident
assert keep_freed_memory()
heap = Heap()
base = torch.ones(25_000_000)
assert not heap.after_step()
blocks = [(torch.ones(250_000), torch.ones(100)) for _ in range(400)]
between = [small for _, small in blocks]
full = resident()
del blocks
left = resident()
if sys.argv[1] == "trimmed":
    assert heap.after_step()
    assert not heap.after_step(), "which is the size to grow from"
print(left / full, resident() / full)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_what_lies_in_holes_is_given_back_once_the_process_has_grown():
    def sizes(how):
        run = subprocess.run([sys.executable, "-c", HOLES, how], capture_output=True, text=True, check=True)
        return [float(each) for each in run.stdout.split()]

    left, after = sizes("trimmed")
    assert left > 0.95, "the holes are still the process's"
    assert after < 0.6
    assert sizes("plain")[1] > 0.95, "control: nobody else gives them back"
