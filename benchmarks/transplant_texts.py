"""Texts for the benchmark of transplanted vocabularies: passages to score, and a corpus to make vectors from.

Prose and code are of the benchmark documents, their test half. Russian and Chinese, which the base's tokenizer cuts
finely, are of the Debian FAQ. The corpus is a share of the text that the prior is trained on, which no test document is
in, and the Chinese of the Debian reference.
"""

from __future__ import annotations

import gzip
import json
import re
import unicodedata
from pathlib import Path

from document_sources import MissingSourceError, unpacked
from documents import MANIFEST, is_whole

from quickmerge.errors import QuickmergeError
from quickmerge.models import cache_folder
from quickmerge.sampling import evenly

PASSAGE = 500
"""Bytes of UTF-8 of a passage, at least."""
LANGUAGES = {"Russian": ("debian-faq-ru", "CYRILLIC"), "Chinese": ("debian-faq-zh-cn", "CJK")}
"""Kind: Debian package, and how Unicode names the letters of its script begin."""
CORPUS = ("debian-reference-zh-cn", "CJK")
SHARE = 4
"""Of so many training texts the corpus takes one: about 5 MB."""
PARAGRAPH = 40
"""Fewest bytes of a paragraph that is read."""


def passages(kind: str, documents: Path | None, count: int, *, scored: int = 0) -> list[str]:
    """``count`` passages of a kind of text, none overlapping another.

    Args:
        kind: a kind of the benchmark documents, "prose, lower case", or one of `LANGUAGES`.
        documents: folder that documents.py filled; None means the one in the cache folder.
        count: how many.
        scored: 0 for passages to score; else passages to choose on, other ones than so many to score: of the documents
            to develop on, or of what is left of a language.

    Raises:
        QuickmergeError: the texts can't be had, or are too few.
    """
    if kind in LANGUAGES:
        whole = _cut(_paragraphs(*LANGUAGES[kind]))
        taken = evenly(whole, scored)
        found = evenly([one for one in whole if one not in taken], count)
    else:
        folder = documents or cache_folder() / "documents"
        texts = _listed(folder, "dev" if scored else "test", "benchmarks/documents.py", kind.partition(",")[0])[:count]
        found = [_middle(text) for text in texts]
        if kind.endswith("lower case"):
            found = [plain(text) for text in found]
    if len(found) < count:
        raise QuickmergeError(f"--passages must be at most {len(found)}, of which {kind} has enough text, got {count}")
    return found


def corpus(training: Path | None) -> list[str]:
    """What vectors are made of: some of the training text, and Chinese paragraphs.

    Args:
        training: folder that training_text.py filled; None means the one in the cache folder.

    Raises:
        QuickmergeError: the texts can't be had.
    """
    folder = training or cache_folder() / "training"
    return [*_listed(folder, "train", "benchmarks/training_text.py")[::SHARE], *_paragraphs(*CORPUS)]


def plain(text: str) -> str:
    """Text as an uncased WordPiece tokenizer sees it: lower case, no accents, single spaces."""
    bare = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if not unicodedata.combining(c))
    return " ".join(bare.split())


def running(text: str, script: str) -> list[str]:
    """The paragraphs of a wrapped text that are mostly letters of one script, each in one line.

    Args:
        text: paragraphs with blank lines between them.
        script: how Unicode names of its letters begin.
    """
    found = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.splitlines()]
        # Chinese is wrapped anywhere, and has no spaces to put back
        joint = r"(?<=[\u2e80-\uffff])\n|\n(?=[\u2e80-\uffff])"
        paragraph = re.sub(joint, "", "\n".join(lines)) if script == "CJK" else "\n".join(lines)
        paragraph = " ".join(paragraph.split())
        letters = [c for c in paragraph if c.isalpha()]
        own = sum(unicodedata.name(c, "").startswith(script) for c in letters)
        if len(paragraph.encode()) >= PARAGRAPH and letters and own >= 0.8 * len(letters) and "--" not in paragraph:
            found.append(paragraph)
    return found


def _listed(folder: Path, split: str, script: str, kind: str = "") -> list[str]:
    """The texts of a folder's manifest that are of one split, and of one kind if it is named."""
    if not is_whole(folder):
        raise QuickmergeError(f"the texts in {folder} are not whole: run {script} first")
    entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["documents"]
    return [
        (folder / entry["file"]).read_text(encoding="utf-8")
        for entry in entries
        if entry["split"] == split and kind in ("", entry["kind"])
    ]


def _paragraphs(package: str, script: str) -> list[str]:
    downloads = cache_folder() / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    try:
        with unpacked(package, downloads) as (_, folder):
            texts = [gzip.decompress(path.read_bytes()).decode() for path in sorted(folder.rglob("*.txt.gz"))]
    except MissingSourceError as error:
        raise QuickmergeError(str(error)) from None
    return [paragraph for text in texts for paragraph in running(text, script)]


def _cut(paragraphs: list[str]) -> list[str]:
    """Passages of neighbouring paragraphs."""
    whole, held = list[str](), list[str]()
    for paragraph in paragraphs:
        held.append(paragraph)
        if len("\n".join(held).encode()) >= PASSAGE:
            whole.append(_least("\n".join(held)))
            held = []
    return whole


def _middle(text: str) -> str:
    """A passage that starts with a line or a sentence, a third into the text."""
    start = re.compile(r"\n+|(?<=[.!?]) +").search(text, len(text) // 3)
    return _least(text[start.end() if start else 0 :])


def _least(text: str) -> str:
    """As many characters as it takes to hold `PASSAGE` bytes."""
    size = 0
    for place, character in enumerate(text):
        size += len(character.encode())
        if size >= PASSAGE:
            return text[: place + 1]
    return text
