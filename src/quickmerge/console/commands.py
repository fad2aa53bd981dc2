"""How commands are made: each with ``--config``, a file that stands for its options, and sub-commands."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

from quickmerge.errors import QuickmergeError, clean_name, near_match
from quickmerge.files import read_settings

__all__ = ["NONE", "Choice", "Command", "add", "choice", "take_config", "with_options"]


NONE = "none"
"""What is written on the command line for a setting that shall be left out, where that is not its default."""
OWN = ("config", "help", "help_all")
"""Options that no file holds."""


def take_config(context: typer.Context, path: Path | None) -> Path | None:
    """Put what a file says in the place of the defaults of a command's options.

    Raises:
        QuickmergeError: the file can't be read, or a setting is unknown or not what the option takes.
    """
    if path is not None and not context.resilient_parsing:
        context.default_map = _values(context, path)
    return path


def _values(context: typer.Context, path: Path) -> dict[str, Any]:
    """The file's settings by the names of the command's parameters, each checked as if it had been typed."""
    known = {_key(param): param for param in context.command.params if param.name not in OWN}
    found: dict[str, Any] = {}
    for name, value in read_settings(path).items():
        param: Any = known.get(name.replace("-", "_"))
        if param is None:
            told = near_match(name, known) or f": {context.command_path} knows {', '.join(known)}"
            raise QuickmergeError(f"{path} holds an unknown setting {name!r}{told}")
        typed = _typed(param, value, f"{path}: {name}")
        if typed is None:
            continue
        try:
            param.process_value(context, typed)
        except Exception as error:
            if isinstance(error, QuickmergeError) or not hasattr(error, "format_message"):
                raise
            raise QuickmergeError(f"{path}: {clean_name(error.format_message()).rstrip('.')}") from None
        found[str(param.name)] = typed
    return found


def _key(param: Any) -> str:
    """What a parameter is called in a file: as its option, with underscores."""
    spelled = param.opts[0] if param.param_type_name == "option" else param.name
    return str(spelled).lstrip("-").replace("-", "_")


def _typed(param: Any, value: Any, where: str) -> Any:
    """A value as the command line would have given it; None for one that says nothing."""
    if getattr(param, "is_flag", False):
        if value is not None and not isinstance(value, bool):
            raise QuickmergeError(f"{where} must be true or false, got {value!r}")
        return value
    parts = value if isinstance(value, list) else [value]
    if any(isinstance(part, (dict, list, bool)) for part in parts):
        raise QuickmergeError(f"{where} must be a number, a text, or a list of them")
    if value is None:
        return NONE if NONE in str(param.metavar or "") else None
    words = [part if isinstance(part, str) else repr(part) for part in parts]
    return words if param.nargs != 1 or getattr(param, "multiple", False) else ",".join(words)


# Commands, and sub-commands of which one is meant where none is named.


class Command(TyperCommand):
    """A command whose arguments may be written as options too: ``show text a.txt`` and ``show text --file a.txt``.

    An option that it has not, and a sub-command beside it has, is an error that names that one.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        for param in self.params:
            if getattr(param, "min", None) is not None and not param.metavar:
                param.metavar = "N"  # what "int range [x>=1]" takes of a line, the help lacks

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read what was given.

        Raises:
            QuickmergeError: an option belongs to another sub-command.
        """
        words = {_word(param) for param in self.params if param.param_type_name == "argument"}
        try:
            return super().parse_args(ctx, list(_without(words, args)))
        except Exception as error:
            option = getattr(error, "option_name", None)
            others = [] if option is None else self._siblings_with(ctx, option.partition("=")[0])
            if others:
                raise QuickmergeError(
                    f"{ctx.command_path} has no option {option}: it belongs to {' and '.join(others)}"
                ) from None
            raise

    def _siblings_with(self, ctx: Any, option: str) -> list[str]:
        """The sub-commands beside this one that have an option, or an argument of that name."""
        group = None if ctx.parent is None else ctx.parent.command
        if not isinstance(group, Choice):
            return []
        return [
            f"{ctx.parent.command_path} {name}"
            for name, other in group.commands.items()
            if other is not self and any(option in (*param.opts, _word(param)) for param in other.params)
        ]


def _word(argument: Any) -> str:
    return "--" + str(argument.name).replace("_", "-")


def _without(words: set[str], args: Sequence[str]) -> list[str]:
    """The arguments of a command, without the options that only say what the next of them is."""
    kept: list[str] = []
    for place, arg in enumerate(args):
        if arg == "--":
            return [*kept, *args[place:]]
        word, equals, value = arg.partition("=")
        if word in words:
            if not equals and (place + 1 == len(args) or args[place + 1].startswith("--")):
                raise QuickmergeError(f"{word} must be followed by a value, got none")
            kept += [value] if equals else []
        else:
            kept.append(arg)
    return kept


class Choice(TyperGroup):
    """A group in which options without a sub-command mean one: that of the first sign among them, or the usual one."""

    usual: ClassVar[str]
    signs: ClassVar[dict[str, str]]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read what was given, with the sub-command put in front where it is left out."""
        if not args and not ctx.resilient_parsing:
            ctx.fail(f"Name what is meant: {ctx.command_path} {' or '.join(self.commands)}.")
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names:
            words = [arg.partition("=")[0] for arg in args]
            args = [next((self.signs[word] for word in words if word in self.signs), self.usual), *args]
        return super().parse_args(ctx, args)


