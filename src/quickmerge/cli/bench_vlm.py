"""``quickmerge bench --image`` with a vision-language model: right answers beside cost on annotated pictures."""

from __future__ import annotations

from pathlib import Path

from quickmerge.cli.common import Alone, check_output, one_sentence, parse_keeps, progress, write_json
from quickmerge.cli.vlm import load_vlm
from quickmerge.errors import QuickmergeError
from quickmerge.printable import clean_name

KEEPS = "0.5,0.25,0.11"
"""The shares of the visual tokens where nobody says."""


def bench_vlm(
    folder: Path, model: str, reducer: str, keep: str | None, limit: int, rounds: int, out: Path | None,
    json: Path | None,
) -> None:  # fmt: skip
    """Right answers by kind of question, and time, of every method at every share of the visual tokens."""
    from quickmerge.evaluation.answers_arms import answer_arms
    from quickmerge.evaluation.answers_bench import bench_answers
    from quickmerge.evaluation.bench import environment
    from quickmerge.evaluation.images import evenly
    from quickmerge.reducers import make_reducer
    from quickmerge.report.bench_answers import answers_table, write_answers_report
    from quickmerge.terminal import Terminal
    from quickmerge.training.data.annotated import read_annotated
    from quickmerge.training.data.images import open_image

    report = out / "report.html" if out is not None else None
    check_output(json, report)
    shares = parse_keeps(keep or KEEPS)
    with one_sentence():
        methods = [make_reducer(name.strip(), place="visual") for name in reducer.split(",")]
    pictures = [picture for picture in read_annotated(folder) if picture.questions]
    if not pictures:
        raise QuickmergeError(f"--image must hold pictures with questions, got only labels in {folder}")
    pictures = evenly(pictures, limit)
    vlm, processor = load_vlm(model)
    seen = open_image(pictures[0].path)
    with progress() as bar, one_sentence(Alone.asked(vlm, processor, seen)):
        arms = answer_arms(vlm, processor, methods, shares)
        task = bar.add_task("measuring", total=(1 + len(arms)) * (len(pictures) + rounds + 1))

        def advance(label: str) -> None:
            bar.update(task, advance=1, description=label)

        rows, records = bench_answers(vlm, processor, pictures, arms, rounds=rounds, advance=advance)
    meta = {"model": model, "images": len(pictures), "folder": folder.name, "environment": environment()}
    write_json(json, {"rows": rows, "images": records, "meta": meta})
    answers_table(rows, Terminal())
    if report is not None:
        write_answers_report(report, rows, meta)
        print(f"wrote {clean_name(report)}")
