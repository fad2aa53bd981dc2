"""``quickmerge push``: what quickmerge has saved, on the Hugging Face hub, with a card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quickmerge.console.options import OUTPUT, one_sentence, quiet
from quickmerge.errors import QuickmergeError, clean, clean_name
from quickmerge.terminal import say

EXAMPLE = "Example: quickmerge push runs/gumiho owner/name --private --results bench.json --license apache-2.0"
CARD = "What the card says"


def push(
    folder: Annotated[Path, typer.Argument(help="What quickmerge has saved: a recipe, a prior, heads, a CALM, ...")],
    repo: Annotated[str, typer.Argument(help="Where to on the hub: owner/name; made if there is none yet.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Who sees a new one. Default: as your account is set.")
    ] = None,
    message: Annotated[str | None, typer.Option("--message", help="What the history says.")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="A branch, made if need be.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose the change, do not make it.")] = False,
    results: Annotated[
        Path | None, typer.Option("--results", help="What was measured: the --json of a bench.", rich_help_panel=CARD)
    ] = None,
    command: Annotated[
        str | None, typer.Option("--command", help="What makes it again: 'quickmerge train ...'.", rich_help_panel=CARD)
    ] = None,
    license: Annotated[
        str | None, typer.Option("--license", help="Of the weights, such as apache-2.0.", rich_help_panel=CARD)
    ] = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="Hub id of the model that it is for.", rich_help_panel=CARD)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Of a recipe: tell what it does to this model.", rich_help_panel=CARD),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", min=1, help="--model: length of its prompt. Default: 4096.", rich_help_panel=CARD),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print files and card, and send nothing.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Save a folder of quickmerge's on the Hugging Face hub, with a card. It is opened first, to see it is whole."""
    quiet()
    from quickmerge.models.card import CARD as README
    from quickmerge.models.card import card_text
    from quickmerge.models.kinds import KINDS, folder_files, kind_of
    from quickmerge.models.share import push_folder

    if tokens is not None and model is None:
        raise QuickmergeError("--tokens is the length of a prompt of --model: give --model too")
    folder = folder.expanduser()
    kind = kind_of(folder) if folder.is_dir() else None
    if kind is None:
        names = ", ".join(each.name for each in KINDS.values())
        raise QuickmergeError(f"FOLDER must be one in which quickmerge has saved one of {names}, got {folder}")
    if model is not None and kind != KINDS["recipe"]:
        raise QuickmergeError(f"--model is for a recipe, whose effect on it is told, got {kind.name} in {folder}")
    with one_sentence():
        opened = _opened(folder, kind.opener)
        sections = (
            opened.hub_sections() if model is None else opened.hub_sections(_shapes(model, opened), tokens or 4096)
        )

        def card(known: Any) -> str:
            return card_text(
                folder, kind, repo, results=results, command=command, license=license, base_model=base_model,
                sections=sections, known=known,
            )  # fmt: skip

        text = card(lambda _: False)
        files = folder_files(folder, kind)
        if dry_run:
            for name in files:
                print(f"{clean_name(name)}  {(folder / name).stat().st_size:,} bytes")
            print(f"{README}:\n\n{clean(text)}", end="")
            return
        address = push_folder(
            folder, repo, kind, card, private=private, commit_message=message, revision=revision, create_pr=create_pr
        )
    say(f"sent {kind.name}: {len(files)} {'file' if len(files) == 1 else 'files'} and a card")
    print(clean_name(address))


def _opened(folder: Path, name: str) -> Any:
    """What the folder holds, opened as anybody would who fetches it: what can't be opened is not worth sending."""
    import importlib

    place, _, name = f"quickmerge.{name}".rpartition(".")
    if name == "CalmForCausalLM":
        from quickmerge.calm import load_calm

        return load_calm(folder)[0]
    opener = getattr(importlib.import_module(place), name)
    return opener.from_pretrained(folder)


def _shapes(model: str, recipe: Any) -> Any:
    from quickmerge.recipe.cli import load_for

    return load_for(model, recipe, shapes=True)
