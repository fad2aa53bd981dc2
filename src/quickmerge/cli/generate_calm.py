"""``quickmerge generate --model CALM_FOLDER``: go on with a text, several tokens a step."""

from __future__ import annotations

import json as reader
import sys
import time
from pathlib import Path
from typing import Any

from quickmerge.cli.common import Alone, check_output, one_sentence, parse_question, quiet, write_json
from quickmerge.errors import QuickmergeError, near_match
from quickmerge.printable import clean

KIND = "quickmerge-calm"
CONFIG_BYTES = 2**20
METHODS = ("exact", "batch")  # as in quickmerge.continuous.generation, which would load torch


def is_calm(model: str | None) -> bool:
    """Whether a model is a folder that holds a CALM, told by its config alone."""
    if model is None:
        return False
    try:
        path = Path(model).expanduser() / "config.json"
        if not path.is_file() or path.stat().st_size > CONFIG_BYTES:
            return False
        config = reader.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # a home of nobody, and what is nested too deeply, are RuntimeErrors
        return False  # whatever opens it will say what is wrong
    return isinstance(config, dict) and config.get("model_type") == KIND


def parse_method(text: str | None) -> dict[str, Any]:
    """``--temperature-method``: ``exact``, ``batch``, or ``batch:400`` for so many draws; as arguments of generate."""
    if text is None:
        return {}
    name, colon, count = text.partition(":")
    if name not in METHODS:
        raise QuickmergeError(
            f"--temperature-method must be exact, batch or batch:N, got {text!r}{near_match(name, METHODS)}"
        )
    if not colon:
        return {"temperature_method": name}
    if name == "exact" or not (count.isascii() and count.isdigit() and int(count) > 0):
        raise QuickmergeError(
            f"--temperature-method must be exact, batch or batch:N with a whole number N of at least 1, got {text!r}"
        )
    return {"temperature_method": name, "batch_samples": int(count)}


def generate_calm(
    model: str,
    file: Path | None,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float | None,
    method: str | None,
    seed: int,
    raw: bool,
    json: Path | None,
) -> None:
    """Print what follows the document and the prompt while it is written, and on stderr what it cost."""
    settings = parse_method(method)
    if temperature is None and settings:
        raise QuickmergeError("--temperature-method is for a temperature below 1: give --temperature too")
    check_output(json)
    text = "\n\n".join(part for part in parse_question(prompt, file) if part.strip())
    quiet()
    from quickmerge.continuous.store import load_calm
    from quickmerge.evaluation.first_tokens import check_room, first_tokens

    lm, tokenizer = load_calm(model)
    check_room(lm, tokenizer, "the text", text, max_new_tokens)
    first_tokens(tokenizer, text, 1)  # at least one has to be there
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"]
    print(text if raw else clean(text), end="", flush=True)
    began = time.perf_counter()
    with one_sentence(Alone.backbone(lm)):
        out = lm.generate(
            ids, max_new_tokens=max_new_tokens, temperature=1.0 if temperature is None else temperature, seed=seed,
            streamer=_streamer(raw)(tokenizer, skip_prompt=True, skip_special_tokens=True), **settings,
        )  # fmt: skip
    seconds = time.perf_counter() - began
    new = out[0, ids.shape[1] :]
    patch = lm.config.patch
    steps = -(-len(new) // patch)
    print(
        f"{len(new)} tokens in {steps} steps of {patch}, {seconds:.2f} s ({len(new) / seconds:.1f} tokens/s)",
        file=sys.stderr,
    )
    write_json(json, {
        "model": model, "prompt": prompt, "temperature": temperature, "method": method, "seed": seed,
        "text": tokenizer.decode(new, skip_special_tokens=True), "prompt_tokens": ids.shape[1], "tokens": len(new),
        "steps": steps, "patch": patch, "seconds": seconds,
    })  # fmt: skip


def _streamer(raw: bool) -> Any:
    """Transformers' streamer, which prints a text while it is written; cleaned, unless it is wanted ``raw``."""
    from transformers import TextStreamer

    class Cleaned(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(clean(text), stream_end)

    return TextStreamer if raw else Cleaned
