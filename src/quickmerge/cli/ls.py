"""``quickmerge ls``: what there is."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quickmerge.console.options import JSON, check_output, write_json
from quickmerge.errors import QuickmergeError

if TYPE_CHECKING:
    from quickmerge.terminal import Terminal

EXAMPLE = "Example: quickmerge ls --json inventory.json"


WHAT = Annotated[
    str | None, typer.Argument(metavar="[models]", help="models: the families of language models and what was proven.")
]


def ls(what: WHAT = None, json: JSON = None) -> None:
    """List the reducers, methods for the cache, the models that work, and the priors and draft heads that ship."""
    if what == "models":
        return models(json)
    if what is not None:
        raise QuickmergeError(f"what to list must be models, or be left out, got {what!r}")
    from rich.table import Table

    from quickmerge.data import GUMIHOS, PRIORS
    from quickmerge.merge.cache import EVICTORS
    from quickmerge.merge.reducers import PLACES, DynamicViT
    from quickmerge.models import MODELS, VISION_MODELS
    from quickmerge.models.embedded import SENTENCE_MODELS
    from quickmerge.models.encoder import VISION_FAMILIES
    from quickmerge.models.families import proven, rows
    from quickmerge.models.vlm import VLM_FAMILIES
    from quickmerge.terminal import Terminal, plain

    found: list[tuple[str, str, Any]] = [(place, *item) for place, table in PLACES.items() for item in table.items()]
    found += [("cache", *item) for item in EVICTORS.items()]
    reducers = [
        {
            "name": name,
            "place": place,
            "about": (cls.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ").replace("``", ""),
            "source": cls.source,
            "settings": {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING},
        }
        for place, name, cls in found
    ]
    check_output(json)
    console = Terminal()
    for place, title in (
        ("text", "Reducers for language models"),
        ("vision", "Reducers for vision transformers"),
        ("visual", "Further reducers for the visual tokens of a language model"),
        ("cache", "Methods for the cache of a language model (--cache)"),
    ):
        table = Table("reducer", "what it does", "settings (defaults)", "source", title=title, show_lines=True)
        for r in reducers:
            further = place == "visual" and r["name"] in PLACES["vision"]
            if r["place"] == place and not further:
                settings = ", ".join(f"{k}={v}" for k, v in r["settings"].items())
                table.add_row(plain(r["name"], "bold"), " ".join(str(r["about"]).split()), settings, str(r["source"]))
        console.print(table)
    console.print(f"  and {DynamicViT.name} ({DynamicViT.source}), which quickmerge train dynamicvit trains")
    texts = proven("prefix")
    for names, families in ((MODELS, texts), (VISION_MODELS, VISION_FAMILIES)):
        _tell(console, "Models", ", ".join(names) + ", or any folder or Hugging Face id of these families:")
        console.print("  " + ", ".join(families))
    console.print(f"  quickmerge ls models tells more of {len(rows())} families of language models")
    _tell(console, "Vision-language models", "any folder or Hugging Face id of these families:")
    console.print("  " + ", ".join(VLM_FAMILIES))
    _tell(console, "Recognizers", "any folder that train recognizer wrote; compared by meaning with "
          + ", ".join(SENTENCE_MODELS))  # fmt: skip
    _tell(console, "Trained priors", "(--prior) " + ", ".join(PRIORS) + ", or any folder that train prior wrote")
    drafters = ["lookup", "suffix", *GUMIHOS]
    _tell(console, "Drafters", "(--drafter) " + ", ".join(drafters) + ", or any folder that train gumiho wrote")
    write_json(json, {
        "reducers": reducers, "models": [*MODELS, *VISION_MODELS, *SENTENCE_MODELS],
        "families": [*texts, *VISION_FAMILIES, *VLM_FAMILIES], "priors": list(PRIORS),
        "drafters": drafters,
    })  # fmt: skip


def models(json: JSON = None) -> None:
    """Print what was proven of every family of language models that transformers registers."""
    from rich.table import Table

    from quickmerge.models.families import CAPABILITIES, WORKS, proven, rows
    from quickmerge.terminal import Terminal, plain

    check_output(json)
    families, console = rows(), Terminal()
    table = Table(
        "family", *CAPABILITIES, title="Language models: what was proven on a tiny random model of each family"
    )
    for family, cells in families.items():
        table.add_row(plain(family, "bold"), *(cells.get(capability, "") for capability in CAPABILITIES))
    console.print(table)
    counts = ", ".join(f"{capability} works for {len(proven(capability))}" for capability in CAPABILITIES)
    console.print(f"Of {len(families)} families {counts}. {WORKS.capitalize()}: every law held; else the trait that is "
                  "the reason. A family that is not listed is served if it is built like one that is.")  # fmt: skip
    write_json(json, {"models": families})


def _tell(console: Terminal, what: str, text: str) -> None:
    from rich.text import Text

    console.print(Text.assemble((what, "bold"), ": ", text))
