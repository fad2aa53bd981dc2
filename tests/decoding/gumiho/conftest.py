from __future__ import annotations

import sys
from pathlib import Path

# The test modules share gumiho_samples.py, which is no package of its own.
sys.path.insert(0, str(Path(__file__).parent))
