from __future__ import annotations

import sys
from pathlib import Path

# The test modules share decoding_samples.py, and the tiny models of the hosts' tests; neither is a package.
for folder in (Path(__file__).parent.parent / "hosts", Path(__file__).parent):
    sys.path.insert(0, str(folder))
