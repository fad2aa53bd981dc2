"""Draw the scenes that answers of vision-language models are trained and measured on.

    python benchmarks/scenes.py [--out DIR] [--train N] [--val N] [--test N]

Writes scenes/{train,val,test}/, images of 224 x 224 pixels with shapes, words and digits, and beside them
annotations.jsonl, what is on each and 8 to 12 questions with their answers, into the cache folder (or DIR). Other
numbers of images than the usual go to a folder of their own. The same images come out every time; no scene of one
split is in another. A second run finds everything whole and does nothing.
"""

from __future__ import annotations

import io
import random
import sys
from collections.abc import Iterator

from annotated_images import Picture, asked_for, write_all
from asking import Asker
from pictures import SAY
from scene_drawing import draw_image
from scene_questions import candidates
from scene_things import SPLITS, Scene, draw_scene

from quickmerge.errors import QuickmergeError

SEED = 0
USUAL = {"train": 4000, "val": 100, "test": 300}
ABOUT = {"seed": SEED, "recipe": 2, "source": "benchmarks/scenes.py", "licence": "Apache-2.0"}
"""The recipe counts up when other images or questions come out."""


def scenes(split: str, count: int) -> Iterator[Scene]:
    """The first scenes of a split, no two with the same things at the same places."""
    assert split in SPLITS
    seen = set()
    for index in range(count):
        draw = random.Random(f"{SEED} {split} {index}")
        scene = draw_scene(split, draw)
        while (key := frozenset((thing.label, thing.colour, thing.cells) for thing in scene.things)) in seen:
            scene = draw_scene(split, draw)
        seen.add(key)
        yield scene


def pictures(split: str, count: int) -> Iterator[Picture]:
    """The first images of a split, with their questions."""
    asker = Asker()
    for index, scene in enumerate(scenes(split, count)):
        draw = random.Random(f"{SEED} {split} {index} questions")
        asked = asker.ask(candidates(scene, draw), draw)
        file = io.BytesIO()
        draw_image(scene, index).save(file, "PNG", compress_level=5)
        questions = [(one.kind, one.question, one.answer) for one in asked]
        yield Picture(file.getvalue(), scene.labels, questions, [(thing.text, thing.box) for thing in scene.things])


def main() -> int:
    """Run the command line; 0 when everything is there."""
    out, counts = asked_for("Draw the scenes of the benchmark.", "scenes", USUAL)
    try:
        return write_all(
            out, {split: (count, pictures(split, count)) for split, count in counts.items()}, ".png", ABOUT
        )
    except QuickmergeError as error:
        SAY.print(str(error), markup=False)
        return 2


if __name__ == "__main__":
    sys.exit(main())
