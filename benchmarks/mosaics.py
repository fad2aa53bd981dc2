"""Put photographs of fruit together, as images that answers of vision-language models are trained and measured on.

    python benchmarks/mosaics.py [--out DIR] [--train N] [--test N]

Writes mosaics/{train,test}/, images of 224 x 224 pixels, each one photograph or four of them in a square, and
beside them annotations.jsonl, what is on each and questions with their answers, into the cache folder (or DIR). The
photographs are those that `python benchmarks/labelled_images.py` puts into the cache folder; those to test on are
in images to test on alone. Other numbers of images than the usual go to a folder of their own. The same images
come out every time. A second run finds everything whole and does nothing.
"""

from __future__ import annotations

import io
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from annotated_images import Picture, asked_for, write_all
from asking import Asked, Asker, a
from pictures import SAY, is_whole
from PIL import Image, ImageOps

from quickmerge.errors import QuickmergeError
from quickmerge.images import open_image
from quickmerge.models import cache_folder

SEED, SIDE = 0, 224
USUAL = {"train": 1000, "test": 200}
ABOUT = {
    "seed": SEED,
    "recipe": 2,
    "source": "benchmarks/mosaics.py of the groceries of benchmarks/labelled_images.py",
}
"""The recipe counts up when other images or questions come out."""
SINGLE = 0.25
KINDS = {
    "anjou": "anjou pear",
    "cantaloupe": "cantaloupe",
    "conference": "conference pear",
    "galia-melon": "galia melon",
    "golden-delicious": "golden delicious apple",
    "granny-smith": "granny smith apple",
    "honeydew-melon": "honeydew melon",
    "kaiser": "kaiser pear",
    "orange": "orange",
    "pink-lady": "pink lady apple",
    "red-delicious": "red delicious apple",
    "royal-gala": "royal gala apple",
    "satsumas": "satsuma",
    "watermelon": "watermelon",
}
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
SHARED = ((0, 1, 2, 3), (0, 1, 2, 3), (0, 0, 1, 2), (0, 0, 1, 1), (0, 0, 0, 1), (0, 0, 0, 0))
"""Which quadrants show the same kind, before they are shuffled."""


@dataclass(frozen=True)
class Mosaic:
    """One photograph, or four in the order of `QUADRANTS`: their files and kinds."""

    files: tuple[Path, ...]
    kinds: tuple[str, ...]


def mosaics(photos: dict[str, list[Path]], split: str, count: int) -> Iterator[Mosaic]:
    """The first mosaics of a split, from its photographs by kind, no two the same; kinds are equally likely."""
    seen = set()
    for index in range(count):
        draw = random.Random(f"{SEED} {split} {index}")
        mosaic = _mosaic(photos, draw)
        while mosaic in seen:
            mosaic = _mosaic(photos, draw)
        seen.add(mosaic)
        yield mosaic


def _mosaic(photos: dict[str, list[Path]], draw: random.Random) -> Mosaic:
    shared = [0] if draw.random() < SINGLE else list(draw.choice(SHARED))
    draw.shuffle(shared)
    names = draw.sample(sorted(photos), 4)
    chosen = {kind: draw.sample(photos[kind], len(shared)) for kind in names}  # a photograph is in it once
    kinds = tuple(names[number] for number in shared)
    return Mosaic(tuple(chosen[kind][place] for place, kind in enumerate(kinds)), kinds)


def candidates(mosaic: Mosaic, draw: random.Random) -> list[Asked]:
    """Every question that has one clear answer; of those that are answered with no, as many as with yes."""
    kinds = mosaic.kinds
    there = sorted(set(kinds))
    gone = draw.sample([kind for kind in KINDS.values() if kind not in there], len(there))
    asked = [
        Asked("exists", f"Is there {a(kind)}?", answer, "exists")
        for answer, some in (("yes", there), ("no", gone))
        for kind in some
    ]
    if len(kinds) == 1:
        return [Asked("what", "What is this?", kinds[0], "what"), *asked]
    for place, kind in zip(QUADRANTS, kinds, strict=True):
        asked.append(Asked("what", f"What is at the {place}?", kind, "what"))
        if kinds.count(kind) == 1:
            asked.append(Asked("where", f"Where is the {kind}?", place, "where"))
    asked.append(Asked("count", "How many kinds of fruit are there?", str(len(there)), "kinds"))
    for kind in (*there, *gone):
        asked.append(Asked("count", f"How many images show {a(kind)}?", str(kinds.count(kind)), "images"))
    return asked


def put_together(mosaic: Mosaic) -> Image.Image:
    """The image."""
    side = SIDE if len(mosaic.files) == 1 else SIDE // 2
    picture = Image.new("RGB", (SIDE, SIDE))
    for place, file in enumerate(mosaic.files):
        part = ImageOps.fit(open_image(file), (side, side), Image.Resampling.BICUBIC)
        picture.paste(part, (place % 2 * side, place // 2 * side))
    return picture


def boxes(mosaic: Mosaic) -> list[tuple[str, list[int]]]:
    """What each photograph shows, and its left, top, right and bottom."""
    if len(mosaic.kinds) == 1:
        return [(mosaic.kinds[0], [0, 0, SIDE, SIDE])]
    half = SIDE // 2
    return [
        (f"{kind} {name}", [place % 2 * half, place // 2 * half, place % 2 * half + half, place // 2 * half + half])
        for place, (kind, name) in enumerate(zip(mosaic.kinds, QUADRANTS, strict=True))
    ]


def pictures(photos: dict[str, list[Path]], split: str, count: int) -> Iterator[Picture]:
    """The first images of a split, with their questions."""
    asker = Asker()
    for index, mosaic in enumerate(mosaics(photos, split, count)):
        draw = random.Random(f"{SEED} {split} {index} questions")
        asked = asker.ask(candidates(mosaic, draw), draw)
        file = io.BytesIO()
        put_together(mosaic).save(file, "JPEG", quality=90)
        labels = list(dict.fromkeys(mosaic.kinds))
        questions = [(one.kind, one.question, one.answer) for one in asked]
        yield Picture(file.getvalue(), labels, questions, boxes(mosaic))


def photographs(folder: Path, split: str) -> dict[str, list[Path]]:
    """The photographs of a split, by kind.

    Raises:
        QuickmergeError: they are not there, or not whole.
    """
    if not is_whole(folder):
        raise QuickmergeError(f"the photographs are not in {folder}: run `python benchmarks/labelled_images.py` first")
    return {name: sorted((folder / split / kind).glob("*.jpg")) for kind, name in KINDS.items()}


def main() -> int:
    """Run the command line; 0 when everything is there."""
    out, counts = asked_for("Put photographs of the benchmark together.", "mosaics", USUAL)
    groceries = cache_folder() / "labelled" / "groceries"
    try:
        splits = {
            split: (count, pictures(photographs(groceries, split), split, count)) for split, count in counts.items()
        }
        return write_all(out, splits, ".jpg", ABOUT)
    except QuickmergeError as error:
        SAY.print(str(error), markup=False)
        return 2


if __name__ == "__main__":
    sys.exit(main())
