"""What the commands share that ask a vision-language model about images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quickmerge.console.answers import print_answers
from quickmerge.console.options import Alone, check_output, check_text, parse_layer, quiet, take_generation, write_json
from quickmerge.errors import QuickmergeError
from quickmerge.merge.cli.options import parse_budget, parse_reducer


def is_vlm(name: str) -> bool:
    """Whether a model reads images and text both, by its configuration alone.

    Raises:
        QuickmergeError: there is no such model.
    """
    from quickmerge.models.compat import image_text_names
    from quickmerge.models.console import transformers_silenced
    from quickmerge.models.embedded import MODELS, VISION_MODELS
    from quickmerge.models.load import find_model
    from quickmerge.models.read import read_config

    if name in MODELS or name in VISION_MODELS:
        return False
    with transformers_silenced():
        kind = read_config(find_model(name, VISION_MODELS)).model_type
    return kind in image_text_names()


def check_vlm(name: str, images: int, prompt: str) -> None:
    """As `check_model`, for a model that is asked about so many images."""
    from quickmerge.models.chat import try_folder
    from quickmerge.models.embedded import MODELS, VISION_MODELS
    from quickmerge.models.load import find_model
    from quickmerge.models.load_vision import question_on

    if name in MODELS or name in VISION_MODELS:
        return  # load_vlm says what they are
    found = Path(find_model(name, {}))
    if found.is_dir():
        try_folder(found, question_on([None] * images, prompt))


def load_vlm(name: str) -> tuple[Any, Any]:
    """Model and processor, the libraries' own chatter kept quiet."""
    from quickmerge.models.load_vision import load_vlm as load

    quiet()
    vlm, processor = load(name)
    take_generation(vlm)
    return vlm, processor


def check_needs_no_question(reducer: str) -> None:
    """Raise for a method that goes by the question about an image: a vision transformer is asked none."""
    from quickmerge.merge.reducers import VISION_REDUCERS, VISUAL_TOKEN_REDUCERS

    name = reducer.split(":")[0]
    if name in VISUAL_TOKEN_REDUCERS and name not in VISION_REDUCERS:
        raise QuickmergeError(
            f"--reducer {name} goes by a question to a language model: give a vision-language model as --model, "
            f"or one of {', '.join(VISION_REDUCERS)}"
        )


# ``quickmerge generate --image``: answer a prompt about images with fewer visual tokens.


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
    from quickmerge.datasets.images import open_image
    from quickmerge.merge.bench.answer import answer_images, clamped

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
