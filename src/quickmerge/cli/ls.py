"""``quickmerge ls``: what there is."""

from __future__ import annotations

import dataclasses

from quickmerge.cli.common import JSON, check_output, write_json

EXAMPLE = "Example: quickmerge ls --json inventory.json"


def ls(json: JSON = None) -> None:
    """List the reducers, the models that work and the priors that ship."""
    from rich.console import Console
    from rich.table import Table

    from quickmerge.data import PRIORS
    from quickmerge.hosts import FAMILIES
    from quickmerge.models import MODELS
    from quickmerge.reducers import REDUCERS

    reducers = [
        {
            "name": name,
            "about": (cls.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ").replace("``", ""),
            "source": cls.source,
            "settings": {f.name: f.default for f in dataclasses.fields(cls)},
        }
        for name, cls in REDUCERS.items()
    ]
    check_output(json)
    console = Console()
    table = Table("reducer", "what it does", "settings (defaults)", "source", title="Reducers", show_lines=True)
    for r in reducers:
        settings = ", ".join(f"{k}={v}" for k, v in r["settings"].items())  # type: ignore[attr-defined]
        table.add_row(f"[bold]{r['name']}[/]", " ".join(str(r["about"]).split()), settings, str(r["source"]))
    console.print(table)
    console.print("[bold]Models[/]: " + ", ".join(MODELS) + ", or any folder or Hugging Face id of these families:")
    console.print("  " + ", ".join(FAMILIES))
    console.print("[bold]Trained priors[/] (--prior): " + ", ".join(PRIORS) + ", or any folder that train prior wrote")
    write_json(json, {"reducers": reducers, "models": list(MODELS), "families": list(FAMILIES), "priors": list(PRIORS)})
