"""All questions about a scene that have one clear answer, each with that answer."""

from __future__ import annotations

import random
from collections.abc import Iterator

from asking import Asked, a
from scene_things import COLOURS, REGIONS, SHAPES, Scene, Thing


def candidates(scene: Scene, draw: random.Random) -> list[Asked]:
    """Every question that has one clear answer; of those that are answered with no, as many as with yes."""
    return [
        *_what(scene),
        *_where(scene),
        *_colour(scene),
        *_read(scene),
        *_count(scene),
        *_exists(scene, draw),
    ]


def at(region: str) -> str:
    """A region as a place: ``at the top left``, ``in the center``."""
    return "in the center" if region == "center" else f"at the {region}"


def alone(scene: Scene, region: str) -> Thing | None:
    """The only thing in a region, or None; a word that reaches into it from another makes it unclear."""
    found = [thing for thing in scene.things if region in thing.regions]
    return found[0] if len(found) == 1 and found[0].region == region else None


def name_of(scene: Scene, thing: Thing) -> str | None:
    """What a thing is called, such that no other is meant; without its colour if it needs none."""
    alike = [other for other in scene.things if other.kind == thing.kind]
    if thing.kind != "shape":
        return thing.kind if len(alike) == 1 else f"digit {thing.name}"
    return thing.name if sum(other.name == thing.name for other in alike) == 1 else thing.label


def _what(scene: Scene) -> Iterator[Asked]:
    for region in REGIONS:
        thing = alone(scene, region)
        if thing is not None and thing.kind == "shape":
            yield Asked("what", f"What shape is {at(region)}?", thing.name, "what")


def _where(scene: Scene) -> Iterator[Asked]:
    for thing in scene.things:
        if thing.region is not None:
            yield Asked("where", f"Where is the {name_of(scene, thing)}?", thing.region, "where")


def _colour(scene: Scene) -> Iterator[Asked]:
    for thing in scene.things:
        name = name_of(scene, thing)
        if name != thing.label or thing.kind != "shape":  # a name with the colour in it gives it away
            yield Asked("colour", f"What colour is the {name}?", thing.colour, "colour")


def _read(scene: Scene) -> Iterator[Asked]:
    digits = [thing for thing in scene.things if thing.kind == "digit"]
    if len(digits) == 1:
        yield Asked("read", "Which digit is shown?", digits[0].name, "digit")
    for thing in digits if len(digits) > 1 else []:
        if thing.region is not None and alone(scene, thing.region) is thing:
            yield Asked("read", f"Which digit is {at(thing.region)}?", thing.name, "digit")
    for thing in scene.things:
        if thing.kind == "word":
            yield Asked("read", "What word is written?", thing.name, "word")


def _count(scene: Scene) -> Iterator[Asked]:
    shapes = [thing for thing in scene.things if thing.kind == "shape"]
    for shape in SHAPES:
        count = sum(thing.name == shape for thing in shapes)
        yield Asked("count", f"How many {shape}{'es' if shape == 'cross' else 's'} are there?", str(count), "count")
    for colour in COLOURS:
        count = sum(thing.colour == colour for thing in shapes)
        yield Asked("count", f"How many {colour} shapes are there?", str(count), "count")


def _exists(scene: Scene, draw: random.Random) -> Iterator[Asked]:
    there = {(thing.colour, thing.name) for thing in scene.things if thing.kind == "shape"}
    gone = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in there]
    # half of what is not there is nearly there: its shape or its colour is
    near = [(c, s) for c, s in gone if any((c == colour) or (s == shape) for colour, shape in there)]
    no = draw.sample(near, min(len(there), len(near))) + draw.sample(gone, len(there))
    for colour, shape in sorted(there):
        yield Asked("exists", f"Is there {a(colour)} {shape}?", "yes", "exists")
    for colour, shape in dict.fromkeys(no):
        yield Asked("exists", f"Is there {a(colour)} {shape}?", "no", "exists")
