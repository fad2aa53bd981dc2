"""``quickmerge generate --model CALM_FOLDER``: go on with a text, several tokens a step."""

from __future__ import annotations

import json as reader
import sys
import time
from pathlib import Path
from typing import Any

from quickmerge.console.options import (
    Alone,
    check_output,
    load_writer,
    one_sentence,
    parse_question,
    progress,
    quiet,
    read_text,
    write_json,
)
from quickmerge.errors import QuickmergeError, clean, clean_name, near_match

KIND = "quickmerge-calm"
CONFIG_BYTES = 2**20
METHODS = ("exact", "batch")  # as in quickmerge.calm.generation, which would load torch


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
    from quickmerge.bench.quality import check_room, first_tokens
    from quickmerge.calm.model import load_calm

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


# ``quickmerge bench --model CALM,OTHER...``: BrierLM, operations and speed of CALMs and ordinary language models.


def parse_models(text: str) -> dict[str, str]:
    """``"runs/a,small=runs/b"`` as folders by name; a folder's own name unless another is given.

    Raises:
        QuickmergeError: two have the same name, or one is empty.
    """
    found: dict[str, str] = {}
    for part in (part.strip() for part in text.split(",")):
        name, equals, folder = part.partition("=")
        if not equals:
            name, folder = Path(part).name or part, part
        if not name or not folder:
            raise QuickmergeError(f"--model must be folders with commas, or name=FOLDER, got {part!r}")
        if name in found:
            raise QuickmergeError(f"--model must give each model a name of its own (name=FOLDER), got {name!r} twice")
        found[name] = folder
    return found


def has_calm(model: str | None) -> bool:
    """Whether one of the models that were named is a CALM, told by its config alone."""
    return model is not None and any(is_calm(part.strip().rpartition("=")[2]) for part in model.split(","))


def bench_calm(
    models: str,
    texts: list[Path],
    *,
    length: int,
    limit: int,
    samples: int,
    batches: str,
    new: int,
    rounds: int,
    temperature: str | None,
    out: Path | None,
    json: Path | None,
) -> None:
    """Measure every model at the same places of the texts, and let all write on in turn."""
    from quickmerge.terminal import Terminal

    report = out / "report.html" if out is not None else None
    check_output(json, report)
    folders, sizes, temperatures = parse_models(models), parse_batches(batches), parse_temperatures(temperature)
    if not texts:
        raise QuickmergeError("give held-out texts to measure a CALM on with --text, got none")
    documents = [read_text(path) for path in texts]
    quiet()
    from quickmerge.bench.environment import environment
    from quickmerge.calm.bench import bench_calm as measure
    from quickmerge.calm.bench import calm_table, write_calm_report
    from quickmerge.calm.cost import temperature_rows
    from quickmerge.calm.evaluate import brier_text
    from quickmerge.calm.evaluate import is_calm as draws_chunks

    loaded, tokenizer = open_models(folders)
    patches = [model.config.patch for model in loaded.values() if draws_chunks(model)]
    with progress() as bar, one_sentence():
        text = brier_text(tokenizer, documents, patches, length=length, limit=limit)
        turns = rounds * len(sizes) * len(loaded)
        task = bar.add_task("measuring", total=len(text.places) * len(loaded) + turns)

        def advance(label: str, done: int) -> None:
            bar.update(task, advance=done, description=label)

        rows, speeds, _ = measure(loaded, text, samples=samples, batches=sizes, new=new, rounds=rounds, advance=advance)
        draws: list[dict[str, Any]] = []
        for name, model in loaded.items():
            if temperatures and draws_chunks(model):
                bar.update(task, description=f"{name} at temperatures")
                draws += [{"method": name, **row} for row in temperature_rows(model, text, temperatures)]
    meta = {
        "models": list(folders), "documents": ["/".join(path.absolute().parts[-2:]) for path in texts],
        "window": length, "places": len(text.places), "samples": samples, "new_tokens": new, "rounds": rounds,
        "environment": environment(),
    }  # fmt: skip
    write_json(json, {"rows": rows, "speeds": speeds, "temperatures": draws, "meta": meta})
    calm_table(rows, speeds, draws, Terminal())
    if report is not None:
        write_calm_report(report, rows, speeds, draws, meta)
        print(f"wrote {clean_name(report)}")


def open_models(folders: dict[str, str]) -> tuple[dict[str, Any], Any]:
    """Models by name, and the tokenizer that all of them have.

    Raises:
        QuickmergeError: a folder can't be opened, or has another tokenizer than the first.
    """
    from quickmerge.calm.model import load_calm

    loaded: dict[str, Any] = {}
    common = None
    for name, folder in folders.items():
        model, tokenizer = load_calm(folder) if is_calm(folder) else load_writer(folder)
        common = common or tokenizer
        if tokenizer.get_vocab() != common.get_vocab():
            raise QuickmergeError(
                f"--model must name models of one tokenizer, so that their tokens are the same: {name} has another "
                f"than {next(iter(folders))}"
            )
        loaded[name] = model
    return loaded, common


def parse_batches(text: str) -> list[int]:
    """``"1,8,32"`` as numbers; ``""`` for none, so that nothing is timed."""
    if not text.strip():
        return []
    try:
        batches = [int(part) for part in text.split(",")]
    except ValueError:
        batches = [0]
    if min(batches) < 1:
        raise QuickmergeError(f"--batch must be whole numbers of at least 1 with commas (1,8,32), got {text!r}")
    return list(dict.fromkeys(batches))


def parse_temperatures(text: str | None) -> list[float]:
    """``"0.5,0.7"`` as numbers in (0, 1]; None for none."""
    from quickmerge.calm.temperature import split_inverse

    if text is None:
        return []
    try:
        temperatures = [float(part) for part in text.split(",")]
    except ValueError:
        raise QuickmergeError(f"--temperature must be numbers in (0, 1] with commas (0.5,0.7), got {text!r}") from None
    for temperature in temperatures:
        split_inverse(temperature)
    return temperatures
