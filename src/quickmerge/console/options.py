"""What several commands share: reading input, making reducers, writing results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quickmerge.console.ending import Alone as Alone
from quickmerge.console.ending import one_sentence as one_sentence
from quickmerge.errors import QuickmergeError, UnsupportedModelError, door, half_character
from quickmerge.files import MOST_TEXT
from quickmerge.files import check_output as check_output
from quickmerge.files import read_text as read_text
from quickmerge.files import write_json as write_file

if TYPE_CHECKING:
    from rich.progress import Progress

MODEL = Annotated[str, typer.Option("--model", help="smollm2-135m, a folder, or a Hugging Face id.")]
REDUCER = Annotated[
    str, typer.Option("--reducer", help="See quickmerge ls. Settings may follow the name: quickmerge:recency=0.5.")
]
KEEP = Annotated[float, typer.Option("--keep", help="Share of the tokens that is kept, in (0, 1].")]
TOKENS = Annotated[
    int | None,
    typer.Option("--tokens", min=1, help="Images: how many tokens of each are kept, in place of --keep."),
]
LAYER = Annotated[
    str | None,
    typer.Option("--layer", help="First block that reads fewer tokens, or several: 8,14,20. Default: the method's."),
]
MIN_TOKENS = Annotated[
    int | None,
    typer.Option(
        "--min-tokens",
        min=0,
        help="Texts of fewer tokens, template and all, are read in full. Default: 256; of show, 0.",
    ),
]
PRIOR = Annotated[
    str | None,
    typer.Option("--prior", help="A trained prior for quickmerge: its folder, or smollm2-135m for the shipped one."),
]
RAW = Annotated[
    bool, typer.Option("--raw", help="Print the model's text as it is, also what a terminal takes for commands.")
]
JSON = Annotated[Path | None, typer.Option("--json", help="Write the results to this file as JSON.")]


def check_text(option: str, text: str) -> str:
    """Give back a text that was typed, if it is one.

    Raises:
        QuickmergeError: there is nothing in it, or bytes that are no UTF-8.
    """
    if not text.strip("\ufeff \t\r\n"):
        raise QuickmergeError(f"{option} must hold some text, got an empty one")
    half = half_character(text)
    if half is not None:
        raise QuickmergeError(f"{option} must be UTF-8 text, got other bytes at character {half}")
    return text


def parse_question(prompt: str, file: Path | None) -> tuple[str, str]:
    """The document and what is asked about it; one of the two may be empty.

    Raises:
        QuickmergeError: both are, or one is no text.
    """
    document = read_text(file, most=MOST_TEXT) if file is not None else ""
    if prompt or not document:
        check_text("--prompt", prompt)
    return document, prompt


def told_min_tokens(given: int | None) -> dict[str, Any]:
    """``--min-tokens`` as an argument, left out where nobody gave it."""
    return {} if given is None else {"min_tokens": given}


def parse_layer(text: str | None) -> int | list[int] | None:
    """``"8"`` is one block, ``"8,14"`` several, None the default."""
    if text is None:
        return None
    try:
        layers = [int(part) for part in text.split(",")]
    except ValueError:
        raise QuickmergeError(
            f"--layer must be a whole number or several with commas (8,14,20), got {text!r}"
        ) from None
    return layers[0] if len(layers) == 1 else layers


def parse_keeps(text: str) -> list[float]:
    """``"0.2,0.42"`` as numbers, each in (0, 1]."""
    try:
        keeps = [float(part) for part in text.split(",")]
    except ValueError:
        raise QuickmergeError(f"--keep must be numbers in (0, 1] with commas (0.2,0.42), got {text!r}") from None
    for keep in keeps:
        check_keep(keep)
    return keeps


def check_keep(keep: float) -> None:
    """Raise QuickmergeError unless ``keep`` is a share in (0, 1]."""
    if not 0 < keep <= 1:
        raise QuickmergeError(f"--keep must be a number in (0, 1], got {keep:g}")


def write_json(path: Path | None, data: Any) -> None:
    """Write results whole or not at all; None writes nothing."""
    if path is not None:
        write_file(path, data)


def check_model(name: str, asked: Sequence[Any] = ()) -> None:
    """Look at a model's folder before anything that takes seconds to import; raises what loading it would raise.

    Args:
        name: what the user gave.
        asked: the conversation that the model will be given, on which a folder's chat template is tried.
    """
    from quickmerge.models import MODELS, find_model
    from quickmerge.models.chat import try_folder

    if name in MODELS:
        return
    found = Path(find_model(name))
    if asked and found.is_dir():
        try_folder(found, asked)


def load_model(name: str) -> tuple[Any, Any]:
    """Model and tokenizer, the libraries' own chatter kept quiet."""
    quiet()
    from quickmerge.models import load

    return load(name)


def load_writer(name: str) -> tuple[Any, Any]:
    """Model and tokenizer of a command that lets the model write; what its folder asks for beyond that is told."""
    model, tokenizer = load_model(name)
    take_generation(model)
    return model, tokenizer


def take_generation(model: Any) -> None:
    """Leave out, and tell, what a model's own generation config would change unasked; before anything is written."""
    from quickmerge.models.generation import own_generation
    from quickmerge.terminal import say

    with door("the model's generation_config.json can't be used", UnsupportedModelError):
        told = own_generation(model)
    for sentence in told:
        say(sentence)


def quiet() -> None:
    """Keep transformers' bars and notices out of the output."""
    from quickmerge.models.compat import library_logging

    logging = library_logging()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def progress() -> Progress:
    """A progress bar on stderr, so that stdout stays what the command prints."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    from quickmerge.terminal import PlainColumn, Terminal

    return Progress(
        PlainColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Terminal(stderr=True),
        transient=True,
    )
