"""Gather the benchmark documents: 36 to test on and 36 to develop on, a third each of prose, technical text and code.

    python benchmarks/documents.py [--out DIR]

Each is a UTF-8 text of at least 1,300 SmolLM2 tokens and at most 40,000 characters, from packages that anyone can
fetch (see document_sources.py). What each is and where it comes from is in manifest.json beside them. A second run
finds the documents whole and does nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from document_sources import SOURCES, Document, MissingSourceError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from quickmerge.errors import QuickmergeError
from quickmerge.models import cache_folder
from quickmerge.models.download import replacing_folder, writable
from quickmerge.models.embedded import EMBEDDED
from quickmerge.sampling import evenly

PER_KIND = 12
MIN_TOKENS = 1300
MAX_CHARACTERS = 40_000
ENOUGH = 20
MANIFEST = "manifest.json"
TOKENIZER = "smollm2-135m"
SAY = Console(stderr=True, highlight=False, soft_wrap=True)


def main() -> int:
    """Run the command line; 0 when there are enough test documents."""
    parser = argparse.ArgumentParser(description="Gather the benchmark documents.")
    parser.add_argument("--out", type=Path, help="where to write them (default: documents/ in the cache folder)")
    out: Path = (parser.parse_args().out or cache_folder() / "documents").expanduser().absolute()
    try:
        return gather(out)
    except QuickmergeError as error:
        SAY.print(str(error), markup=False)
        return 2


def gather(out: Path) -> int:
    """Write the documents into `out`, all of them or none."""
    if is_whole(out):
        SAY.print(f"the documents are already in {out}", markup=False)
        return 0
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise QuickmergeError(f"--out is {out}, which holds something else: give an empty or a new folder")
    count_tokens = token_counter()
    with replacing_folder(out) as work:
        documents, missing = choose(count_tokens)
        entries = [write(document, tokens, work) for document, tokens in documents]
        manifest = {"tokenizer": TOKENIZER, "complete": not missing, "missing": missing, "documents": entries}
        (work / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if out.exists():  # an earlier, incomplete one
            shutil.rmtree(out)
    for sentence in missing:
        SAY.print(sentence, markup=False)
    test = sum(entry["split"] == "test" for entry in entries)
    SAY.print(f"{test} test and {len(entries) - test} development documents in {out}", markup=False)
    if test < ENOUGH:
        SAY.print(f"that is fewer than the {ENOUGH} test documents that the benchmark needs", markup=False)
    return 0 if test >= ENOUGH else 1


def is_whole(out: Path) -> bool:
    """Whether `out` holds a complete set, each document as it was written."""
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        entries = manifest["documents"] if manifest["complete"] else []
        return bool(entries) and all(
            hashlib.sha256((out / entry["file"]).read_bytes()).hexdigest() == entry["sha256"] for entry in entries
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def token_counter() -> Any:
    """A function from a text to its number of SmolLM2 tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED[TOKENIZER].prepare(cache_folder()))
    # the Rust tokenizer behind it does not warn about texts beyond the model's context
    return lambda text: len(tokenizer.backend_tokenizer.encode(text).ids)


def choose(count_tokens: Any) -> tuple[list[tuple[Document, int]], list[str]]:
    """Take from each source documents that are long enough, spread evenly over its names."""
    downloads = writable(cache_folder() / "downloads")
    chosen: list[tuple[Document, int]] = []
    missing = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=SAY, transient=True) as bar:
        task = bar.add_task("", total=sum(map(len, SOURCES.values())))
        for kind, sources in SOURCES.items():
            for source in sources:
                bar.update(task, description=f"gathering {source.__name__.replace('_', ' ')}")
                try:
                    candidates = [(trim(document), count_tokens(trim(document).text)) for document in source(downloads)]
                except MissingSourceError as error:
                    missing.append(f"no {source.__name__.replace('_', ' ')} ({kind}): {error}")
                    candidates = []
                for split in ("test", "dev"):
                    long = [pair for pair in candidates if pair[0].split == split and pair[1] >= MIN_TOKENS]
                    chosen += evenly(sorted(long, key=lambda pair: pair[0].name), PER_KIND // len(sources), at="middle")
                bar.advance(task)
    return chosen, missing


def trim(document: Document, most: int = MAX_CHARACTERS) -> Document:
    """The beginning of a document, ended after a paragraph, or else a sentence, where it is too long."""
    text = document.text.replace("\r\n", "\n").strip() + "\n"
    if len(text) > most:
        ends = (text.rfind("\n\n", 0, most - 1), text.rfind(". ", 0, most - 1) + 1)
        text = text[: next((end for end in ends if end > 0), most - 1)].rstrip() + "\n"
    return Document(document.name, document.kind, document.split, document.source, document.licence, text)


def write(document: Document, tokens: int, folder: Path) -> dict[str, Any]:
    """Write one document; return its line of the manifest."""
    content = document.text.encode("utf-8")
    file = f"{document.split}/{document.kind}/{document.name}.txt"
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(content)
    return {
        "file": file,
        "kind": document.kind,
        "split": document.split,
        "source": document.source,
        "licence": document.licence,
        "tokens": tokens,
        "characters": len(document.text),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


if __name__ == "__main__":
    sys.exit(main())
