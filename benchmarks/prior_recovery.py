"""Context recovery with the shipped prior and without: writes benchmarks/results/prior_recovery.json.

python benchmarks/documents.py && python benchmarks/prior_recovery.py [--prior DIR]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from quickmerge.models import cache_folder

HERE = Path(__file__).parent


def main() -> int:
    """Run ``quickmerge bench text --prior`` over the test split, as a user would."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=Path, default=None, help="folder that documents.py filled")
    parser.add_argument("--split", default="test", choices=["test", "dev"])
    parser.add_argument("--keep", default="0.1,0.2,0.42")
    parser.add_argument("--reducer", default="quickmerge,truncate")
    parser.add_argument("--prior", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "prior_recovery.json")
    args = parser.parse_args()
    folder = args.documents or cache_folder(None) / "documents"
    files = sorted(str(p) for p in (folder / args.split).rglob("*.txt"))
    if len(files) < 20:
        print(f"{folder / args.split} holds {len(files)} documents, 20 are needed: run documents.py", file=sys.stderr)
        return 2
    command = [sys.executable, "-c", "from quickmerge.cli import main; main()", "bench", "text", *files,
               "--reducer", args.reducer, "--keep", args.keep, "--prior", args.prior,
               "--json", str(args.out)]  # fmt: skip
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
