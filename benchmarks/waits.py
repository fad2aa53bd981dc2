"""How often the host waits for a device, in a prompt, a decoding step, a pass of speculation or a batch of images.

Counted on a device that has no hardware (`tests/samples/waits.py`), so that it can be run anywhere, with tiny models: a
count depends on the blocks of a model and not on their width.

    python benchmarks/waits.py --out benchmarks/results/waits.json
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ["QUICKMERGE_CHECKS"] = "0"
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests" / folder) for folder in ("", "samples")]

from wait_cases import CASES  # noqa: E402

from quickmerge.bench.harness import environment  # noqa: E402
from quickmerge.files import write_json  # noqa: E402


def main() -> None:
    """Count every case whose name holds the given words, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/waits.json"))
    parser.add_argument("--only", default="", help="cases whose names hold this")
    asked = parser.parse_args()
    found = {}
    for name, count in CASES.items():
        if asked.only not in name:
            continue
        figures = count()
        found[name] = figures.as_dict()
        print(f"{name}: {figures.more:g} waits more than {figures.plain:g}; "
              f"{figures.operations:g} operations", flush=True)  # fmt: skip
    write_json(asked.out, {"rows": found, "meta": {"environment": environment()}})


if __name__ == "__main__":
    main()
