"""Images with what is on them and questions about them, as a user or a benchmark writes them down."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickmerge.errors import QuickmergeError, half_character

__all__ = ["ANNOTATIONS", "Annotated", "Question", "read_annotated"]

ANNOTATIONS = "annotations.jsonl"
"""The file beside the images, one line of JSON an image."""
OTHER = "other"
"""The kind of a question that names none."""
FARTHEST = 1e9
"""No image has so many pixels on a side; numbers beyond it, and those that are none, are no places in one."""
FORM = '{"image": "a.png", "labels": ["cat"], "questions": [{"question": "Where is it?", "answer": "left"}]}'


@dataclass(frozen=True)
class Question:
    """A question about an image, its short answer, and its kind, which results are told apart by."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Placed:
    """What stands in a part of an image, in words, and the part: left, top, right and bottom in pixels."""

    text: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Annotated:
    """An image file, the names of what it shows, questions about it, and what stands where in it."""

    path: Path
    labels: tuple[str, ...]
    questions: tuple[Question, ...]
    objects: tuple[Placed, ...] = ()


def read_annotated(folder: Path) -> list[Annotated]:
    """Read the annotated images of a folder, in the order of their lines.

    Args:
        folder: holds `annotations.jsonl`, one JSON object a line: ``image``, a file's path within the folder, and
            ``labels``, a list of names, or ``questions``, a list of objects with ``question``, ``answer`` and, if you
            like, ``kind``, or both; beside them ``objects``, a list of objects with ``text`` and ``box``, the left,
            top, right and bottom of it in pixels. Other keys are passed over, and so are empty lines.

    Returns:
        At least one image, each with a label or a question. The images are there; they are not opened.

    Raises:
        QuickmergeError: something is missing or not of this form; the message names the file and the line.
    """
    file = folder / ANNOTATIONS
    if not file.is_file():
        raise QuickmergeError(f"there is no file {file}: it must hold a line such as {FORM} for each image")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise QuickmergeError(f"{file} can't be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise QuickmergeError(f"{file} must be UTF-8 text, got other bytes") from None
    found = [
        _picture(folder, line, f"line {number} of {file}")
        for number, line in enumerate(text.split("\n"), start=1)  # a string of JSON may hold what splitlines() cuts at
        if line.strip()
    ]
    if not found:
        raise QuickmergeError(f"{file} is empty: it must hold a line such as {FORM} for each image")
    return found


def _picture(folder: Path, line: str, where: str) -> Annotated:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        why = f"{error.msg} at character {error.colno}" if isinstance(error, json.JSONDecodeError) else "too deep"
        raise QuickmergeError(f"{where} must be JSON, but it is not ({why})") from None
    if not isinstance(entry, dict):
        raise QuickmergeError(f"{where} must be a JSON object such as {FORM}, got {_told(entry)}")
    path = _image(folder, _words(entry, "image", where), where)
    labels = tuple(_word(label, f"each label in {where}") for label in _list(entry, "labels", where))
    questions = tuple(_question(one, where) for one in _list(entry, "questions", where))
    if not labels and not questions:
        raise QuickmergeError(f"{where} must have labels or questions, got neither")
    return Annotated(path, labels, questions, tuple(_placed(one, where) for one in _list(entry, "objects", where)))


def _image(folder: Path, name: str, where: str) -> Path:
    # by name, not by where links lead: the hub's own cache is made of links
    inside = os.path.normpath(name)
    if os.path.isabs(inside) or inside.split(os.sep)[0] in (os.pardir, os.curdir):
        raise QuickmergeError(f"the image in {where} must be a file inside {folder}, got {name!r}")
    try:
        there = (folder / inside).is_file()
    except ValueError:  # a NUL in the name
        there = False
    if not there:
        raise QuickmergeError(f"the image {name!r} in {where} is not in {folder}")
    return folder / inside


def _question(entry: Any, where: str) -> Question:
    if not isinstance(entry, dict):
        raise QuickmergeError(f"each question in {where} must be a JSON object, got {_told(entry)}")
    kind = _words(entry, "kind", where) if "kind" in entry else OTHER
    return Question(kind, _words(entry, "question", where), _words(entry, "answer", where))


def _placed(entry: Any, where: str) -> Placed:
    if not isinstance(entry, dict):
        raise QuickmergeError(f"each of objects in {where} must be a JSON object, got {_told(entry)}")
    box = entry.get("box")
    numbers = isinstance(box, list) and all(type(n) in (int, float) and abs(n) <= FARTHEST for n in box)
    if not isinstance(box, list) or not numbers or len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
        raise QuickmergeError(
            f"box in {where} must be the left, top, right and bottom of an object in pixels, got {_told(box)}"
        )
    left, top, right, bottom = map(float, box)
    return Placed(_words(entry, "text", where), (left, top, right, bottom))


def _list(entry: dict[str, Any], key: str, where: str) -> list[Any]:
    value = entry.get(key, [])
    if not isinstance(value, list):
        raise QuickmergeError(f"{key} in {where} must be a list, got {_told(value)}")
    return value


def _words(entry: dict[str, Any], key: str, where: str) -> str:
    if key not in entry:
        raise QuickmergeError(f"{where} lacks {key!r}")
    return _word(entry[key], f"{key} in {where}")


def _word(value: Any, what: str) -> str:
    """A string, without the spaces around it, which no answer should have to match."""
    if not isinstance(value, str) or not value.strip():
        raise QuickmergeError(f"{what} must be a string that is not empty, got {_told(value)}")
    if half_character(value) is not None:
        raise QuickmergeError(f"{what} must be text, got half a character in {_told(value)}")
    return value.strip()


def _told(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
