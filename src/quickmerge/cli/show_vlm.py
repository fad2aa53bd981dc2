"""``quickmerge show --image --model VLM``: which visual tokens a language model was given, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickmerge.cli.common import Alone, check_text, one_sentence, parse_reducer, write_json
from quickmerge.cli.vlm import load_vlm
from quickmerge.errors import QuickmergeError
from quickmerge.printable import clean_name

if TYPE_CHECKING:
    from PIL import Image

    from quickmerge.tokens.budget import Budget

PROMPT = "Describe the image."
"""What is asked where nobody says; it matters to methods that go by the question."""


def show_tokens(
    photo: Image.Image,
    name: str,
    model: str,
    reducer: str,
    budget: float | Budget,
    layer: Any,
    prompt: str | None,
    picture: Path,
    json: Path | None,
) -> None:
    """Paint an image by what became of its tokens in front of a language model, or inside it with ``layer``."""
    from quickmerge.cli.show_vision import stage_data
    from quickmerge.report import merged_picture, write_picture
    from quickmerge.report.collect_visual import visual_stage
    from quickmerge.terminal import Terminal

    method = parse_reducer(reducer, budget, "visual")
    vlm, processor = load_vlm(model)
    question = PROMPT if prompt is None else check_text("--prompt", prompt)
    with Terminal(stderr=True).status("looking"), one_sentence(Alone.asked(vlm, processor, photo)):
        seen, stage, stats = visual_stage(vlm, processor, photo, question, method, layer)
    if stage is None:
        raise QuickmergeError(
            "nothing was merged: --keep must be below 1, or --tokens below the tokens that the image has, "
            f"got {budget!r}"
        )
    asked = f": {question}" if "text" in method.asks else ""
    write_picture(merged_picture(seen, stage, title=f"{clean_name(name)}, {reducer}{asked}"), picture)
    print(stats)
    print(f"wrote {clean_name(picture)}")
    write_json(json, {
        "file": name, "model": model, "reducer": reducer, "prompt": question, "stages": [stage_data(stage)],
        **stats.as_dict(),
    })  # fmt: skip
