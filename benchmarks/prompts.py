"""The held-out prompts that generation is measured with: 96, of eight kinds, made of the benchmark's test documents.

    python benchmarks/documents.py && python benchmarks/prompts.py [--count 96] [--out prompts.jsonl]

No model trained here has seen the documents (see training_text.py). What is asked about them stands in
quickmerge.datasets.prompts. The same documents give the same prompts; the first N of them are as many of each kind.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from documents import MANIFEST, SAY, is_whole

from quickmerge.datasets.prompts import Prompt, Source, document_prompts
from quickmerge.errors import QuickmergeError
from quickmerge.files import write_bytes
from quickmerge.models import cache_folder

COUNT = 96


def main() -> int:
    """Write the prompts as JSON lines, for ``quickmerge bench decode --prompts``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=Path, help="the benchmark documents (default: those in the cache folder)")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--out", type=Path, help="default: prompts.jsonl in the cache folder")
    args = parser.parse_args()
    out: Path = args.out or cache_folder() / "prompts.jsonl"
    try:
        prompts = held_out_prompts(args.documents, args.count)
        lines = [json.dumps({"kind": p.kind, "prompt": p.text}, ensure_ascii=False) + "\n" for p in prompts]
        write_bytes(out, "".join(lines).encode())
    except ValueError as error:
        SAY.print(str(error), markup=False)
        return 2
    kinds = ", ".join(f"{number} {kind}" for kind, number in Counter(p.kind for p in prompts).items())
    SAY.print(f"{len(prompts)} prompts in {out}: {kinds}", markup=False)
    return 0


def held_out_prompts(documents: Path | None = None, count: int = COUNT) -> list[Prompt]:
    """The first ``count`` prompts about the test documents in a folder that documents.py filled.

    Raises:
        QuickmergeError: the documents are not whole.
    """
    folder = documents or cache_folder() / "documents"
    if not is_whole(folder):
        raise QuickmergeError(f"the benchmark documents in {folder} are not whole: run benchmarks/documents.py first")
    entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["documents"]
    return document_prompts(
        [
            Source(entry["file"], entry["kind"], (folder / entry["file"]).read_text(encoding="utf-8"))
            for entry in entries
            if entry["split"] == "test"
        ],
        count,
    )


if __name__ == "__main__":
    sys.exit(main())
