"""The scripts import their helpers as if they were run: `python benchmarks/bench_kernels.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
