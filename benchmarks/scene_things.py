"""What a drawn scene holds: coloured shapes, a word, digits, each in cells of a 4 x 4 grid, on a background.

A scene is a plain list of things; drawing it (scene_drawing.py) and asking about it (scene_questions.py) start from
that list alone. The 16 cells make 9 regions: a corner is one cell, the middle of an edge two, the center four. Things
in inner rows and columns are moved towards the middle only, so that none lies on the border of two regions.
"""

from __future__ import annotations

import colorsys
import hashlib
import math
import random
from dataclasses import dataclass
from typing import Literal, TypeAlias

SIDE, CELLS = 224, 4
CELL = SIDE // CELLS
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "diamond", "ring")
Colour: TypeAlias = tuple[int, int, int]
COLOURS: dict[str, Colour] = {
    "red": (214, 34, 40),
    "green": (24, 140, 56),
    "blue": (36, 76, 214),
    "yellow": (250, 220, 40),
    "purple": (132, 44, 168),
    "orange": (246, 132, 20),
    "white": (252, 252, 252),
    "black": (16, 16, 16),
}
_WORDS = """
    apple baker beach bird boat book bread bus cake candle car cat chair cloud coat corn cow cup
    desk dog door duck egg farm fish fox frog game gift grass hat hill horse house jam key king lamp
    leaf lemon map milk moon mouse night ocean paper pen phone pig plant queen rain river road salt
    ship shoe snow spoon stone sun table tiger train tree water wind window wolf
"""
WORDS = tuple(_WORDS.split())
ROWS, COLUMNS = ("top", "", "", "bottom"), ("left", "", "", "right")
REGIONS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
SPLITS = {"train": range(8), "val": range(8, 9), "test": range(9, 10)}
"""The tenth of all possible scenes that a split draws from, so that none is in two splits."""
APART = 215.0
"""Least distance of a thing's colour from its background, where black and white are 773 apart."""
READABLE = 75.0
"""Least difference in brightness, of 255, of a word or a digit."""
Kind: TypeAlias = Literal["shape", "digit", "word"]
Cell: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Thing:
    """One thing: what it is, its colour's name, its cells (row, column), and how it is drawn in them.

    `x` and `y` are its centre in pixels, `size` its height, `turn` its rotation in degrees.
    """

    kind: Kind
    name: str
    colour: str
    cells: tuple[Cell, ...]
    x: float
    y: float
    size: float
    turn: float

    @property
    def label(self) -> str:
        """What a recogniser should say: ``red circle``, ``digit 7``, ``word apple``."""
        return f"{self.colour} {self.name}" if self.kind == "shape" else f"{self.kind} {self.name}"

    @property
    def text(self) -> str:
        """What it is in words, colour and place and all: ``red circle top left``, ``black digit 7 center``."""
        what = self.name if self.kind == "shape" else f"{self.kind} {self.name}"
        return " ".join([self.colour, what, *([] if self.region is None else [self.region])])

    @property
    def box(self) -> list[int]:
        """Left, top, right and bottom in pixels; a word may be less wide than its cells."""
        across = self.size / 2 if self.kind != "word" else len(self.cells) * CELL / 2 - 2
        edges = (self.x - across, self.y - self.size / 2, self.x + across, self.y + self.size / 2)
        return [min(max(round(edge), 0), SIDE) for edge in edges]

    @property
    def regions(self) -> frozenset[str]:
        """The regions that its cells are in."""
        return frozenset(region(cell) for cell in self.cells)

    @property
    def region(self) -> str | None:
        """Where it lies, or None for a word across two regions."""
        (first, *others) = sorted(self.regions)
        return None if others else first


@dataclass(frozen=True)
class Scene:
    """Things on a background that goes from one colour to another at an angle, with so much noise."""

    things: tuple[Thing, ...]
    ground: tuple[Colour, Colour]
    angle: float
    noise: float

    @property
    def split(self) -> str:
        """The split that a scene with these things at these places belongs to."""
        told = sorted(f"{thing.label} {thing.colour} {thing.cells}" for thing in self.things)
        tenth = int(hashlib.sha256("\n".join(told).encode()).hexdigest(), 16) % 10
        return next(split for split, tenths in SPLITS.items() if tenth in tenths)

    @property
    def labels(self) -> list[str]:
        """The label of every thing; no two are the same."""
        return [thing.label for thing in self.things]


def region(cell: Cell) -> str:
    """The name of the region that a cell is in."""
    return f"{ROWS[cell[0]]} {COLUMNS[cell[1]]}".strip() or "center"


def draw_scene(split: str, draw: random.Random) -> Scene:
    """A random scene of a split."""
    while True:
        scene = _any_scene(draw)
        if scene is not None and scene.split == split:
            return scene


