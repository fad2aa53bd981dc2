"""``quickmerge show text``, ``image`` and ``video``: what was kept, and what was merged into what."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quickmerge.console.options import (
    FEWER,
    JSON,
    KEEP,
    LAYER,
    OUTPUT,
    PROTECT,
    TOKENS,
    Alone,
    check_keep,
    check_model,
    check_output,
    check_protect,
    check_text,
    load_model,
    one_sentence,
    parse_layer,
    parse_numbers,
    parse_wholes,
    quiet,
    read_text,
    told_min_tokens,
    write_json,
)
from quickmerge.errors import QuickmergeError, clean_name
from quickmerge.merge.cli.options import parse_budget, parse_reducer
from quickmerge.merge.cli.vlm import check_needs_no_question, is_vlm, load_vlm

if TYPE_CHECKING:
    from PIL import Image

    from quickmerge.merge.tokens.budget import Budget

TEXT_EXAMPLE = "Example: quickmerge show text report.txt --keep 0.3 --html map.html --figure map.png"
IMAGE_EXAMPLE = (
    "Example: quickmerge show image photo.jpg --reducer tome --remove 16; "
    "quickmerge show image photo.jpg --reducer scope --tokens 64"
)
VIDEO_EXAMPLE = "Example: quickmerge show video clip.mp4 --frames 8 --keep 0.25 --animation clip.webp"

BYTES = 1024
"""Read of a file for each token that is shown: more than the longest tokens of any vocabulary have."""
SHARE = 0.4
"""The share that is kept where nobody says."""
PICTURES = (".png", ".webp")
ANIMATIONS = (".gif", ".webp")

SEEING = Annotated[str, typer.Option("--model", help="vit-small-14, a folder, or a Hugging Face id.")]
PICTURE = Annotated[
    Path | None,
    typer.Option(
        "--figure", help="Write it here (.png or .webp). Default: named after the file.", rich_help_panel=OUTPUT
    ),
]


def text(
    file: Annotated[Path | None, typer.Argument(help="UTF-8 text to show.")] = None,
    text: Annotated[str | None, typer.Option("--text", help="Text to show, in place of a file.")] = None,
    model: Annotated[str, typer.Option("--model", help="smollm2-135m, a folder, or a Hugging Face id.")] = (
        "smollm2-135m"
    ),
    limit: Annotated[int, typer.Option("--limit", min=1, help="Tokens to read from the start of the text.")] = 2048,
    reducer: Annotated[
        str, typer.Option("--reducer", help="See quickmerge ls; settings follow.", rich_help_panel=FEWER)
    ] = "quickmerge",
    keep: KEEP = SHARE,
    layer: LAYER = None,
    min_tokens: Annotated[
        int | None,
        typer.Option(
            "--min-tokens",
            min=0,
            help="Texts of fewer tokens are read in full. Default: 0.",
            rich_help_panel=FEWER,
        ),
    ] = None,
    protect: PROTECT = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write an HTML page here.", rich_help_panel=OUTPUT)
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--figure", help="Write an image here (.png or .svg).", rich_help_panel=OUTPUT)
    ] = None,
    json: JSON = None,
) -> None:
    """Show the tokens of a text: kept, merged into what, dropped."""
    if (file is None) == (text is None):
        raise QuickmergeError("give either a file or --text, got " + ("neither" if file is None else "both"))
    check_output(json, html, picture)
    if picture is not None and picture.suffix not in (".png", ".svg"):
        raise QuickmergeError(f"--figure must end in .png or .svg, got {picture.name!r}")
    check_protect(protect)
    depth = parse_layer(layer)
    content = check_text("--text", str(text)) if file is None else read_text(file, first=BYTES * limit + 2**16)
    check_model(model)
    # what takes seconds to import comes after what can be told at once
    from quickmerge.merge.collect import token_cells
    from quickmerge.merge.run import layer_runs
    from quickmerge.terminal import Terminal
    from quickmerge.viz.page import page, write_page
    from quickmerge.viz.tokenmap import token_map_html, token_map_text
    from quickmerge.viz.tokenmap_figure import token_map_figure

    method = parse_reducer(reducer, keep)
    lm, tokenizer = load_model(model)
    with Terminal(stderr=True).status("reading"), one_sentence(Alone.writing(lm, tokenizer)):
        cells, stats = token_cells(
            lm, tokenizer, content, method, depth, limit=limit, protect=protect, **told_min_tokens(min_tokens)
        )
    name = clean_name(file.name) if file is not None else "text"
    kept = sum(c.anchor for c in cells)
    title = f"{name}: {kept} of {len(cells)} tokens kept by {reducer}"
    runs = layer_runs(stats.tokens_per_layer)
    read = ", ".join(f"{n:g} in blocks {a}-{b}" for a, b, n in runs)
    caption = f"{clean_name(model)}, keep {keep:g}. Tokens read: {read}."
    token_map_text(cells, Terminal())
    print(stats, file=Terminal(stderr=True).file)
    if html is not None:
        write_page(html, page(title, [token_map_html(cells, title=title, caption=caption)]))
        print(f"wrote {clean_name(html)}")
    if picture is not None:
        token_map_figure(cells, picture, title=name)
        print(f"wrote {clean_name(picture)}")
    write_json(json, {
        "model": model, "reducer": reducer, "keep": keep, "kept": kept, "tokens": [c.__dict__ for c in cells],
        **stats.as_dict(),
    })  # fmt: skip


def image(
    image: Annotated[Path, typer.Argument(help="Image to show.", metavar="FILE")],
    model: SEEING = "vit-small-14",
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="What a vision-language model is asked about the image.")
    ] = None,
    reducer: Annotated[
        str, typer.Option("--reducer", help="See quickmerge ls; settings follow.", rich_help_panel=FEWER)
    ] = "quickmerge",
    keep: Annotated[
        float | None,
        typer.Option("--keep", help=f"Share of the tokens kept, in (0, 1]. Default: {SHARE:g}.", rich_help_panel=FEWER),
    ] = None,
    tokens: TOKENS = None,
    layer: LAYER = None,
    remove: Annotated[
        str | None,
        typer.Option(
            "--remove", help="Tokens that every block takes out (13), falling (13:-1) or listed.", rich_help_panel=FEWER
        ),
    ] = None,
    picture: PICTURE = None,
    json: JSON = None,
) -> None:
    """Show the patches of an image by the token that they became, in the order of the choice where there is one."""
    from quickmerge.datasets.images import open_image
    from quickmerge.datasets.labelled import PixelFormat
    from quickmerge.merge.collect import as_image, patch_stages
    from quickmerge.models import load_vision
    from quickmerge.models.encoder import find_encoder
    from quickmerge.terminal import Terminal
    from quickmerge.viz.patchmap_sheet import merged_image
    from quickmerge.viz.patchmap_video import write_image

    picture = picture or Path(f"{image.stem}-{reducer.split(':')[0]}.png")
    _check_suffix("--figure", picture, PICTURES)
    check_output(json, picture)
    budget, where, photo = parse_budget(keep, tokens, SHARE), _where(remove, layer, tokens), open_image(image)
    if is_vlm(model):
        if remove is not None:
            raise QuickmergeError(f"--remove is for vision transformers: leave it out for {model}")
        _show_tokens(photo, image.name, model, reducer, budget, where, prompt, picture, json)
        return
    if prompt is not None:
        raise QuickmergeError(f"--prompt is for vision-language models: leave it out for {model}")
    check_needs_no_question(reducer)
    share = SHARE if keep is None else keep
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
    seen = as_image(pixels[0], form)
    write_image(merged_image(seen, stages, title=f"{clean_name(image.name)}, {reducer}"), picture)
    print(stats)
    print(f"wrote {clean_name(picture)}")
    _write(json, image, model, reducer, share, remove, stages, stats.as_dict())


def _share(tokens: int, patches: int) -> float:
    """So many tokens as a share of an image's patches."""
    if tokens >= patches:
        raise QuickmergeError(f"--tokens must be below the {patches} patches of the image, got {tokens}")
    return tokens / patches


