"""What several commands share: reading input, making reducers, writing results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quickmerge.console.ending import Alone as Alone
from quickmerge.console.ending import one_sentence as one_sentence
from quickmerge.errors import QuickmergeError, UnsupportedModelError, door, half_character, near_match
from quickmerge.files import MOST_TEXT
from quickmerge.files import check_output as check_output
from quickmerge.files import read_text as read_text
from quickmerge.files import write_json as write_file

if TYPE_CHECKING:
    from rich.progress import Progress

FEWER, CHEAPER, WRITING, OUTPUT = "Fewer tokens", "Cheaper tokens", "What is written", "Output"
"""The groups in which a command's help shows its options."""

MODEL = Annotated[str, typer.Option("--model", help="smollm2-135m, a folder, or a Hugging Face id.")]
_DTYPE_HELP = "Of the weights: float32, bfloat16, float16, int8 or auto."
DTYPE = Annotated[str, typer.Option("--dtype", help=_DTYPE_HELP)]
RARE_DTYPE = Annotated[str, typer.Option("--dtype", help=_DTYPE_HELP, hidden=True)]
REDUCER = Annotated[
    str,
    typer.Option(
        "--reducer", help="See quickmerge ls; settings follow: quickmerge:recency=0.5.", rich_help_panel=FEWER
    ),
]
REDUCERS = Annotated[
    str,
    typer.Option(
        "--reducer", help="Names with commas; settings follow: quickmerge:recency=0.5.", rich_help_panel=FEWER
    ),
]
KEEP = Annotated[float, typer.Option("--keep", help="Share of the tokens kept, in (0, 1].", rich_help_panel=FEWER)]
TOKENS = Annotated[
    int | None,
    typer.Option("--tokens", min=1, help="Tokens of an image that are kept, not --keep.", rich_help_panel=FEWER),
]
LAYER = Annotated[
    str | None,
    typer.Option("--layer", help="First block that reads fewer, or several: 8,14,20.", rich_help_panel=FEWER),
]
MIN_TOKENS = Annotated[
    int | None,
    typer.Option(
        "--min-tokens",
        min=0,
        help="Texts of fewer tokens are read in full. Default: 256.",
        rich_help_panel=FEWER,
    ),
]
_PROTECT_HELP = "literals: numbers, names and paths stay as they are."
PROTECT = Annotated[
    str | None,
    typer.Option("--protect", help=_PROTECT_HELP, rich_help_panel=FEWER),
]
RARE_PROTECT = Annotated[str | None, typer.Option("--protect", help=_PROTECT_HELP, rich_help_panel=FEWER, hidden=True)]
PRIOR = Annotated[
    str | None,
    typer.Option(
        "--prior", help="A trained prior for quickmerge: smollm2-135m, a folder, a hub id.", rich_help_panel=FEWER
    ),
]
MAX_NEW_TOKENS = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Longest answer.", rich_help_panel=WRITING)
]
SAMPLE = Annotated[bool, typer.Option("--sample", help="Sample instead of greedy decoding.", rich_help_panel=WRITING)]
TEMPERATURE = Annotated[
    float | None,
    typer.Option(
        "--temperature", min=0, metavar="T", help="Sample at this temperature; 0 is greedy.", rich_help_panel=WRITING
    ),
]
SAMPLE_SEED = Annotated[int, typer.Option("--seed", help="Of what is drawn.", rich_help_panel=WRITING)]
COMPARE = Annotated[
    bool, typer.Option("--compare", help="Answer as the model does by itself, too.", rich_help_panel=OUTPUT)
]
RAW = Annotated[
    bool, typer.Option("--raw", help="Print texts as they are, control characters too.", rich_help_panel=OUTPUT)
]
REPORT = Annotated[
    Path | None, typer.Option("--out", help="Write report.html into this folder.", rich_help_panel=OUTPUT)
]
JSON = Annotated[
    Path | None, typer.Option("--json", help="Write the results to this file as JSON.", rich_help_panel=OUTPUT)
]


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


