"""The command line: ``quickmerge COMMAND``. One file a command."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from quickmerge.console.ending import Ending, end

app = typer.Typer(
    name="quickmerge",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _version(asked: bool) -> None:
    if asked:
        from quickmerge.cli.versions import versions

        print(versions())
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the versions and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error was raised, too; or set QUICKMERGE_DEBUG=1.")
    ] = False,
) -> None:
    """Make transformers predict with fewer tokens, and see what it cost."""
    Ending.debug = debug


def _register() -> None:
    from quickmerge.cli import bench, generate, ls, show, train
    from quickmerge.merge.cli import demo, plan
    from quickmerge.recognition import cli as recognition
    from quickmerge.transplant import cli as transplant

    commands: list[tuple[Any, str]] = [
        (demo, "demo"), (generate, "generate"), (bench, "bench"), (show, "show"), (recognition, "recognize"),
        (transplant, "transplant"), (plan, "plan"), (ls, "ls"),
    ]  # fmt: skip
    for module, name in commands:
        app.command(name, epilog=module.EXAMPLE)(getattr(module, name))
    app.add_typer(train.app)


_register()


def main() -> None:
    """Run the command line; anything wrong with what was given is one sentence on stderr and exit code 2."""
    end(lambda: app(prog_name="quickmerge", standalone_mode=False))
