"""Made-up runs and rows for the report tests. No number here was measured."""

from __future__ import annotations

import base64
import re
from dataclasses import asdict
from html.parser import HTMLParser
from typing import Any

from quickmerge.viz.tokenmap import TokenCell

VOID = {"meta", "link", "br", "img", "input", "hr", "source"}
HOSTILE = (
    "<script>alert(1)</script>",
    "</style><style>*{display:none}",
    "</script><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "' autofocus onfocus='alert(1)",
    "javascript:alert(1)",
    "<a href='javascript:alert(1)'>x</a>",
    "&lt;b&gt; &amp; &#60;",
    "]]> --> <!-- <![CDATA[",
    "half \ud83d a character",
    "NUL \x00 BEL \x07 ESC \x1b[31m DEL \x7f CSI \x9b",
    "turn \u202e round",
)


def cell(
    text: str, slot: int, weight: float = 1.0, *, anchor: bool = True, position: int = 0, **more: Any
) -> TokenCell:
    fields = {"protected": False, "saliency": None} | more
    return TokenCell(text=text, slot=slot, weight=weight, anchor=anchor, position=position, **fields)


def cells_for(texts: list[str]) -> list[TokenCell]:
    """Return cells in every state: kept alone, leading, merged, dropped; the first one protected."""
    made = []
    for position, text in enumerate(texts):
        kind = position % 4
        slot = {0: 2 * (position // 4), 1: 2 * (position // 4) + 1, 2: 2 * (position // 4) + 1, 3: -1}[kind]
        weight = (1.0, 0.7, 0.3, 0.0)[kind]
        made.append(
            cell(text, slot, weight, anchor=kind < 2, position=position, protected=position == 0, saliency=0.1 * kind)
        )
    return made


def rows(*, kinds: bool = False) -> list[dict[str, object]]:
    made: list[dict[str, object]] = []
    for name, loss, cost in (("quickmerge", 0.12, 0.25), ("random", 0.6, 0.22), ("truncate", 1.3, 0.2)):
        for keep in (0.125, 0.25, 0.5):
            for kind in (None, "code", "prose") if kinds else (None,):
                recovery = 1 - loss * (1 - keep)
                share = cost + (1 - cost) * keep
                made.append(
                    {
                        "reducer": name,
                        "keep": keep,
                        "tokens_in": 2048,
                        "tokens_kept": int(2048 * keep),
                        "nll": 3.1 - 0.7 * recovery,
                        "nll_full": 2.4,
                        "nll_none": 3.1,
                        "recovery": recovery,
                        "recovery_low": recovery - 0.03,
                        "recovery_high": recovery + 0.03,
                        "prefill_seconds": 1.8 * share,
                        "prefill_speedup": 1 / share,
                        "reducer_seconds": 0.004,
                        "flops_ratio": share,
                        "cache_bytes": 1 << 24,
                        "cache_ratio": keep,
                    }
                    | ({"kind": kind} if kind else {})
                )
    return made


def demo(**changes: Any) -> dict[str, Any]:
    full = {
        "answer": "Seven miles, in still air.",
        "prefill_seconds": 1.84,
        "ttft_seconds": 1.91,
        "decode_seconds_per_token": 0.024,
        "cache_bytes": 56_623_104,
        "tokens_per_layer": [2300] * 24,
        "nll": 2.412,
    }
    reduced = full | {
        "answer": "Seven miles.",
        "prefill_seconds": 0.642,
        "ttft_seconds": 0.7,
        "decode_seconds_per_token": 0.022,
        "cache_bytes": 24_914_165,
        "tokens_per_layer": [2300] * 6 + [575] * 18,
        "nll": 2.489,
        "reducer_seconds": 0.004,
    }
    data: dict[str, Any] = {
        "model": "some/model",
        "document_name": "lighthouse.txt",
        "question": "How far could the fog signal be heard?",
        "reducer": "quickmerge",
        "keep": 0.25,
        "layer": 6,
        "full": full,
        "reduced": reduced,
        "nll_none": 3.128,
        "recovery": 0.8925,
        "flops_ratio": 0.412,
        "tokens_in": 2300,
        "tokens_kept": 575,
        "cells": [asdict(one) for one in cells_for(["The", " light", "house", "\n"] * 4)],
        "hardware": {"processor": "some processor", "threads": 16},
        "versions": {"quickmerge": "0.1.0", "torch": "2.13.0"},
    }
    return data | changes


class Parsed(HTMLParser):
    """The tags, attributes and texts of a page, and whether every tag was closed."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.document: list[str] = []  # the text of the token map
        self.texts: list[str] = []
        self._map_depth: int | None = None
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if ("class", "qm-text") in attrs:
            self._map_depth = len(self.open)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        if self._map_depth == len(self.open):
            self._map_depth = None
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self._map_depth is not None:
            self.document.append(data)


def drawings(picture: str) -> list[str]:
    """The drawings of an image as SVG: the dark one, then the light one."""
    found = re.findall(r'data:image/svg\+xml;base64,([^"]*)"', picture)
    return [base64.b64decode(one).decode("utf-8") for one in found]