def _any_scene(draw: random.Random) -> Scene | None:
    ground = _ground(draw)
    colours = [name for name, colour in COLOURS.items() if all(_distance(colour, end) >= APART for end in ground)]
    light = sum(map(_brightness, ground)) / 2
    readable = [name for name in colours if abs(_brightness(COLOURS[name]) - light) >= READABLE]
    if len(colours) < 5 or len(readable) < 2:
        return None
    free = [(row, column) for row in range(CELLS) for column in range(CELLS)]
    things: list[Thing] = []
    if draw.random() < 0.5:
        word = draw.choice(WORDS)
        row, column = draw.randrange(CELLS), draw.randrange(CELLS if len(word) == 3 else CELLS - 1)
        cells = ((row, column),) if len(word) == 3 else ((row, column), (row, column + 1))
        things.append(_placed("word", word, draw.choice(readable), cells, draw))
    digits = draw.sample("0123456789", draw.choice((0, 0, 1, 1, 2)))
    total = max(draw.randint(3, 7), len(things) + len(digits) + 2)
    shapes = _shapes(total - len(things) - len(digits), colours, draw)
    taken = {cell for thing in things for cell in thing.cells}
    rest: list[tuple[Kind, str, str]] = [
        *(("digit", digit, draw.choice(readable)) for digit in digits),
        *(("shape", shape, colour) for shape, colour in shapes),
    ]
    for kind, name, colour in rest:
        # two digits side by side would read as one number, and a digit beside a word as a part of it
        near = {(row, column + step) for row, column in taken for step in (-1, 1)} if kind == "digit" else set()
        open_cells = [cell for cell in free if cell not in taken | near]
        if not open_cells:
            return None
        # corners are rarer than the middle: even out how often each region is used
        weights = [(1.0, 0.6, 0.4)[(row in (1, 2)) + (column in (1, 2))] for row, column in open_cells]
        cell = draw.choices(open_cells, weights)[0]
        taken.add(cell)
        things.append(_placed(kind, name, colour, (cell,), draw))
    draw.shuffle(things)
    return Scene(tuple(things), ground, draw.uniform(0, 360), draw.choice((0.0, 0.0, draw.uniform(2, 6))))


def _shapes(count: int, colours: list[str], draw: random.Random) -> list[tuple[str, str]]:
    """Shapes and their colours, no pair twice; in some scenes several are alike, to be counted."""
    shape = draw.choice(SHAPES) if draw.random() < 0.6 else None
    colour = draw.choice(colours) if draw.random() < 0.6 else None
    pairs: list[tuple[str, str]] = []
    alike_shape, alike_colour = draw.choice((2, 3, 4, 4)), draw.choice((2, 3, 4, 4))
    while len(pairs) < count:
        one, other = draw.choice(SHAPES), draw.choice(colours)
        if shape is not None and sum(pair[0] == shape for pair in pairs) < alike_shape:
            one = shape
        elif colour is not None and sum(pair[1] == colour for pair in pairs) < alike_colour:
            other = colour
        full = sum(pair[0] == one for pair in pairs) > 3 or sum(pair[1] == other for pair in pairs) > 3
        if (one, other) not in pairs and not full:
            pairs.append((one, other))
    return pairs


def _placed(kind: Kind, name: str, colour: str, cells: tuple[Cell, ...], draw: random.Random) -> Thing:
    size = draw.uniform(30, 36) if kind == "word" else draw.uniform(36, 50)
    slack = (CELL - size) / 2 - 1
    across = slack if len(cells) == 1 and kind != "word" else 2.0  # a word fills its cells from side to side
    (row, first), (_, last) = cells[0], cells[-1]
    inner = 1 if first == last else 0  # the middle of a wide word is where it should be
    x = (first + last + 1) / 2 * CELL + _shift(first * inner, across, draw)
    y = (row + 0.5) * CELL + _shift(row, slack, draw)
    turn = draw.uniform(-10, 10) if kind == "shape" else 0.0
    return Thing(kind, name, colour, cells, x, y, size, turn)


def _shift(index: int, most: float, draw: random.Random) -> float:
    """Somewhere in the cell; in an inner row or column only towards the middle of the image."""
    amount = draw.uniform(-most, most)
    return {1: abs(amount), 2: -abs(amount)}.get(index, amount)


def _ground(draw: random.Random) -> tuple[Colour, Colour]:
    hue, saturation, value = draw.random(), draw.uniform(0.03, 0.25), draw.uniform(0.25, 0.95)
    step = draw.choice((0.0, draw.uniform(0.04, 0.14)))  # plain, or a gentle gradient
    return _rgb(hue, saturation, value - step), _rgb(hue + step / 2, saturation, min(1.0, value + step))


def _rgb(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _brightness(colour: Colour) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def _distance(one: Colour, other: Colour) -> float:
    """How different two colours look; blue, which hardly adds to brightness, counts little."""
    return math.sqrt(sum(w * (a - b) ** 2 for w, a, b in zip((3, 5, 1.2), one, other, strict=True)))
