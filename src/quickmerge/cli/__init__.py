"""The command line: ``quickmerge COMMAND``. One file a command."""

from __future__ import annotations

import sys

import typer

from quickmerge.errors import QuickmergeError

app = typer.Typer(
    name="quickmerge",
    help="Make transformers predict with fewer tokens, and see what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _register() -> None:
    from quickmerge.cli import bench, demo, generate, ls, plan, recognize, show, train, transplant

    for module in (demo, generate, bench, show, recognize, transplant, plan, ls):
        name = module.__name__.rsplit(".", 1)[1]
        app.command(name, epilog=module.EXAMPLE)(getattr(module, name))
    app.add_typer(train.app)


_register()


def main() -> None:
    """Run the command line; anything wrong with what was given is one sentence on stderr and exit code 2."""
    try:
        app()
    except QuickmergeError as error:
        print(f"quickmerge: {error}", file=sys.stderr)
        sys.exit(2)
