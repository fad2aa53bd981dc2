"""A scene as an image of 224 x 224 pixels."""

from __future__ import annotations

import functools
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scene_things import CELL, COLOURS, SIDE, Scene, Thing

FINER = 2
"""Scenes are drawn so many times larger and scaled down, for smooth edges."""
SMALLEST = 8
Points = list[tuple[float, float]]


def draw_image(scene: Scene, seed: int) -> Image.Image:
    """The image; `seed` is that of the noise alone."""
    picture = _ground(scene, seed).resize((SIDE * FINER, SIDE * FINER), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(picture)
    for thing in scene.things:
        if thing.kind == "shape":
            _shape(pen, thing)
        else:
            _text(pen, thing)
    return picture.reduce(FINER)


def _ground(scene: Scene, seed: int) -> Image.Image:
    side = SIDE // 4  # gradients and soft noise need no more
    angle = math.radians(scene.angle)
    steps = np.linspace(-0.5, 0.5, side)
    along = 0.5 + (steps[None, :] * math.cos(angle) + steps[:, None] * math.sin(angle)) / math.sqrt(2)
    one, other = (np.array(colour, dtype=float) for colour in scene.ground)
    pixels = one + along[..., None] * (other - one)
    if scene.noise:
        pixels += scene.noise * np.random.default_rng(seed).standard_normal((side, side, 1))
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def _shape(pen: ImageDraw.ImageDraw, thing: Thing) -> None:
    fill, radius = COLOURS[thing.colour], thing.size / 2 * FINER
    x, y = thing.x * FINER, thing.y * FINER
    box = (x - 0.92 * radius, y - 0.92 * radius, x + 0.92 * radius, y + 0.92 * radius)
    if thing.name == "circle":
        pen.ellipse(box, fill=fill)
    elif thing.name == "ring":
        pen.ellipse(box, outline=fill, width=round(0.34 * radius))
    else:
        turn = math.radians(thing.turn)
        cos, sin = math.cos(turn) * radius, math.sin(turn) * radius
        pen.polygon([(x + cos * u - sin * v, y + sin * u + cos * v) for u, v in _outline(thing.name)], fill=fill)


@functools.cache
def _outline(name: str) -> Points:
    """The corners of a shape, about (0, 0), within a circle of radius 1; v points down."""
    if name == "square":
        return _corners([0.98] * 4, 45)
    if name == "triangle":
        return [(u, v + 0.12) for u, v in _corners([1.02] * 3, -90)]
    if name == "star":
        return _corners([1.0, 0.42] * 5, -90)
    if name == "diamond":
        return [(0, -1), (0.62, 0), (0, 1), (-0.62, 0)]
    if name == "cross":
        a, b = 0.3, 0.9
        return [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    turns = [2 * math.pi * step / 48 for step in range(48)]  # heart
    return [
        (
            0.92 * math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17 - 0.12,
        )
        for t in turns
    ]


def _corners(radii: list[float], first: float) -> Points:
    turns = [math.radians(first + 360 * step / len(radii)) for step in range(len(radii))]
    return [(radius * math.cos(turn), radius * math.sin(turn)) for radius, turn in zip(radii, turns, strict=True)]


def _text(pen: ImageDraw.ImageDraw, thing: Thing) -> None:
    room = (len(thing.cells) * CELL - 8) * FINER
    size = round(thing.size * FINER)
    while size > SMALLEST and _font(size).getlength(thing.name) + FINER > room:
        size -= 1
    pen.text(
        (thing.x * FINER, thing.y * FINER),
        thing.name,
        fill=COLOURS[thing.colour],
        font=_font(size),
        anchor="mm",
        stroke_width=1,  # a little bolder
        stroke_fill=COLOURS[thing.colour],
    )


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)  # the one inside Pillow, the same everywhere
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
