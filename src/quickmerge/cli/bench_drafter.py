"""``quickmerge bench --drafter``: tokens a pass and speed of drafters, on the same prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quickmerge.cli.common import Alone, check_output, load_writer, one_sentence, progress, write_json
from quickmerge.cli.generate_drafter import drafter_name, load_drafter, parse_tree
from quickmerge.errors import QuickmergeError
from quickmerge.printable import clean_name

if TYPE_CHECKING:
    from quickmerge.evaluation.prompts import Prompt


def bench_drafter(
    drafters: str,
    model: str | None,
    prompts: Path | None,
    tree: str | None,
    temperature: str,
    max_new_tokens: int,
    limit: int,
    out: Path | None,
    json: Path | None,
) -> None:
    """Let every drafter, and the model alone, write on from every prompt in turn."""
    from quickmerge.evaluation.bench import environment
    from quickmerge.evaluation.drafters import PLAIN, DraftArm
    from quickmerge.evaluation.drafters_bench import bench_drafters
    from quickmerge.report.bench_drafters import drafters_table, write_drafters_report
    from quickmerge.terminal import Terminal

    report = out / "report.html" if out is not None else None
    check_output(json, report)
    nodes = parse_tree(tree)
    temperatures = parse_temperatures(temperature)
    given = [name.strip() for name in drafters.split(",")]
    names = [drafter_name(name) for name in given]
    taken = [PLAIN.name, *names]
    if twice := [name for name in names if taken.count(name) > 1]:
        raise QuickmergeError(f"--drafter must give each drafter a name of its own, got {twice[0]!r} for two ways")
    arms = [DraftArm(name, load_drafter(source), nodes) for name, source in zip(names, given, strict=True)]
    asked = _prompts(prompts)[:limit]
    lm, tokenizer = load_writer("smollm2-135m" if model is None else model)
    with progress() as bar, one_sentence(Alone.writing(lm, tokenizer)):
        task = bar.add_task("measuring", total=(1 + len(arms)) * len(asked) * len(temperatures))

        def advance(label: str) -> None:
            bar.update(task, advance=1, description=label)

        rows, records = bench_drafters(
            lm, tokenizer, asked, arms, temperatures=temperatures, max_new_tokens=max_new_tokens, advance=advance
        )
    meta = {
        "model": "smollm2-135m" if model is None else model, "prompts": len(asked), "max_new_tokens": max_new_tokens,
        "prompts_file": prompts.name if prompts is not None else "about the shipped document",
        "environment": environment(),
    }  # fmt: skip
    write_json(json, {"rows": rows, "prompts": records, "meta": meta})
    drafters_table(rows, Terminal())
    if report is not None:
        write_drafters_report(report, rows, meta)
        print(f"wrote {clean_name(report)}")


def parse_temperatures(text: str) -> list[float]:
    """``"0,1"`` as numbers of at least 0."""
    try:
        temperatures = [float(part) for part in text.split(",")]
    except ValueError:
        raise QuickmergeError(f"--temperature must be numbers with commas (0,1), got {text!r}") from None
    from quickmerge.models.generation import check_temperature

    for temperature in temperatures:
        if temperature != 0:
            check_temperature("--temperature", temperature)
    return temperatures


def _prompts(path: Path | None) -> list[Prompt]:
    from quickmerge.data import demo_document
    from quickmerge.evaluation.prompts import Source, document_prompts, read_prompts

    if path is not None:
        return read_prompts(path)
    return document_prompts([Source("handbook", "prose", demo_document())], 12)
