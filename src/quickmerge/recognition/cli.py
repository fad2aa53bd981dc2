"""``quickmerge recognize``: name what is in images, in free words or from a list."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quickmerge.console.options import (
    FEWER,
    JSON,
    RAW,
    check_output,
    one_sentence,
    progress,
    quiet,
    read_text,
    write_json,
)
from quickmerge.errors import QuickmergeError, clean_name, near_match, whole_number
from quickmerge.merge.cli.options import parse_reducer

if TYPE_CHECKING:
    from quickmerge.recognition import Guess

EXAMPLE = "Example: quickmerge recognize photo.jpg --model runs/recognizer --top 5"
METHODS = ("one-shot", "best-first", "greedy", "beam")
KEEP = 0.5


def recognize(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    model: Annotated[
        str, typer.Option("--model", help="The folder that quickmerge train recognizer wrote, or a hub id.")
    ],
    labels: Annotated[
        Path | None, typer.Option("--labels", help="A file with one label a line: only these are scored.")
    ] = None,
    top: Annotated[int, typer.Option("--top", help="Labels to an image.")] = 10,
    method: Annotated[
        str | None, typer.Option("--method", help="one-shot, best-first, greedy or beam. Default: one-shot.")
    ] = None,
    minimum: Annotated[float, typer.Option("--minimum", help="Leave out labels less probable than this.")] = 0.0,
    reducer: Annotated[
        str | None,
        typer.Option("--reducer", help="One for vision transformers, see quickmerge ls.", rich_help_panel=FEWER),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option("--keep", help=f"Share of the tokens kept, in (0, 1]. Default: {KEEP:g}.", rich_help_panel=FEWER),
    ] = None,
    raw: RAW = False,
    json: JSON = None,
) -> None:
    """Name the objects in images, most probable first: in free words, or by the labels of a file (--labels)."""
    if reducer is None and keep is not None:
        raise QuickmergeError(f"--keep needs --reducer, which says how tokens are left out: got --keep {keep:g} alone")
    if labels is not None and method is not None:
        raise QuickmergeError(
            f"--method chooses how free labels are found: it can't be used with --labels, got {method}"
        )
    method = "one-shot" if method is None else method
    if method not in METHODS:
        raise QuickmergeError(
            f"--method must be one of {', '.join(METHODS)}, got {method!r}{near_match(method, METHODS)}"
        )
    if not 0 <= minimum < 1:
        raise QuickmergeError(f"--minimum must be a probability in [0, 1), got {minimum:g}")
    with one_sentence():
        top = whole_number("--top", top)
    check_output(json)
    less = None if reducer is None else parse_reducer(reducer, KEEP if keep is None else keep, "vision")
    given = None if labels is None else read_labels(labels)
    quiet()
    import torch

    from quickmerge.datasets.images import ImageFolder
    from quickmerge.recognition import Recognizer
    from quickmerge.recognition.train import pixel_format

    network = Recognizer.from_pretrained(model)
    form = pixel_format(network)
    pictures = ImageFolder(images, (form.height, form.width))
    # Every image is opened before the first is looked at, so that a bad one is told at once.
    pixels = [form.standardised(pictures[index]) for index in range(len(pictures))]
    found: list[list[Guess]] = []
    with progress() as bar, one_sentence(), torch.inference_mode():
        task = bar.add_task("looking", total=len(pixels))
        for one in pixels:
            found += network.recognize(
                one[None], top=len(given) if given else top, method=method.replace("-", "_"), minimum=0.0, labels=given,
                reducer=less,
            )  # fmt: skip
            bar.update(task, advance=1)
    rows = [as_rows(guesses, top, minimum, closed=given is not None) for guesses in found]
    for path, row in zip(images, rows, strict=True):
        show(path, row, raw=raw)
    write_json(json, {
        "model": Path(model).name, "method": "closed set" if given else method, "labels": given, "reducer": reducer,
        "keep": None if less is None else KEEP if keep is None else keep, "minimum": minimum,
        "images": [{"image": path.name, "labels": row} for path, row in zip(images, rows, strict=True)],
    })  # fmt: skip


def as_rows(guesses: Sequence[Guess], top: int, minimum: float, *, closed: bool) -> list[dict[str, Any]]:
    """Labels with ``probability``, and with their ``share`` of what the list has together where it is a closed set."""
    total = sum(guess.score for guess in guesses)
    rows = []
    for guess in guesses[:top]:
        row: dict[str, Any] = {"label": guess.label, "probability": guess.score}
        if closed:
            row["share"] = guess.score / total if total > 0 else 1 / len(guesses)
        if guess.score >= minimum:
            rows.append(row)
    return rows


def show(path: Path, rows: Sequence[dict[str, Any]], *, raw: bool = False) -> None:
    """Print an image's labels as a table; ``raw``, as lines of label, tab and probability, the labels as they are."""
    if raw:
        print(path)
        for row in rows:
            print(f"{row['label']}\t{row['probability']:.4g}")
        return
    from rich.table import Table

    from quickmerge.terminal import Terminal

    table = Table("label", title=clean_name(path.name), title_justify="left")
    table.add_column("probability", justify="right")
    closed = any("share" in row for row in rows)
    if closed:
        table.add_column("share", justify="right")
    for row in rows:
        cells = [clean_name(row["label"]), f"{row['probability']:.2e}" if row["probability"] < 1e-3 else
                 f"{row['probability']:.4f}"]  # fmt: skip
        table.add_row(*cells, *([f"{row['share']:.4f}"] if closed else []))
    if rows:
        Terminal().print(table)
    else:
        print(f"{clean_name(path.name)}: nothing is as probable as asked for (--minimum)")


def read_labels(path: Path) -> list[str]:
    """The labels of a file, one a line; empty lines do not count.

    Raises:
        QuickmergeError: the file can't be read, holds no label, or one twice.
    """
    lines = [(number, " ".join(line.split())) for number, line in enumerate(read_text(path).splitlines(), 1)]
    seen: dict[str, int] = {}
    for number, label in lines:
        if label and label in seen:
            raise QuickmergeError(f"{path} must hold each label once, {label!r} is in lines {seen[label]} and {number}")
        if label:
            seen[label] = number
    return list(seen)
