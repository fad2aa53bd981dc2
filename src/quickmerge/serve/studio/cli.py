"""``quickmerge studio``: the page on this machine."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Annotated

import typer

from quickmerge.errors import QuickmergeError, clean_name, need

EXAMPLE = "Example: quickmerge studio --model smollm2-135m --model runs/vlm --port 8080"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def studio(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="To choose from: a name, a folder or a hub id; again for more. "
                     "Default: smollm2-135m, and vit-small-14 for images."),
    ] = None,
    recipe: Annotated[
        list[str] | None, typer.Option("--recipe", help="A saved recipe to choose from, too; again for more.")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port; 0 takes any that is free.")] = 7860,
) -> None:  # fmt: skip
    """Open a page to paste a text or drop an image, and see what is kept, both answers, and the cost."""
    if not 0 <= port <= 65535:
        raise QuickmergeError(f"--port must be a whole number from 0 to 65535, got {port}")
    from quickmerge.serve.studio.server import quiet_gradio, serve, socket_at

    quiet_gradio()
    need("gradio", "studio", "the studio's pages")
    if port:
        socket_at(host, port).close()  # told before anything that takes seconds
    # what takes seconds to import comes after what can be told at once
    from quickmerge.serve.studio.shelf import Shelf
    from quickmerge.serve.studio.ways import loaded

    shelf, ways = Shelf.of(model or []), [loaded(each) for each in recipe or []]
    if host not in LOOPBACK:
        print(f"quickmerge: whoever reaches {clean_name(host)} can use this page and its models", file=sys.stderr)

    def ready(address: str, _: object) -> None:
        print(f"quickmerge studio: {address} (Ctrl-C ends it)", flush=True)

    with suppress(KeyboardInterrupt):
        serve(shelf, ways, host=host, port=port, ready=ready)
    print("quickmerge studio: ended")
