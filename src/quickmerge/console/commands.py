"""How commands are made: each with ``--config``; sub-commands, of which one is meant where none is named."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

from quickmerge.console.config import take_config
from quickmerge.errors import QuickmergeError

__all__ = ["Choice", "Command", "add", "choice", "with_options"]


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
