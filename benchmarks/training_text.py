"""Gather the text that the shipped prior is trained on: a third each of prose, technical text and code.

    python benchmarks/training_text.py [--out DIR] [--documents DIR]

Writes UTF-8 texts of at least 1,300 SmolLM2 tokens, about 1.6 million tokens of each kind, from packages that anyone
can fetch (see training_sources.py), and manifest.json beside them. No benchmark document is among them, to test on or
to develop on, and no text that shares 32 tokens in a row with one. A second run finds the text whole and does nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from document_sources import Document, MissingSourceError
from documents import MANIFEST, MIN_TOKENS, SAY, is_whole, trim, write
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from training_sources import SOURCES

from quickmerge.datasets import Passages
from quickmerge.errors import QuickmergeError
from quickmerge.models import cache_folder
from quickmerge.models.download import replacing_folder, writable
from quickmerge.models.embedded import EMBEDDED
from quickmerge.sampling import evenly

TOKENIZER = "smollm2-135m"
PER_KIND = 1_600_000
ENOUGH = 1_200_000
MOST_CODE = 20_000
"""Characters of a module that are taken, so that more modules find a place."""

Candidate = tuple[Document, int]


def main() -> int:
    """Run the command line; 0 when there is enough text of each kind."""
    parser = argparse.ArgumentParser(description="Gather the text to train on.")
    parser.add_argument("--out", type=Path, help="where to write it (default: training/ in the cache folder)")
    parser.add_argument("--documents", type=Path, help="the benchmark documents (default: those in the cache folder)")
    given = parser.parse_args()
    out: Path = (given.out or cache_folder() / "training").expanduser().absolute()
    documents: Path = (given.documents or cache_folder() / "documents").expanduser().absolute()
    try:
        return gather(out, documents)
    except QuickmergeError as error:
        SAY.print(str(error), markup=False)
        return 2


def gather(out: Path, documents: Path) -> int:
    """Write the training text into `out`, all of it or nothing."""
    if not is_whole(documents):
        raise QuickmergeError(
            f"the benchmark documents in {documents} are not whole: run benchmarks/documents.py first"
        )
    held_out = hashlib.sha256((documents / MANIFEST).read_bytes()).hexdigest()
    if is_whole(out) and _manifest(out)["held_out"] == held_out:
        SAY.print(f"the training text is already in {out}", markup=False)
        return 0
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise QuickmergeError(f"--out is {out}, which holds something else: give an empty or a new folder")
    with replacing_folder(out) as work:
        chosen, missing, dropped = choose(documents)
        entries = [write(document, tokens, work) for document, tokens in chosen]
        manifest = {
            "tokenizer": TOKENIZER,
            "complete": not missing,
            "missing": missing,
            "held_out": held_out,
            "dropped": dropped,
            "documents": entries,
        }
        (work / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if out.exists():  # an earlier one, incomplete or for other benchmark documents
            shutil.rmtree(out)
    for sentence in missing:
        SAY.print(sentence, markup=False)
    SAY.print(f"{len(dropped)} texts dropped that share 32 tokens in a row with a benchmark document", markup=False)
    totals = {kind: [entry["tokens"] for entry in entries if entry["kind"] == kind] for kind in SOURCES}
    for kind, tokens in totals.items():
        SAY.print(f"{kind}: {len(tokens)} texts, {sum(tokens):,} tokens in {out / 'train' / kind}", markup=False)
    return 0 if min(map(sum, totals.values())) >= ENOUGH else 1


def choose(documents: Path) -> tuple[list[Candidate], list[str], list[str]]:
    """What to train on with its tokens, the sources that are missing, and the names of texts too like a benchmark's."""
    tokens_of = tokenizer()
    entries = _manifest(documents)["documents"]
    names = {Path(entry["file"]).stem for entry in entries}
    seen = Passages(tokens_of((documents / entry["file"]).read_text(encoding="utf-8")) for entry in entries)
    downloads = writable(cache_folder() / "downloads")
    chosen: list[Candidate] = []
    missing: list[str] = []
    dropped: set[str] = set()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=SAY, transient=True) as bar:
        task = bar.add_task("", total=sum(map(len, SOURCES.values())))
        for kind, sources in SOURCES.items():
            pools: list[list[Candidate]] = []
            for source in sources:
                title = source.__name__.replace("_", " ")
                bar.update(task, description=f"gathering {title}")
                try:
                    long = candidates(source(downloads), tokens_of)
                except MissingSourceError as error:
                    missing.append(f"no {title} ({kind}): {error}")
                    long = {}
                unseen = {name: pair for name, pair in long.items() if name not in names}
                known = {name for name, (document, _) in unseen.items() if seen.starts(tokens_of(document.text)).any()}
                dropped |= known
                pools.append([unseen[name] for name in sorted(unseen.keys() - known)])
                bar.advance(task)
            chosen += share(pools, PER_KIND)
    assert not names & {document.name for document, _ in chosen}
    return chosen, missing, sorted(dropped)


def candidates(documents: Iterable[Document], tokens_of: Callable[[str], list[int]]) -> dict[str, Candidate]:
    """By name, the documents that are long enough and not of the half that is only tested on."""
    found: dict[str, Candidate] = {}
    for document in documents:
        if document.split != "test" and document.name not in found:
            text = trim(document, MOST_CODE if document.kind == "code" else sys.maxsize)
            if (tokens := len(tokens_of(text.text))) >= MIN_TOKENS:
                found[document.name] = (dataclasses.replace(text, split="train"), tokens)
    return found


def share(pools: Sequence[Sequence[Candidate]], budget: int) -> list[Candidate]:
    """About `budget` tokens, as much from each pool as the smallest pools allow, spread evenly over its names."""
    chosen: list[Candidate] = []
    smallest_first = sorted(pools, key=_tokens)
    for at, pool in enumerate(smallest_first):
        part = (budget - _tokens(chosen)) // (len(pools) - at)  # what a small pool leaves, the larger ones share
        fewer = (evenly(pool, count, at="middle") for count in range(len(pool), -1, -1))
        chosen += next(some for some in fewer if _tokens(some) <= part)
    return chosen


def tokenizer() -> Callable[[str], list[int]]:
    """A function from a text to its SmolLM2 token ids."""
    from transformers import AutoTokenizer

    backend = AutoTokenizer.from_pretrained(EMBEDDED[TOKENIZER].prepare(cache_folder())).backend_tokenizer
    return lambda text: list(backend.encode(text).ids)


def _tokens(candidates: Sequence[Candidate]) -> int:
    return sum(tokens for _, tokens in candidates)


def _manifest(folder: Path) -> Any:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
