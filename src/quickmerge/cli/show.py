"""``quickmerge show``: what of a text was kept, what was merged into what, with weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quickmerge.cli.common import (
    JSON,
    KEEP,
    LAYER,
    MODEL,
    REDUCER,
    check_output,
    load_model,
    one_sentence,
    parse_layer,
    parse_reducer,
    read_text,
    write_json,
)
from quickmerge.errors import QuickmergeError

EXAMPLE = "Example: quickmerge show --file report.txt --keep 0.3 --html map.html --picture map.png"


def show(
    file: Annotated[Path | None, typer.Option("--file", help="UTF-8 text to show.")] = None,
    text: Annotated[str | None, typer.Option("--text", help="Text to show, in place of --file.")] = None,
    model: MODEL = "smollm2-135m",
    reducer: REDUCER = "quickmerge",
    keep: KEEP = 0.4,
    layer: LAYER = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write an HTML page here.")] = None,
    picture: Annotated[Path | None, typer.Option("--picture", help="Write a picture here (.png or .svg).")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Tokens to read from the start of the text.")] = 2048,
    json: JSON = None,
) -> None:
    """Show the tokens of a text: kept, merged into what, dropped."""
    from rich.console import Console

    from quickmerge.hosts.summary import layer_runs
    from quickmerge.report import token_map_figure, token_map_html, token_map_text, write_page
    from quickmerge.report.collect import token_cells
    from quickmerge.report.page import page

    check_output(json, html, picture)
    if (file is None) == (text is None):
        raise QuickmergeError("give either --file or --text, got " + ("both" if file else "neither"))
    if picture is not None and picture.suffix not in (".png", ".svg"):
        raise QuickmergeError(f"--picture must end in .png or .svg, got {picture.name!r}")
    method = parse_reducer(reducer, keep)
    depth = parse_layer(layer)
    content = read_text(file) if file is not None else str(text)
    lm, tokenizer = load_model(model)
    with Console(stderr=True).status("reading"), one_sentence():
        cells, stats = token_cells(lm, tokenizer, content, method, depth, limit=limit)
    name = file.name if file is not None else "text"
    kept = sum(c.anchor for c in cells)
    title = f"{name}: {kept} of {len(cells)} tokens kept by {reducer}"
    runs = layer_runs(stats.tokens_per_layer)
    caption = f"{model}, keep {keep:g}. Tokens read: " + ", ".join(f"{n:g} in blocks {a}-{b}" for a, b, n in runs) + "."
    token_map_text(cells, Console())
    print(stats, file=Console(stderr=True).file)
    if html is not None:
        write_page(html, page(title, [token_map_html(cells, title=title, caption=caption)]))
        print(f"wrote {html}")
    if picture is not None:
        token_map_figure(cells, picture, title=name)
        print(f"wrote {picture}")
    write_json(json, {
        "model": model, "reducer": reducer, "keep": keep, "kept": kept, "tokens": [c.__dict__ for c in cells],
        **stats.as_dict(),
    })  # fmt: skip
