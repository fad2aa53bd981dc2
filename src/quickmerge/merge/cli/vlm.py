"""``quickmerge generate image``, and what other commands share that ask a vision-language model about images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quickmerge.console.answers import print_answers
from quickmerge.console.options import (
    COMPARE,
    FEWER,
    JSON,
    LAYER,
    MAX_NEW_TOKENS,
    RAW,
    SAMPLE,
    SAMPLE_SEED,
    TEMPERATURE,
    TOKENS,
    Alone,
    check_output,
    check_text,
    parse_layer,
    parse_sampling,
    quiet,
    take_generation,
    write_json,
)
from quickmerge.errors import QuickmergeError
from quickmerge.merge.cli.options import parse_budget, parse_reducer

IMAGE_EXAMPLE = (
    'Example: quickmerge generate image photo.jpg --model runs/vlm --reducer scope --tokens 64 --prompt "What is this?"'
)
SHARE = 0.25
"""The share of the visual tokens that is kept where nobody says."""


def is_vlm(name: str) -> bool:
    """Whether a model reads images and text both, by its configuration alone.

    Raises:
        QuickmergeError: there is no such model.
    """
    from quickmerge.models.compat import image_text_names
    from quickmerge.models.embedded import MODELS, VISION_MODELS
    from quickmerge.models.load import find_model
    from quickmerge.models.read import read_config, transformers_silenced

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


def image(
    image: Annotated[list[Path], typer.Argument(help="Images that the prompt is about.", metavar="FILES")],
    prompt: Annotated[str, typer.Option("--prompt", help="What to ask; never reduced.")],
    model: Annotated[str, typer.Option("--model", help="A vision-language model: a folder or a Hugging Face id.")],
    reducer: Annotated[
        str, typer.Option("--reducer", help="See quickmerge ls; settings follow.", rich_help_panel=FEWER)
    ] = "scope",
    keep: Annotated[
        float | None,
        typer.Option(
            "--keep",
            help=f"Share of the visual tokens kept, in (0, 1]. Default: {SHARE:g}.",
            rich_help_panel=FEWER,
        ),
    ] = None,
    tokens: TOKENS = None,
    layer: LAYER = None,
    max_new_tokens: MAX_NEW_TOKENS = 128,
    sample: SAMPLE = False,
    temperature: TEMPERATURE = None,
    seed: SAMPLE_SEED = 0,
    compare: COMPARE = False,
    raw: RAW = False,
    json: JSON = None,
) -> None:
    """Answer a prompt about images, of which a vision-language model reads fewer tokens."""
    sample, temperature = parse_sampling(sample, temperature, seed)
    check_text("--prompt", prompt)
    check_output(json)
    check_vlm(model, len(image), prompt)
    # what takes seconds to import comes after what can be told at once
    from quickmerge.datasets.images import open_image
    from quickmerge.merge.bench.answer import answer_images, clamped

    method = parse_reducer(reducer, parse_budget(keep, tokens, SHARE), "visual")
    depth = parse_layer(layer)
    pictures = [open_image(path) for path in image]
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
        "images": [path.name for path in image], **{name: found.as_dict() for name, found in results.items()},
    })  # fmt: skip
