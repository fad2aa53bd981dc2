"""``quickmerge show``: what of a text, an image or a video was kept, and what was merged into what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quickmerge.console.options import (
    JSON,
    LAYER,
    MIN_TOKENS,
    TOKENS,
    Alone,
    check_model,
    check_output,
    check_text,
    load_model,
    one_sentence,
    parse_layer,
    read_text,
    told_min_tokens,
    write_json,
)
from quickmerge.errors import QuickmergeError, clean_name
from quickmerge.merge.cli.options import parse_reducer

BYTES = 1024
"""Read of a file for each token that is shown: more than the longest tokens of any vocabulary have."""
EXAMPLE = (
    "Example: quickmerge show --file report.txt --keep 0.3 --html map.html --picture map.png; "
    "quickmerge show --image photo.jpg --reducer tome --remove 16; "
    "quickmerge show --image photo.jpg --reducer scope --tokens 64"
)


def show(
    file: Annotated[Path | None, typer.Option("--file", help="UTF-8 text to show.")] = None,
    text: Annotated[str | None, typer.Option("--text", help="Text to show, in place of --file.")] = None,
    image: Annotated[Path | None, typer.Option("--image", help="Image to show, in place of a text.")] = None,
    video: Annotated[Path | None, typer.Option("--video", help="Video to show: frames, merged across time.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="A folder, a Hugging Face id, or the default: smollm2-135m, vit-small-14 to see."),
    ] = None,
    reducer: Annotated[
        str | None,
        typer.Option("--reducer", help="See quickmerge ls. Default: quickmerge, and grid for videos."),
    ] = None,
    keep: Annotated[
        float | None, typer.Option("--keep", help="Share of the tokens that is kept, in (0, 1]. Default: 0.4.")
    ] = None,
    tokens: TOKENS = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Images: what a vision-language model is asked about it.")
    ] = None,
    layer: LAYER = None,
    min_tokens: MIN_TOKENS = None,
    remove: Annotated[
        str | None,
        typer.Option("--remove", help="Images: tokens that every block takes out (13), falling (13:-1) or listed."),
    ] = None,
    frames: Annotated[int, typer.Option("--frames", min=1, help="Videos: how many frames.")] = 8,
    stride: Annotated[int, typer.Option("--stride", min=1, help="Videos: take every so many frames.")] = 4,
    html: Annotated[Path | None, typer.Option("--html", help="Write an HTML page here.")] = None,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", help="Write a picture here: .png or .svg of a text, .png or .webp of images."),
    ] = None,
    animation: Annotated[
        Path | None, typer.Option("--animation", help="Videos: write an animation here (.gif or .webp).")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Tokens to read from the start of the text.")] = 2048,
    json: JSON = None,
) -> None:
    """Show the tokens of a text or the patches of an image or a video: kept, merged into what, dropped."""
    given = {"--file": file, "--text": text, "--image": image, "--video": video}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise QuickmergeError(f"give one of {', '.join(given)}, got {' and '.join(named) or 'none'}")
    _only(named[0], {
        "--remove": remove, "--animation": animation, "--html": html, "--layer": layer, "--tokens": tokens,
        "--prompt": prompt, "--min-tokens": min_tokens,
    })  # fmt: skip
    if image is not None or video is not None:
        from quickmerge.merge.cli.show import KEEP, show_image, show_video
        from quickmerge.merge.cli.show import MODEL as SEEING

        seeing = SEEING if model is None else model
        if image is not None:
            show_image(image, seeing, reducer or "quickmerge", keep, tokens, remove, layer, prompt, picture, json)
        elif video is not None:
            share = KEEP if keep is None else keep
            show_video(video, seeing, reducer or "grid", share, frames, stride, picture, animation, json)
        return
    model = "smollm2-135m" if model is None else model
    reducer, keep = reducer or "quickmerge", 0.4 if keep is None else keep
    check_output(json, html, picture)
    if picture is not None and picture.suffix not in (".png", ".svg"):
        raise QuickmergeError(f"--picture must end in .png or .svg, got {picture.name!r}")
    depth = parse_layer(layer)
    content = check_text("--text", str(text)) if file is None else read_text(file, first=BYTES * limit + 2**16)
    check_model(model)
    # what takes seconds to import comes after what can be told at once
    from quickmerge.merge.collect import token_cells
    from quickmerge.merge.summary import layer_runs
    from quickmerge.terminal import Terminal
    from quickmerge.viz.page import page, write_page
    from quickmerge.viz.tokenmap import token_map_html, token_map_text
    from quickmerge.viz.tokenmap_figure import token_map_figure

    method = parse_reducer(reducer, keep)
    lm, tokenizer = load_model(model)
    with Terminal(stderr=True).status("reading"), one_sentence(Alone.writing(lm, tokenizer)):
        cells, stats = token_cells(lm, tokenizer, content, method, depth, limit=limit, **told_min_tokens(min_tokens))
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


def _only(what: str, given: dict[str, object]) -> None:
    """Raise if an option was given that has no meaning for what is shown."""
    images = ("--remove", "--layer", "--tokens", "--prompt")
    allowed = {"--image": images, "--video": ("--animation",)}.get(what, ("--html", "--layer", "--min-tokens"))
    for name, value in given.items():
        if value is not None and name not in allowed:
            raise QuickmergeError(f"{name} has no meaning with {what}: leave it out")
