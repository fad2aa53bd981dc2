"""``quickmerge show --image`` and ``--video``: which patches became one token, as a picture."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickmerge.console.options import (
    Alone,
    check_keep,
    check_output,
    check_text,
    one_sentence,
    parse_layer,
    quiet,
    write_json,
)
from quickmerge.errors import QuickmergeError, clean_name
from quickmerge.merge.cli.options import parse_budget, parse_reducer
from quickmerge.merge.cli.vlm import load_vlm

if TYPE_CHECKING:
    from PIL import Image

    from quickmerge.merge.tokens.budget import Budget

MODEL = "vit-small-14"
KEEP = 0.4
"""The share that is kept where nobody says."""
PICTURES = (".png", ".webp")
ANIMATIONS = (".gif", ".webp")


def show_image(
    file: Path, model: str, reducer: str, keep: float | None, tokens: int | None, remove: str | None, layer: str | None,
    prompt: str | None, picture: Path | None, json: Path | None,
) -> None:  # fmt: skip
    """Paint the patches of an image by the token that they became, in the order of the choice where there is one."""
    from quickmerge.datasets.images import open_image
    from quickmerge.datasets.labelled import PixelFormat
    from quickmerge.merge.cli.vlm import check_needs_no_question, is_vlm
    from quickmerge.merge.collect import as_picture, patch_stages
    from quickmerge.models import load_vision
    from quickmerge.models.encoder import find_encoder
    from quickmerge.terminal import Terminal
    from quickmerge.viz.patchmap_sheet import merged_picture
    from quickmerge.viz.patchmap_video import write_picture

    picture = picture or Path(f"{file.stem}-{reducer.split(':')[0]}.png")
    _check_suffix("--picture", picture, PICTURES)
    check_output(json, picture)
    budget, where, photo = parse_budget(keep, tokens, KEEP), _where(remove, layer, tokens), open_image(file)
    if is_vlm(model):
        pass

        if remove is not None:
            raise QuickmergeError(f"--remove is for vision transformers: leave it out for {model}")
        show_tokens(photo, file.name, model, reducer, budget, where, prompt, picture, json)
        return
    if prompt is not None:
        raise QuickmergeError(f"--prompt is for vision-language models: leave it out for {model}")
    check_needs_no_question(reducer)
    share = KEEP if keep is None else keep
    method = parse_reducer(reducer, share, "vision")
    quiet()
    encoder, processor = load_vision(model)
    with Terminal(stderr=True).status("looking"), one_sentence(Alone.seeing(encoder, processor, photo)):
        form = PixelFormat.of(processor)
        pixels = processor([photo], return_tensors="pt")["pixel_values"]
        blocks = find_encoder(encoder)
        if tokens is not None:
            share = _share(tokens, math.prod(blocks.grid(pixels)))
            method = replace(method, keep=share)
        if where is None and (method.once or tokens is not None):
            where = max(0, len(blocks) - 2)  # SCOPE prunes by what the last block but one gives
        stages, stats = patch_stages(encoder, pixels, method, where)
    if not stages:
        raise QuickmergeError(
            f"nothing was merged: --keep must be below 1 or --remove above 0, got {share:g}, {remove}"
        )
    seen = as_picture(pixels[0], form)
    write_picture(merged_picture(seen, stages, title=f"{clean_name(file.name)}, {reducer}"), picture)
    print(stats)
    print(f"wrote {clean_name(picture)}")
    _write(json, file, model, reducer, share, remove, stages, stats.as_dict())


def _share(tokens: int, patches: int) -> float:
    """So many tokens as a share of an image's patches."""
    if tokens >= patches:
        raise QuickmergeError(f"--tokens must be below the {patches} patches of the image, got {tokens}")
    return tokens / patches