def parse_sampling(sample: bool, temperature: float | None, seed: int) -> tuple[bool, float | None]:
    """Whether is sampled, and at which temperature, None for the model's own.

    Raises:
        QuickmergeError: one of them is out of range, or they contradict each other.
    """
    if sample and temperature == 0:
        raise QuickmergeError("--temperature must be above 0 with --sample, got 0")
    if temperature:
        from quickmerge.models.generation import check_temperature

        check_temperature("--temperature", temperature)
    if not -(2**63) <= seed < 2**63:
        raise QuickmergeError(f"--seed must be a whole number of 64 bits, got {seed}")
    return sample or bool(temperature), temperature or None


def check_protect(given: str | None) -> None:
    """Raise QuickmergeError unless ``--protect`` is literals, or left out."""
    if given not in (None, "literals"):
        raise QuickmergeError(f"--protect must be literals, got {given!r:.80}{near_match(str(given), ['literals'])}")


def told_min_tokens(given: int | None) -> dict[str, Any]:
    """``--min-tokens`` as an argument, left out where nobody gave it."""
    return {} if given is None else {"min_tokens": given}


def parse_numbers(option: str, text: str, what: str = "numbers with commas (0.2,0.42)") -> list[float]:
    """``"0.9,0.95"`` as numbers.

    Raises:
        QuickmergeError: one of them is none; the message names the ``option``, and ``what`` it must be.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise QuickmergeError(f"{option} must be {what}, got {text!r}") from None


def parse_wholes(option: str, text: str, what: str = "whole numbers with commas (4,8,11)") -> list[int]:
    """``"3,6,9"`` as whole numbers; as `parse_numbers`."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise QuickmergeError(f"{option} must be {what}, got {text!r}") from None


def parse_layer(text: str | None) -> int | list[int] | None:
    """``"8"`` is one block, ``"8,14"`` several, None the default."""
    if text is None:
        return None
    layers = parse_wholes("--layer", text, "a whole number or several with commas (8,14,20)")
    return layers[0] if len(layers) == 1 else layers


def parse_keeps(text: str) -> list[float]:
    """``--keep``: ``"0.2,0.42"`` as numbers, each in (0, 1]."""
    return parse_shares("--keep", text)


def parse_shares(option: str, text: str) -> list[float]:
    """``"0.2,0.42"`` as numbers, each in (0, 1].

    Raises:
        QuickmergeError: it is something else; the message names the option.
    """
    shares = parse_numbers(option, text, "numbers in (0, 1] with commas (0.2,0.42)")
    for share in shares:
        check_share(option, share)
    return shares


def check_keep(keep: float) -> None:
    """Raise QuickmergeError unless ``--keep`` is a share in (0, 1]."""
    check_share("--keep", keep)


def check_share(option: str, share: float) -> None:
    """Raise QuickmergeError unless an option is a share in (0, 1]."""
    if not 0 < share <= 1:
        raise QuickmergeError(f"{option} must be a number in (0, 1], got {share:g}")


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


DTYPES = ("float32", "bfloat16", "float16", "int8", "auto")
"""What ``--dtype`` may say: one of those that `quickmerge.load` takes."""


def check_dtype(given: str) -> str:
    """Give back ``--dtype``, if it is one that a command takes.

    Raises:
        QuickmergeError: it is another word.
    """
    if given not in DTYPES:
        raise QuickmergeError(
            f"--dtype must be one of {', '.join(DTYPES)}, got {given!r:.80}{near_match(given, DTYPES)}"
        )
    return given


def load_model(name: str, dtype: str = "float32") -> tuple[Any, Any]:
    """Model and tokenizer, the libraries' own chatter kept quiet; of ``"auto"`` a line says what was chosen."""
    quiet()
    from quickmerge.models import load

    return load(name, dtype=dtype)


def load_writer(name: str, dtype: str = "float32") -> tuple[Any, Any]:
    """Model and tokenizer of a command that lets the model write; what its folder asks for beyond that is told."""
    model, tokenizer = load_model(name, dtype)
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
    """Keep transformers' bars and notices out of the output, and those of torchao, which it imports where it can."""
    from logging import getLogger

    from quickmerge.models.compat import library_logging

    # That its kernels for GPUs can't be loaded without one, and what it will have to change for torch some day.
    getLogger("torchao").addFilter(_no_loading)
    getLogger("torch.utils._pytree").addFilter(_no_registering)
    logging = library_logging()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _no_loading(told: Any) -> bool:
    return "Failed to load " not in str(told.msg)


def _no_registering(told: Any) -> bool:
    return "is now natively supported" not in str(told.msg)


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
