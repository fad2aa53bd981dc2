"""The pages of the docs as blocks of code, and the files that a reader of them is taken to have."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"

FENCE = re.compile(r"((?:^<!-- (?:no-run|slow)[^\n]*-->\n)?)^```(\w*)[^\n]*\n(.*?)^```", re.M | re.S)
COMMENT = re.compile(r"<!-- (no-run|slow)(?:: ([\w -]+))? -->")
SETUP = re.compile(r"<!-- setup: ([\w ,]+) -->")


def pages() -> list[Path]:
    """README and every page of the docs."""
    return [README, *sorted(DOCS.rglob("*.md"))]


def name(page: Path) -> str:
    """How a test calls a page."""
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """One fenced block: where it begins, what it is written in, and what a comment in front of it says."""

    page: Path
    line: int
    language: str
    code: str
    unrun: str
    """Why it is not run; empty: it is."""
    slow: bool

    def __str__(self) -> str:
        return f"{name(self.page)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in FENCE.finditer(text):
        said = COMMENT.match(match[1])
        kind, reason = (said[1], said[2]) if said else ("", None)
        if kind == "no-run":
            assert reason, f"{name(page)}: a block that is not run says why"
        line = text.count("\n", 0, match.start(3))
        found.append(Block(page, line, match[2], match[3], reason if kind == "no-run" else "", kind == "slow"))
    return found


def prose(text: str) -> list[str]:
    """The words of a page: no code blocks, no tables, no comments."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    text = re.sub(r"^\|.*$", "", text, flags=re.M)
    return re.sub(r"<!--.*?-->", "", text, flags=re.S).split()


# What readers bring along, small. Every page has the first kind; others are asked for by ``<!-- setup: ... -->``.


def _texts(folder: Path) -> None:
    from pydoc_data.topics import topics  # the language reference that comes with Python

    from quickmerge.data import demo_document

    long = "\n\n".join(topics[key] for key in sorted(topics))
    (folder / "report.txt").write_text(demo_document()[:2000], encoding="utf-8")
    for number, each in enumerate(("a.txt", "b.txt")):
        (folder / each).write_text(long[number * 40_000 :][:12_000], encoding="utf-8")
    (folder / "questions.jsonl").write_text(
        '{"prompt": "Name three colours.", "kind": "list"}\n{"prompt": "Repeat: one two three one two three."}\n',
        encoding="utf-8",
    )


def _photo(number: int, side: int = 256) -> Any:
    """Shapes on a gradient: something that merges, and something that stands out."""
    import numpy as np
    from PIL import Image, ImageDraw

    shade = np.linspace(0, 255, side, dtype=np.uint8)
    across, down = np.meshgrid(shade, shade[::-1])
    picture = Image.fromarray(np.stack([across, down, np.full_like(across, 90)], -1))
    draw = ImageDraw.Draw(picture)
    at = 20 + 17 * (number % 7)
    draw.ellipse((at, 40, at + 80, 120), fill=("red", "gold", "navy")[number % 3])
    draw.rectangle((30, 150, 30 + 12 * (number % 5 + 2), 210), fill="white")
    return picture


def _images(folder: Path) -> None:
    _photo(0).save(folder / "photo.jpg")
    for number in range(6):
        place = folder / "photos" / ("round", "square")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        _photo(number).save(place / f"{number}.jpg")


def _clip(folder: Path) -> None:
    import numpy as np
    import video_samples

    video_samples.write_frames(folder / "clip.mp4", [np.asarray(_photo(at, 224)) for at in range(12)])


def _vlm(folder: Path) -> None:
    import vlm_samples

    vlm_samples.save(folder / "runs" / "vlm")
    vlm_samples.annotated(folder / "images", 3)


def _recognizer(folder: Path) -> None:
    import scene_samples

    scene_samples.small_recognizer().save_pretrained(folder / "runs" / "recognizer")
    (folder / "labels.txt").write_text("red circle\ngreen square\n", encoding="utf-8")


def _calm(folder: Path) -> None:
    import calm_bench_samples as samples

    samples.save(samples.tiny_calm(), folder / "runs" / "calm" / "k4")
    samples.save(samples.tiny_discrete(), folder / "runs" / "calm" / "tokens")
    (folder / "held_out").mkdir()
    for number, text in enumerate(samples.texts(3, 120)):
        (folder / "held_out" / f"{number}.txt").write_text(text, encoding="utf-8")


def _fruit(folder: Path) -> None:
    from quickmerge.merge.prior import Prior
    from quickmerge.merge.prior.config import PriorConfig

    config = PriorConfig(features=192, width=32, layers=1, heads=4, pool=0, saliency=False, axes=2)
    Prior(config).save_pretrained(folder / "runs" / "fruit")


def _recipes(folder: Path) -> None:
    import quickmerge as qm

    qm.Recipe(merge=qm.QuickMerge(keep=0.4)).save_pretrained(folder / "runs" / "one")
    qm.Recipe(merge=qm.Truncate(keep=0.4), decoding=qm.PromptLookup()).save_pretrained(folder / "runs" / "two")


SETUPS: dict[str, Callable[[Path], None]] = {
    "images": _images,
    "clip": _clip,
    "vlm": _vlm,
    "recognizer": _recognizer,
    "calm": _calm,
    "fruit": _fruit,
    "recipes": _recipes,
}


def prepare(page: Path, folder: Path) -> None:
    """Put into a folder what a reader of this page has."""
    _texts(folder)
    for asked in SETUP.findall(page.read_text(encoding="utf-8")):
        for each in asked.split(","):
            SETUPS[each.strip()](folder)


def run_shell(block: Block, folder: Path) -> str:
    """Run a block by bash in that folder, with this tree's ``quickmerge`` on the path; what it printed."""
    tools = folder / ".bin"
    tools.mkdir(exist_ok=True)
    for command, start in (("quickmerge", "-m quickmerge"), ("python", "")):
        (tools / command).write_text(f'#!/bin/sh\nexec "{sys.executable}" {start} "$@"\n', encoding="utf-8")
        (tools / command).chmod(0o755)
    source = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": source, "COLUMNS": "120",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.code],
        cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, f"{block}\n{block.code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_python(block: Block, names: dict[str, Any]) -> None:
    """Run a block in the names of those before it; a traceback names the page and its line."""
    exec(compile("\n" * block.line + block.code, str(block.page), "exec"), names)