def show_video(
    file: Path, model: str, reducer: str, keep: float, frames: int, stride: int, picture: Path | None,
    animation: Path | None, json: Path | None,
) -> None:  # fmt: skip
    """Paint the patches of a video's frames by the token that they became, across time."""
    from PIL import Image

    from quickmerge.datasets import VideoClips
    from quickmerge.datasets.labelled import PixelFormat
    from quickmerge.merge.collect import as_picture, frame_stage
    from quickmerge.merge.reducers.pooling import GridMerge
    from quickmerge.models import load_vision
    from quickmerge.terminal import Terminal
    from quickmerge.viz.patchmap_video import video_animation, video_strip, write_picture

    picture = picture or Path(f"{file.stem}-{reducer.split(':')[0]}.png")
    _check_suffix("--picture", picture, PICTURES)
    if animation is not None:
        _check_suffix("--animation", animation, ANIMATIONS)
    check_output(json, picture, animation)
    check_keep(keep)
    across = GridMerge(keep=keep) if reducer == "grid" else parse_reducer(reducer, keep, "vision")
    if not file.is_file():
        raise QuickmergeError(f"{file} can't be read: there is no such file")
    quiet()
    encoder, processor = load_vision(model)
    grey = Image.new("RGB", (64, 64), "grey")
    with Terminal(stderr=True).status("looking"), one_sentence(Alone.seeing(encoder, processor, grey)):
        form = PixelFormat.of(processor)
        pixels = form.standardised(VideoClips([file], (form.height, form.width), frames, stride)[0])[None]
        stage = frame_stage(encoder, pixels, across)
    seen = [as_picture(frame, form) for frame in pixels[0]]
    total = stage.groups.size
    print(f"{across!r}: {stage.tokens} of {total} tokens left of {frames} frames")
    write_picture(video_strip(seen, stage, title=f"{clean_name(file.name)}, {reducer}"), picture)
    print(f"wrote {clean_name(picture)}")
    if animation is not None:
        video_animation(seen, stage, animation)
        print(f"wrote {clean_name(animation)}")
    _write(json, file, model, reducer, keep, None, [stage], {"tokens_in": total, "tokens_out": stage.tokens})


def _where(remove: str | None, layer: str | None, tokens: int | None) -> Any:
    """``--remove``, ``--layer`` or neither, as `quickmerge.reduce` takes it."""
    if remove is not None and tokens is not None:
        raise QuickmergeError("give either --remove or --tokens, got both")
    if remove is None:
        return parse_layer(layer)
    if layer is not None:
        raise QuickmergeError("give either --remove or --layer, got both")
    return parse_removal(remove)


def parse_removal(text: str) -> Any:
    """``"13"`` is constant, ``"13:-1"`` falls from 26 to 0, ``"20,20,10"`` is a number for each block."""
    from quickmerge.merge.tokens.removal import Removal

    number, colon, inflection = text.partition(":")
    try:
        numbers = [int(part) for part in number.split(",")]
        bend = float(inflection) if colon else 0.0
    except ValueError:
        raise QuickmergeError(
            f"--remove must be tokens per block (13), with an inflection (13:-1) or listed (20,20,10), got {text!r}"
        ) from None
    with one_sentence():
        return Removal(numbers[0] if len(numbers) == 1 else tuple(numbers), bend)


def _check_suffix(option: str, path: Path, allowed: tuple[str, ...]) -> None:
    if path.suffix.lower() not in allowed:
        raise QuickmergeError(f"{option} must end in {' or '.join(allowed)}, got {path.name!r}")


def _write(
    path: Path | None, file: Path, model: str, reducer: str, keep: float, remove: str | None, stages: Any, stats: Any
) -> None:
    write_json(path, {
        "file": file.name, "model": model, "reducer": reducer, "keep": keep, "remove": remove,
        "stages": [stage_data(stage) for stage in stages], **stats,
    })  # fmt: skip


def stage_data(stage: Any) -> dict[str, Any]:
    """A `PatchStage` for JSON: the slot of each patch, and in which turn it was chosen where that is known."""
    ranks = {} if stage.ranks is None else {"ranks": stage.ranks.tolist()}
    return {"name": stage.name, "tokens": stage.tokens, "groups": stage.groups.tolist(), **ranks}


# ``quickmerge show --image --model VLM``: which visual tokens a language model was given, as a picture.


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
    from quickmerge.merge.collect import visual_stage
    from quickmerge.terminal import Terminal
    from quickmerge.viz.patchmap_sheet import merged_picture
    from quickmerge.viz.patchmap_video import write_picture

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
