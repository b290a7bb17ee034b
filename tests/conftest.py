"""Test-wide settings: one thread a test process where several run side by side, and the tests folder importable."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes with two spinning threads each slow one another tenfold
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WEFT_KERNELS", str(Path("~/.cache/weft/kernels").expanduser()))  # compiled once, whatever WEFT_HOME a test sets
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))
