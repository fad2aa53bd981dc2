"""``quickmerge export``: draft heads in the layouts of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quickmerge.console.options import MODEL, check_output, load_writer, one_sentence, quiet
from quickmerge.errors import QuickmergeError, clean_name, near_match
from quickmerge.terminal import say

if TYPE_CHECKING:
    from quickmerge.speculative.gumiho import Gumiho

__all__ = ["EAGLE_EXAMPLE", "PUBLISHED_EXAMPLE", "eagle", "published"]

EAGLE_EXAMPLE = (
    "Example: quickmerge export eagle --heads smollm2-135m --model smollm2-135m --out runs/eagle; then in vLLM: "
    '--speculative-config \'{"method": "eagle", "model": "runs/eagle", "num_speculative_tokens": 2}\''
)
PUBLISHED_EXAMPLE = "Example: quickmerge export gumiho --heads runs/gumiho --model smollm2-135m --out runs/published"
DTYPES = ("float32", "float16", "bfloat16")

HEADS = Annotated[
    str,
    typer.Option(
        "--heads",
        help="smollm2-135m (shipped), a folder of train gumiho, or one of the public repository (pytorch_model.bin).",
    ),
]
OUT = Annotated[Path, typer.Option("--out", help="Folder to write.")]


def eagle(
    out: OUT,
    heads: HEADS = "smollm2-135m",
    model: MODEL = "smollm2-135m",
    dtype: Annotated[str, typer.Option("--dtype", help="Of the stored weights: float32, float16 or bfloat16.")] = (
        "float32"
    ),
) -> None:
    """Write the serial part of draft heads as an EAGLE drafter, which vLLM loads as it is."""
    if dtype not in DTYPES:
        raise QuickmergeError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}{near_match(dtype, DTYPES)}")
    lm, drafts = _load(heads, model, out)
    import torch

    from quickmerge.speculative.gumiho.eagle import write_eagle

    with one_sentence():
        folder = write_eagle(drafts, lm, out, getattr(torch, dtype))
    left = f"; its {drafts.config.heads} parallel heads have no place in it" if drafts.config.heads else ""
    say(f"{clean_name(folder)}: an EAGLE drafter of {drafts.config.serial_layers} layer(s) in {dtype}{left}")


def published(out: OUT, heads: HEADS = "smollm2-135m", model: MODEL = "smollm2-135m") -> None:
    """Write draft heads in the layout of the checkpoints that were published with Gumiho."""
    lm, drafts = _load(heads, model, out)
    from quickmerge.speculative.gumiho.published import FILE, write_published

    with one_sentence():
        folder = write_published(drafts, lm, out)
    say(
        f"{clean_name(folder / FILE)}: {drafts.config.serial_layers} serial layer(s), "
        f"{drafts.config.heads} parallel heads"
    )


def _load(heads: str, model: str, out: Path) -> tuple[Any, Gumiho]:
    check_output(out / "config.json")
    quiet()
    from quickmerge.data import GUMIHOS, shipped_gumiho
    from quickmerge.speculative.gumiho import Gumiho
    from quickmerge.speculative.gumiho.published import is_published, read_published

    folder = shipped_gumiho(heads) if heads in GUMIHOS else Path(heads).expanduser()
    assert folder is not None
    with one_sentence():
        ours = None if is_published(folder) else Gumiho.from_pretrained(folder)
        lm, _ = load_writer(model)
        return lm, read_published(folder, lm) if ours is None else ours
