"""Context recovery of every reducer on the held-out documents: writes benchmarks/results/context_recovery.json.

python benchmarks/documents.py && python benchmarks/context_recovery.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from quickmerge.models import cache_folder

HERE = Path(__file__).parent
REDUCERS = "quickmerge,attention,tome,topnorm,uniform,truncate,random"


def main() -> int:
    """Run ``quickmerge bench text`` over the test split, as a user would."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=Path, default=None, help="folder that documents.py filled")
    parser.add_argument("--split", default="test", choices=["test", "dev"])
    parser.add_argument("--keep", default="0.2,0.42,0.6")
    parser.add_argument("--reducer", default=REDUCERS)
    parser.add_argument("--layer", default=None)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "context_recovery.json")
    args = parser.parse_args()
    folder = args.documents or cache_folder(None) / "documents"
    files = sorted(str(p) for p in (folder / args.split).rglob("*.txt"))
    if len(files) < 20:
        print(f"{folder / args.split} holds {len(files)} documents, 20 are needed: run documents.py", file=sys.stderr)
        return 2
    command = [sys.executable, "-c", "from quickmerge.cli import main; main()", "bench", "text", "--model", args.model,
               *files, "--reducer", args.reducer, "--keep", args.keep, "--json", str(args.out)]  # fmt: skip
    if args.layer:
        command += ["--layer", args.layer]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