def choice(name: str, usual: str, **signs: str) -> typer.Typer:
    """An app of sub-commands.

    Args:
        name: of the command.
        usual: the sub-command that is meant where none is named.
        signs: further ones, by the option without its dashes that says that they are meant.
    """
    made = type("Choice", (Choice,), {"usual": usual, "signs": {f"--{option}": sub for option, sub in signs.items()}})
    return typer.Typer(name=name, cls=made)


def add(app: typer.Typer, name: str, function: Callable[..., None], example: str) -> None:
    """Add a command to an app, with ``--config``, and ``--help-all`` where some options are hidden.

    Args:
        app: of the whole program, or one of sub-commands.
        name: what the command is called.
        function: does it; its docstring is the help.
        example: stands below the help.
    """
    hidden = [each for each in inspect.signature(function, eval_str=True).parameters.values() if _is_hidden(each)]
    more = [inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=CONFIG)]
    if hidden:
        told = f"Show the other {len(hidden)} options too."
        option = typer.Option("--help-all", is_eager=True, callback=_show_all, help=told)
        more.append(
            inspect.Parameter(
                "help_all", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option]
            )
        )

    def run(**options: Any) -> None:
        for parameter in more:
            options.pop(parameter.name)
        function(**options)

    app.command(name, epilog=example, cls=Command)(with_options(function, run, more))


CONFIG = Annotated[
    Path | None,
    typer.Option("--config", is_eager=True, callback=take_config, help="Options from this file: YAML, TOML or JSON."),
]


def with_options(
    function: Callable[..., None],
    run: Callable[..., None],
    more: Sequence[inspect.Parameter],
    *,
    place: str | None = None,
) -> Callable[..., None]:
    """A function as typer reads it: with the parameters of another, and more.

    Args:
        function: whose name, docstring and parameters it has.
        run: what it does.
        more: further parameters.
        place: the parameter in whose place they stand; None puts them last.
    """
    own = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in
           inspect.signature(function, eval_str=True).parameters.values()]  # fmt: skip
    at = len(own) if place is None else [each.name for each in own].index(place)
    parameters = [*own[:at], *more, *own[at if place is None else at + 1 :]]

    @wraps(function)
    def command(**options: Any) -> None:
        run(**options)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


def _is_hidden(parameter: inspect.Parameter) -> bool:
    """Whether only ``--help-all`` shows an option; one without help is shown by neither."""
    told = getattr(parameter.annotation, "__metadata__", ())
    return any(getattr(info, "hidden", False) and bool(info.help) for info in told)


def _show_all(context: typer.Context, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        for parameter in context.command.params:
            if getattr(parameter, "help", None):
                parameter.hidden = False  # type: ignore[attr-defined]
        print(context.get_help())
        raise typer.Exit()
