"""What the train commands share: the options that `TrainingConfig` makes, and how a run's end is told."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from quickmerge.console.commands import NONE, with_options
from quickmerge.console.options import one_sentence, parse_numbers
from quickmerge.errors import QuickmergeError, clean_name
from quickmerge.terminal import say
from quickmerge.training.config import TrainingConfig, check_trackers

if TYPE_CHECKING:
    from quickmerge.training import TrainingResult

__all__ = ["ALIGN", "OUT", "TRAINING", "Training", "make_config", "reads_once", "tell", "text_documents", "trains"]

TRAINING = "Training"
"""The group in which a command's help shows these options."""

OUT = Annotated[Path, typer.Option("--out", help="Folder for the result, checkpoints and metrics.")]
ALIGN = Annotated[
    int,
    typer.Option("--align", help="Images by which the projector is first fitted to words in boxes.", hidden=True),
]
USUAL = {"steps": 1000, "batch": 4, "learning_rate": 1e-3, "warmup": 30, "save_every": 100}
"""Settings of a training whose command has no others."""
SHOWN = ("steps", "batch", "learning_rate", "precision", "seed", "save_every", "max_minutes", "log_with")
"""Settings that ``--help`` shows; the others are in ``--help-all``."""


@dataclass(frozen=True)
class Training:
    """What the options of a training command say.

    Args:
        usual: the command's own defaults.
        given: settings that were given, on the command line or in a file.
        typed: those of them that were given on the command line.
        resume: go on from the newest checkpoint.
    """

    usual: Mapping[str, Any]
    given: Mapping[str, Any]
    typed: Mapping[str, Any]
    resume: bool

    @property
    def config(self) -> TrainingConfig:
        """The settings of the run.

        Raises:
            QuickmergeError: one of them is not allowed.
        """
        return make_config(self.usual, self.given)


def make_config(usual: Mapping[str, Any], given: Mapping[str, Any]) -> TrainingConfig:
    """The settings of a run; the usual warm-up is no longer than the run.

    Args:
        usual: settings where nothing else was said.
        given: what was.

    Raises:
        QuickmergeError: one of them is not allowed.
    """
    settings = {**usual, **given}
    if "warmup" not in given and isinstance(settings["steps"], int):
        settings["warmup"] = max(0, min(settings.get("warmup", 0), settings["steps"]))
    with one_sentence():
        config = TrainingConfig(**settings)
    check_trackers(config)  # before hours of reading, and again where the run begins
    return config


