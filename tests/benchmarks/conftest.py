from __future__ import annotations

import sys
from pathlib import Path

# The scripts are no package; last, so that none of them hides a module of another name.
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
