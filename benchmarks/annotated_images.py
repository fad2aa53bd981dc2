"""Write images with labels and questions, all of them or none, in the format that `read_annotated` reads."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pictures import MANIFEST, SAY, is_whole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from quickmerge.errors import QuickmergeError
from quickmerge.models import cache_folder
from quickmerge.models.download import replacing_folder

ANNOTATIONS = "annotations.jsonl"


@dataclass(frozen=True)
class Picture:
    """An image to write: its file's bytes, what is on it, and questions as (kind, question, answer).

    Objects are (text, box): what stands where, in words, and the left, top, right and bottom of it in pixels.
    """

    content: bytes
    labels: list[str]
    questions: list[tuple[str, str, str]]
    objects: list[tuple[str, list[int]]]


def asked_for(description: str, name: str, usual: Mapping[str, int]) -> tuple[Path, dict[str, int]]:
    """Read the command line: the folder to write, and how many images each split shall have.

    Args:
        description: what the command does.
        name: of the folder, to which other numbers than the usual are added.
        usual: the usual number of each split.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="where to write them (default: the cache folder)")
    for split, count in usual.items():
        parser.add_argument(f"--{split}", type=int, default=count, help=f"images (default: {count})")
    given = parser.parse_args()
    counts = {split: getattr(given, split) for split in usual}
    if min(counts.values()) < 1:
        *most, last = (f"--{split}" for split in counts)
        parser.error(f"{', '.join(most)} and {last} must be at least 1, got {', '.join(map(str, counts.values()))}")
    out: Path = (given.out or cache_folder()).expanduser().absolute()
    return out / (name if counts == usual else "-".join([name, *map(str, counts.values())])), counts


def write_all(
    out: Path, splits: Mapping[str, tuple[int, Iterable[Picture]]], suffix: str, about: dict[str, Any]
) -> int:
    """Write the images of each split, ``out/split/00001`` and so on; 0, also if `out` holds just these already.

    Args:
        out: the folder, a new or an empty one or one that this function has written.
        splits: how many images a split has, and the images, which are drawn only when they are needed.
        suffix: how the names of the images end.
        about: what decides their content, for the manifest; `out` is written anew when it differs.

    Raises:
        QuickmergeError: `out` holds something else, or can't be written.
    """
    if is_whole(out) and _manifest(out).get("about") == about:
        SAY.print(f"everything is already in {out}", markup=False)
        return 0
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise QuickmergeError(f"{out} holds something else: give --out an empty or a new folder")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with replacing_folder(out) as work, Progress(*columns, console=SAY, transient=True) as bar:
        entries: list[dict[str, Any]] = []
        for split, (count, pictures) in splits.items():
            task = bar.add_task(f"drawing {split}", total=count)
            (work / split).mkdir()
            lines = []
            for number, picture in enumerate(pictures, start=1):
                name = f"{number:05d}{suffix}"
                entries.append(_write(work, f"{split}/{name}", picture.content))
                asked = [dict(zip(("kind", "question", "answer"), one, strict=True)) for one in picture.questions]
                placed = [dict(zip(("text", "box"), one, strict=True)) for one in picture.objects]
                entry = {"image": name, "labels": picture.labels, "questions": asked, "objects": placed}
                lines.append(json.dumps(entry) + "\n")
                bar.advance(task)
            entries.append(_write(work, f"{split}/{ANNOTATIONS}", "".join(lines).encode()))
        manifest = {"complete": True, "about": about, "files": entries}
        (work / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if out.exists():  # an earlier, different one
            shutil.rmtree(out)
    told = ", ".join(f"{count} {split}" for split, (count, _) in splits.items())
    SAY.print(f"{told} images in {out}", markup=False)
    return 0


def _manifest(out: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def _write(folder: Path, file: str, content: bytes) -> dict[str, Any]:
    (folder / file).write_bytes(content)
    return {"file": file, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
