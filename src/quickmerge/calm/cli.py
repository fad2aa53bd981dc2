"""``quickmerge generate calm`` and ``quickmerge bench calm``: several tokens a step, drawn as one vector."""

from __future__ import annotations

import json as reader
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from quickmerge.console.options import (
    JSON,
    RAW,
    REPORT,
    WRITING,
    Alone,
    check_output,
    load_writer,
    one_sentence,
    parse_numbers,
    parse_question,
    parse_wholes,
    progress,
    quiet,
    read_text,
    write_json,
)
from quickmerge.errors import QuickmergeError, clean, near_match

GENERATE_EXAMPLE = 'Example: quickmerge generate calm --model runs/calm --prompt "The sea" --temperature 0.5'
BENCH_EXAMPLE = "Example: quickmerge bench calm held_out/*.txt --model runs/calm,runs/discrete --out runs/bench"

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


def located(model: str) -> str:
    """The folder of a CALM that is named by its id on the hub; any other model as it was named."""
    from quickmerge.models.kinds import KINDS, looks_like_id

    if not looks_like_id(model):
        return model
    from quickmerge.models.load import hub_folder
    from quickmerge.models.share import fetched

    return str(fetched(model, KINDS["calm"])) if is_calm(str(hub_folder(model, weights=False))) else model


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


def generate(
    prompt: Annotated[str, typer.Option("--prompt", help="What to go on with, behind the file.")],
    model: Annotated[str, typer.Option("--model", help="A folder of train calm, or a hub id.")],
    file: Annotated[Path | None, typer.Argument(help="UTF-8 text that stands before the prompt.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Longest text.", rich_help_panel=WRITING)
    ] = 128,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature", min=0, metavar="T", help="In (0, 1]; a CALM only gives samples.", rich_help_panel=WRITING
        ),
    ] = None,
    temperature_method: Annotated[
        str | None,
        typer.Option(
            "--temperature-method",
            help="exact draws until draws agree, batch:200 chooses among so many. Default: exact.",
            rich_help_panel=WRITING,
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of what is drawn.", rich_help_panel=WRITING)] = 0,
    raw: RAW = False,
    json: JSON = None,
) -> None:
    """Go on with a text by a CALM, which writes several tokens a step, and print it while it is written."""
    settings = parse_method(temperature_method)
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
        "model": model, "prompt": prompt, "temperature": temperature, "method": temperature_method, "seed": seed,
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


# ``quickmerge bench calm``: BrierLM, FLOPs and speed of CALMs and ordinary language models.


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


def bench(
    text: Annotated[list[Path], typer.Argument(help="Held-out UTF-8 texts.", metavar="FILES")],
    model: Annotated[
        str, typer.Option("--model", help="Folders of train calm or hub ids, name=FOLDER too; models of one tokenizer.")
    ],
    context: Annotated[int, typer.Option("--context", help="Tokens of a window.")] = 256,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Places of the texts that are measured.")] = 2000,
    samples: Annotated[int, typer.Option("--samples", min=2, help="Draws at each place.")] = 16,
    batch: Annotated[str, typer.Option("--batch", help="Texts written at a time, with commas; '' for no times.")] = (
        "1,8,32"
    ),
    rounds: Annotated[int, typer.Option("--rounds", min=2, help="How often the models take turns.")] = 5,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=2, help="Of a text.", rich_help_panel=WRITING)
    ] = 128,
    temperature: Annotated[
        str | None,
        typer.Option("--temperature", help="Measure sampling at these too, in (0, 1].", rich_help_panel=WRITING),
    ] = None,
    out: REPORT = None,
    json: JSON = None,
) -> None:
    """BrierLM, which draws alone tell, FLOPs for a token, and tokens a second, beside ordinary language models."""

    check_output(json, out / "report.html" if out is not None else None)
    folders, sizes, temperatures = parse_models(model), parse_batches(batch), parse_temperatures(temperature)
    folders = {name: located(folder) for name, folder in folders.items()}
    if not any(is_calm(folder) for folder in folders.values()):
        raise QuickmergeError(f"--model must name at least one CALM (a folder of train calm), got {model}")
    documents = [read_text(path) for path in text]
    quiet()
    from quickmerge.calm.bench import bench_calm, calm_report
    from quickmerge.calm.cost import temperature_rows
    from quickmerge.calm.evaluate import brier_text
    from quickmerge.calm.evaluate import is_calm as draws_chunks
    from quickmerge.console.results import show_result

    loaded, tokenizer = open_models(folders)
    patches = [one.config.patch for one in loaded.values() if draws_chunks(one)]
    with progress() as bar, one_sentence():
        read = brier_text(tokenizer, documents, patches, length=context, limit=limit)
        turns = rounds * len(sizes) * len(loaded)
        task = bar.add_task("measuring", total=len(read.places) * len(loaded) + turns)

        def advance(label: str, done: int) -> None:
            bar.update(task, advance=done, description=label)

        found, _ = bench_calm(
            loaded, read, samples=samples, batches=sizes, new=max_new_tokens, rounds=rounds, advance=advance
        )
        draws: list[dict[str, Any]] = []
        for name, one in loaded.items():
            if temperatures and draws_chunks(one):
                bar.update(task, description=f"{name} at temperatures")
                draws += [{"method": name, **row} for row in temperature_rows(one, read, temperatures)]
    found = found.about(
        models=list(folders), documents=["/".join(path.absolute().parts[-2:]) for path in text], window=context,
        places=len(read.places), samples=samples, new_tokens=max_new_tokens, rounds=rounds,
    )  # fmt: skip
    report = calm_report(found.rows, found.records, draws, found.meta)
    show_result(found, report, out=out, json=json, records="speeds", temperatures=draws)


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
    what = "whole numbers of at least 1 with commas (1,8,32)"
    batches = parse_wholes("--batch", text, what)
    if min(batches) < 1:
        raise QuickmergeError(f"--batch must be {what}, got {text!r}")
    return list(dict.fromkeys(batches))


def parse_temperatures(text: str | None) -> list[float]:
    """``"0.5,0.7"`` as numbers in (0, 1]; None for none."""
    from quickmerge.calm.temperature import split_inverse

    if text is None:
        return []
    temperatures = parse_numbers("--temperature", text, "numbers in (0, 1] with commas (0.5,0.7)")
    for temperature in temperatures:
        split_inverse(temperature)
    return temperatures
