"""How many files of the package one job passes through: what a reader has to open to follow it.

A file counts when one of its functions runs; what runs while a module is imported does not. Models are tiny and random.

Usage:
    python benchmarks/files_entered.py [--list] [--json benchmarks/results/files_entered.json]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests" / folder) for folder in ("", "samples")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers as hf  # noqa: E402
import vision_samples  # noqa: E402
from PIL import Image  # noqa: E402
from tokenizer_samples import SENTENCES, sentencepiece_bpe  # noqa: E402
from transplant_samples import model_folder, tokenizer_folder  # noqa: E402

import quickmerge as qm  # noqa: E402
from quickmerge.bench.harness import environment  # noqa: E402
from quickmerge.cli import main as command_line  # noqa: E402

HOME = Path(qm.__file__).resolve().parent
LIMITS = {"bench image": 22, "transplant": 22, "generate text": 16, "SpeculativeDecoding": 12}


def entered(job: Callable[[], Any]) -> list[str]:
    """Files below the package of which a function runs in this job, as paths from there."""
    job()  # once untraced: what is imported on the way does not belong to it
    seen: set[CodeType] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            seen.add(frame.f_code)

    sys.setprofile(note)
    try:
        job()
    finally:
        sys.setprofile(None)
    inside = {code for code in seen if code.co_name != "<module>" and HOME in Path(code.co_filename).parents}
    # A class body runs while its module is imported, as the module's own code does.
    return sorted({str(Path(c.co_filename).relative_to(HOME)) for c in inside if c.co_flags & 0x2 and not _class(c)})


def _class(code: CodeType) -> bool:
    return "__qualname__" in code.co_names and "__module__" in code.co_names


def run(*words: object) -> Callable[[], None]:
    """The command line in this process, quietly; anything but success is an error."""

    def job() -> None:
        out, err = StringIO(), StringIO()
        sys.argv = ["quickmerge", *map(str, words)]
        try:
            with redirect_stdout(out), redirect_stderr(err):
                command_line()
        except SystemExit as stop:
            if stop.code:
                raise RuntimeError(err.getvalue()) from None

    return job


def jobs(work: Path) -> dict[str, Callable[[], Any]]:
    """The four jobs, with their tiny models in a folder."""
    draws = np.random.default_rng(0)
    photos = work / "photos"
    for label in ("left", "right"):
        (photos / label).mkdir(parents=True)
        for number in range(4):
            Image.fromarray(draws.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(photos / label / f"{number}.png")
    torch.manual_seed(0)
    hf.ViTModel(hf.ViTConfig(**vision_samples.SIZE, **vision_samples.IMAGE)).save_pretrained(work / "vit")
    hf.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(work / "vit")
    base, wanted = model_folder(work / "base"), tokenizer_folder(work / "wanted")
    donor = model_folder(work / "donor", tokenizer=sentencepiece_bpe(520), seed=4)
    text = work / "text.txt"
    text.write_text(" ".join(SENTENCES), encoding="utf-8")
    model = hf.AutoModelForCausalLM.from_pretrained(base)
    ids = torch.randint(0, 200, (1, 12))

    def speculate() -> None:
        model.generate(
            ids, max_new_tokens=8, do_sample=False, custom_generate=qm.SpeculativeDecoding(qm.PromptLookup())
        )

    return {
        "bench image": run("bench", "image", photos, "--model", work / "vit", "--flops", "0.7", "--rounds", "2"),
        "transplant": run(
            "transplant", "--base", base, "--donor", donor, "--tokenizer", wanted, "--out", work / "out",
            "--method", "omp", "--k", "4",
        ),
        "generate text": run(
            "generate", "text", "--model", base, "--prompt", " ".join(SENTENCES[:3]), "--max-new-tokens", "4",
            "--min-tokens", "0",
        ),
        "SpeculativeDecoding": speculate,
    }  # fmt: skip


def main() -> None:
    """Print the counts beside their limits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--list", action="store_true", help="print the files too")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {name: entered(job) for name, job in jobs(Path(folder)).items()}
    for name, files in found.items():
        print(f"{name:20} {len(files):3} files (limit {LIMITS[name]})")
        if given.list:
            print(*(f"    {file}" for file in files), sep="\n")
    if given.json:
        rows = [
            {"job": name, "files": len(files), "limit": LIMITS[name], "entered": files} for name, files in found.items()
        ]
        result = {"rows": rows, "meta": {"environment": environment()}}
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