def trains(**usual: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for every setting of `TrainingConfig`, and ``--resume``, as its argument ``training``.

    Args:
        usual: the command's defaults, where they are not those of `USUAL` or of `TrainingConfig`.
    """
    usual = {**USUAL, **usual}
    hints = get_type_hints(TrainingConfig)
    helps = _helps()
    kinds = {
        field.name: _Kind(hints[field.name], usual.get(field.name, field.default)) for field in fields(TrainingConfig)
    }
    options = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=kind.shown,
            annotation=Annotated[kind.type, typer.Option(
                "--" + name.replace("_", "-"), help=helps.get(name), metavar=kind.metavar, hidden=name not in SHOWN,
                rich_help_panel=TRAINING,
            )],
        )
        for name, kind in kinds.items()
    ]  # fmt: skip
    resume = typer.Option("--resume", help="Go on from the newest checkpoint in --out.", rich_help_panel=TRAINING)
    options.append(
        inspect.Parameter("resume", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, resume])
    )
    asking = inspect.Parameter("context_", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def run(context_: typer.Context, **given: Any) -> None:
            sources = {name: str(getattr(context_.get_parameter_source(name), "name", "DEFAULT")) for name in kinds}
            values = {name: given.pop(name) for name in kinds}
            said = {name: kinds[name].value(name, values[name]) for name in kinds if sources[name] != "DEFAULT"}
            typed = {name: value for name, value in said.items() if sources[name] == "COMMANDLINE"}
            function(training=Training(usual, said, typed, given.pop("resume")), **given)

        return with_options(function, run, [*options, asking], place="training")

    return decorate


class _Kind:
    """How a setting is written on the command line.

    Args:
        hint: its type.
        default: what it is where nobody says.
    """

    def __init__(self, hint: Any, default: Any) -> None:
        self.several = "tuple" in str(hint)
        self.optional = default is not None and type(None) in getattr(hint, "__args__", ())
        self.type: Any = str if self.several or self.optional else hint
        self.metavar = "numbers" if self.several else f"number|{NONE}" if self.optional else None
        self.shown = ",".join(map(repr, default)) if self.several else str(default) if self.optional else default

    def value(self, name: str, given: Any) -> Any:
        """What was written, as `TrainingConfig` takes it."""
        option = "--" + name.replace("_", "-")
        if self.several:
            return tuple(parse_numbers(option, given, "numbers with commas (0.9,0.999)"))
        if not self.optional:
            return given
        if given == NONE:
            return None
        try:
            return float(given)
        except ValueError:
            raise QuickmergeError(f"{option} must be a number or {NONE}, got {given!r}") from None


def _helps() -> dict[str, str]:
    """What the docstring of `TrainingConfig` says of each setting, up to the first semicolon."""
    told = inspect.getdoc(TrainingConfig) or ""
    found = re.findall(r"^    (\w+): (.+?)(?=\n    \w+: |\n\n|\Z)", told, flags=re.M | re.S)
    clear = {name: " ".join(text.split()).split(";")[0].replace("`", "").replace('"', "") for name, text in found}
    return {name: text[0].upper() + text[1:].rstrip(".") + "." for name, text in clear.items()}


def text_documents(paths: Sequence[Path], column: str | None) -> Any:
    """The texts that ``--data`` names, as files or as rows of a dataset on disk.

    Raises:
        QuickmergeError: there are none, or something else is there.
    """
    from quickmerge.datasets import find_data, from_disk

    found = find_data(paths)
    documents: Any = from_disk(found.files, column) if found.kind == "dataset" else found.files
    kind = documents.kind if found.kind == "dataset" else found.kind
    if kind != "text":
        raise QuickmergeError(f"--data must name texts, got {kind}")
    return documents


SHARE_OF_MEMORY = 0.5
"""Of the memory that is free, so much may go into features; the training needs some too."""


def reads_once(
    wanted: bool | None,
    what: str,
    items: int,
    need: Callable[[], int],
    *,
    looks: int,
    folder: Path | None = None,
) -> bool:
    """Whether features are read once and kept: where that is asked for, or fits into memory and saves something.

    What is decided is told, with what it takes.

    Args:
        wanted: what ``--keep-features`` or ``--read-again`` says; None: where it fits, and items come twice.
        what: has the features, in the plural.
        items: how many of them there are.
        need: bytes that the features of all take; asked where it matters.
        looks: items that the training will look at in all.
        folder: they are kept there, and not in memory.

    Raises:
        QuickmergeError: it is asked for, and there is not the memory.
    """
    if folder is None and (wanted is False or (wanted is None and looks <= items)):
        return False
    import psutil  # type: ignore[import-untyped]

    bytes_, free = need(), int(SHARE_OF_MEMORY * psutil.virtual_memory().available)
    size = f"the features of {items} {what} take {bytes_ / 2**30:.2f} GiB"
    if folder is None and bytes_ > free:
        if wanted:
            raise QuickmergeError(f"--keep-features can't be used: {size}, and {free / 2**30:.2f} GiB may be used")
        say(f"{size}, more than the {free / 2**30:.2f} GiB that may be used: {what} are read in every step")
        return False
    say(f"{size} {'of memory' if folder is None else f'in {folder}'}: read once")
    return True


def tell(result: TrainingResult, out: Path) -> None:
    """Say what a run has left."""
    told = "wrote" if result.finished else f"stopped after step {result.steps}; go on with --resume:"
    print(f"{told} {clean_name(out)}")
