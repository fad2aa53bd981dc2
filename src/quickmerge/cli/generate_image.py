"""``quickmerge generate --image``: answer a prompt about images with fewer visual tokens."""

from __future__ import annotations

from pathlib import Path

from quickmerge.cli.answers import print_answers
from quickmerge.cli.common import Alone, check_output, check_text, parse_budget, parse_layer, parse_reducer, write_json
from quickmerge.cli.vlm import check_vlm, load_vlm
from quickmerge.errors import QuickmergeError

KEEP = 0.25
"""The share of the visual tokens that is kept where nobody says."""


def generate_image(
    images: list[Path],
    prompt: str,
    model: str | None,
    reducer: str,
    keep: float | None,
    tokens: int | None,
    layer: str | None,
    *,
    max_new_tokens: int,
    sample: bool,
    temperature: float | None,
    seed: int,
    compare: bool,
    raw: bool,
    json: Path | None,
) -> None:
    """Print the answer, and on stderr what was read and what it cost."""
    if model is None:
        raise QuickmergeError(
            "--model must be a vision-language model with --image, such as train vlm writes, got none"
        )
    check_text("--prompt", prompt)
    check_output(json)
    check_vlm(model, len(images), prompt)
    # what takes seconds to import comes after what can be told at once
    from quickmerge.evaluation.answer_images import answer_images, clamped
    from quickmerge.training.data.images import open_image

    method = parse_reducer(reducer, parse_budget(keep, tokens, KEEP), "visual")
    depth = parse_layer(layer)
    pictures = [open_image(path) for path in images]
    vlm, processor = load_vlm(model)
    results = print_answers(
        method, compare,
        lambda way: answer_images(
            vlm, processor, pictures, prompt, way, depth, max_new_tokens=max_new_tokens, sample=sample,
            temperature=temperature, seed=seed,
        ),
        lambda found: None if tokens is None else clamped(tokens, found.visual), raw=raw,
        alone=Alone.asked(vlm, processor, pictures[0]),
    )  # fmt: skip
    write_json(json, {
        "model": model, "reducer": method.label, "keep": keep, "tokens": tokens, "prompt": prompt,
        "images": [path.name for path in images], **{name: found.as_dict() for name, found in results.items()},
    })  # fmt: skip
