"""``quickmerge bench --model CALM,OTHER...``: BrierLM, operations and speed of CALMs and ordinary language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quickmerge.cli.common import check_output, load_writer, one_sentence, progress, quiet, read_text, write_json
from quickmerge.cli.generate_calm import is_calm
from quickmerge.errors import QuickmergeError
from quickmerge.printable import clean_name


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
    from quickmerge.evaluation.bench import environment
    from quickmerge.evaluation.calm import brier_text
    from quickmerge.evaluation.calm import is_calm as draws_chunks
    from quickmerge.evaluation.calm_bench import bench_calm as measure
    from quickmerge.evaluation.calm_temperature import temperature_rows
    from quickmerge.report.bench_calm import calm_table, write_calm_report

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
    from quickmerge.continuous.store import load_calm

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
    from quickmerge.continuous.temperature import split_inverse

    if text is None:
        return []
    try:
        temperatures = [float(part) for part in text.split(",")]
    except ValueError:
        raise QuickmergeError(f"--temperature must be numbers in (0, 1] with commas (0.5,0.7), got {text!r}") from None
    for temperature in temperatures:
        split_inverse(temperature)
    return temperatures
