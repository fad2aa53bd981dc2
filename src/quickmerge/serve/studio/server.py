"""The server of the page: at loopback unless told otherwise, nothing fetched from elsewhere, an end by Ctrl-C."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickmerge.errors import QuickmergeError, need

if TYPE_CHECKING:
    from quickmerge.serve.studio.shelf import Shelf
    from quickmerge.serve.studio.ways import Way

__all__ = ["PORT", "serve", "socket_at"]

PORT = 7860
"""Where nobody says."""
UPLOAD = "64mb"
"""Of one file. What each kind may have is checked where it is read."""
HERE = Path(__file__).parent
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; media-src 'self' data: blob:; "
    "worker-src 'self' blob:; frame-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'"
)
"""The browser fetches from this server alone, whatever a page of gradio's would like to load. Its page is built by
scripts that evaluate templates, so those of its own are allowed."""
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
GRACE = 1
"""Seconds that open connections have at the end: a page holds one for as long as it is open."""


def socket_at(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes any that is free.

    Raises:
        QuickmergeError: the port is in use or not allowed, or there is no such host on this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise QuickmergeError(f"--host must be an address of this machine such as 127.0.0.1, got {host!r}") from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(128)
    except OSError as error:
        made.close()
        raise QuickmergeError(
            f"--port {port} of {host} can't be used ({error.strerror}): give another, or 0 for any that is free"
        ) from error
    return made


def serve(
    shelf: Shelf, further: Sequence[Way] = (), *, host: str = "127.0.0.1", port: int = PORT,
    ready: Callable[[str, Callable[[], None]], None] = lambda *_: None,
) -> None:  # fmt: skip
    """Serve the page until it is interrupted.

    Args:
        shelf: the models on offer.
        further: recipes besides the usual ones.
        host: the address to listen at.
        port: the port; 0 for any that is free.
        ready: is told the page's address, and what ends the server, as soon as it can be opened.

    Raises:
        QuickmergeError: gradio is not installed, or nothing can listen there.
    """
    quiet_gradio()
    need("gradio", "studio", "the studio's pages")
    listening = socket_at(host, port)
    with listening, tempfile.TemporaryDirectory(prefix="quickmerge-studio-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # goes when the server ends
        import uvicorn

        server = uvicorn.Server(uvicorn.Config(
            _application(shelf, further, listening), log_level="critical", timeout_graceful_shutdown=GRACE,
            lifespan="on", ws="none",
        ))  # fmt: skip

        def end() -> None:
            server.should_exit = True

        ready(_address(listening), end)
        server.run(sockets=[listening])


def quiet_gradio() -> None:
    """Turn off what gradio would ask or tell its makers; before it is imported."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def _application(shelf: Shelf, further: Sequence[Way], listening: socket.socket) -> Any:
    """The page and what it needs, as an ASGI application that sends `HEADERS` with everything."""
    import gradio as gr
    from fastapi import FastAPI

    from quickmerge.serve.studio.page import make_page

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    host, port = listening.getsockname()[:2]
    mounted = gr.mount_gradio_app(
        app, make_page(shelf, further), path="/", server_name=host, server_port=port, footer_links=[],
        allowed_paths=[], show_error=False, max_file_size=UPLOAD, ssr_mode=False, enable_monitoring=False, pwa=False,
        mcp_server=False, run_history=False, theme=_theme(),
        # as it is: what gradio is given as css it rewrites
        head=f"<style>{(HERE / 'studio.css').read_text(encoding='utf-8')}</style>",
        favicon_path=str(HERE / "studio.svg"),
    )  # fmt: skip
    return Guarded(mounted)


def _theme() -> Any:
    """Fonts of the reader's own machine, and the colours of our reports."""
    import gradio as gr

    return gr.themes.Base(
        primary_hue="blue", neutral_hue="slate", radius_size="lg",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"],
    ).set(
        # gradio's own greys are too pale to read
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_400",
        block_title_text_color="*neutral_700", block_title_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700", block_label_text_color_dark="*neutral_300",
        slider_color="*primary_600",
    )  # fmt: skip


class Guarded:
    """An ASGI application whose every answer carries `HEADERS`.

    Args:
        app: what it wraps.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
            await send(message)

        await self.app(scope, receive, guarded if scope["type"] == "http" else send)