def video(
    video: Annotated[Path, typer.Argument(help="Video to show.", metavar="FILE")],
    model: SEEING = "vit-small-14",
    frames: Annotated[int, typer.Option("--frames", min=1, help="How many frames.")] = 8,
    stride: Annotated[int, typer.Option("--stride", min=1, help="Take every so many frames.")] = 4,
    reducer: Annotated[
        str, typer.Option("--reducer", help="See quickmerge ls; settings follow.", rich_help_panel=FEWER)
    ] = "grid",
    keep: KEEP = SHARE,
    picture: PICTURE = None,
    animation: Annotated[
        Path | None,
        typer.Option("--animation", help="Write an animation here (.gif or .webp).", rich_help_panel=OUTPUT),
    ] = None,
    json: JSON = None,
) -> None:
    """Show the patches of a video's frames by the token that they became, across time."""
    from PIL import Image

    from quickmerge.datasets import VideoClips
    from quickmerge.datasets.labelled import PixelFormat
    from quickmerge.merge.collect import as_image, frame_stage
    from quickmerge.merge.reducers.pooling import GridMerge
    from quickmerge.models import load_vision
    from quickmerge.terminal import Terminal
    from quickmerge.viz.patchmap_video import video_animation, video_strip, write_image

    picture = picture or Path(f"{video.stem}-{reducer.split(':')[0]}.png")
    _check_suffix("--figure", picture, PICTURES)
    if animation is not None:
        _check_suffix("--animation", animation, ANIMATIONS)
    check_output(json, picture, animation)
    check_keep(keep)
    across = GridMerge(keep=keep) if reducer == "grid" else parse_reducer(reducer, keep, "vision")
    if not video.is_file():
        raise QuickmergeError(f"{video} can't be read: there is no such file")
    quiet()
    encoder, processor = load_vision(model)
    grey = Image.new("RGB", (64, 64), "grey")
    with Terminal(stderr=True).status("looking"), one_sentence(Alone.seeing(encoder, processor, grey)):
        form = PixelFormat.of(processor)
        pixels = form.standardised(VideoClips([video], (form.height, form.width), frames, stride)[0])[None]
        stage = frame_stage(encoder, pixels, across)
    seen = [as_image(frame, form) for frame in pixels[0]]
    total = stage.groups.size
    print(f"{across!r}: {stage.tokens} of {total} tokens left of {frames} frames")
    write_image(video_strip(seen, stage, title=f"{clean_name(video.name)}, {reducer}"), picture)
    print(f"wrote {clean_name(picture)}")
    if animation is not None:
        video_animation(seen, stage, animation)
        print(f"wrote {clean_name(animation)}")
    _write(json, video, model, reducer, keep, None, [stage], {"tokens_in": total, "tokens_out": stage.tokens})


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
    what = "tokens per block (13), with an inflection (13:-1) or listed (20,20,10)"
    numbers = parse_wholes("--remove", number, what)
    (bend,) = parse_numbers("--remove", inflection, what) if colon else (0.0,)
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


# ``quickmerge show image --model VLM``: which visual tokens a language model was given, as an image.


PROMPT = "Describe the image."
"""What is asked where nobody says; it matters to methods that go by the question."""


def _show_tokens(
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
    from quickmerge.viz.patchmap_sheet import merged_image
    from quickmerge.viz.patchmap_video import write_image

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
    asked = f": {question}" if "text" in method.needs.visual else ""
    write_image(merged_image(seen, stage, title=f"{clean_name(name)}, {reducer}{asked}"), picture)
    print(stats)
    print(f"wrote {clean_name(picture)}")
    write_json(json, {
        "file": name, "model": model, "reducer": reducer, "prompt": question, "stages": [stage_data(stage)],
        **stats.as_dict(),
    })  # fmt: skip
