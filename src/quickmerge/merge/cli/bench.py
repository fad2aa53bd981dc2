"""``quickmerge bench --image``: quality beside cost for several reducers on your images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quickmerge.console.options import Alone, check_output, one_sentence, parse_keeps, progress, quiet, write_json
from quickmerge.errors import QuickmergeError, clean_name
from quickmerge.merge.cli.vlm import load_vlm

BATCH = 8


def bench_images(
    folder: Path,
    model: str,
    reducer: str,
    keep: str | None,
    limit: int,
    rounds: int,
    dynamicvit: Path | None,
    out: Path | None,
    json: Path | None,
) -> None:
    """Fidelity, labels where there are any, and time of every method at every share of the operations."""
    from quickmerge.bench.environment import environment
    from quickmerge.datasets.images import open_image
    from quickmerge.datasets.labelled import load_batch
    from quickmerge.merge.bench.vision import arms, time_arms, vision_table, write_vision_report
    from quickmerge.merge.bench.vision import bench_images as measure
    from quickmerge.merge.cli.vlm import check_needs_no_question, is_vlm
    from quickmerge.merge.reducers import make_reducer
    from quickmerge.terminal import Terminal

    if is_vlm(model):
        pass

        if dynamicvit is not None:
            raise QuickmergeError(f"--dynamicvit is for vision transformers: leave it out for {model}")
        bench_vlm(folder, model, reducer, keep, limit, rounds, out, json)
        return
    report = out / "report.html" if out is not None else None
    check_output(json, report)
    shares = parse_keeps(keep or "0.5,0.7")
    names = [name.strip() for name in reducer.split(",")]
    for name in names:
        check_needs_no_question(name)
    with one_sentence():
        methods = [make_reducer(name, place="vision") for name in names]
    paths, labels = _images(folder, limit)
    quiet()
    network, processor, classes = _model(model, labels)
    if classes is None:
        labels = None
    trained = [] if dynamicvit is None else [_trained(dynamicvit)]
    alone = Alone.seeing(network, processor, open_image(paths[0]))
    with one_sentence(alone):
        batches = [load_batch(paths[i : i + BATCH], processor) for i in range(0, len(paths), BATCH)]
        everything = arms(network, methods, shares, batches[0], trained=trained)
    with progress() as bar, one_sentence(alone):
        work = (1 + len(everything)) * (len(batches) + rounds + 1)
        task = bar.add_task("measuring", total=work)

        def advance(label: str) -> None:
            bar.update(task, advance=1, description=label)

        rows, records = measure(network, batches, everything, labels=labels, classes=classes, advance=advance)
        times = time_arms(network, batches[0], everything, rounds, advance)
    for row, spent in zip(rows, times, strict=True):
        row |= {k: v for k, v in spent.items() if k not in ("method", "asked")}
    meta = {"model": model, "images": len(paths), "folder": folder.name, "environment": environment()}
    write_json(json, {"rows": rows, "images": records, "meta": meta})
    vision_table(rows, Terminal())
    if report is not None:
        write_vision_report(report, rows, meta)
        print(f"wrote {clean_name(report)}")


def _images(folder: Path, limit: int) -> tuple[list[Path], list[str] | None]:
    """Files, evenly taken from the folder, and their labels where it holds a folder for each class."""
    from quickmerge.datasets import find_data
    from quickmerge.datasets.images import evenly
    from quickmerge.datasets.labelled import read_labelled

    if folder.is_dir() and sum(path.is_dir() for path in folder.iterdir()) > 1:
        chosen = evenly(read_labelled(folder), limit)
        return [image.path for image in chosen], [image.label for image in chosen]
    data = find_data([folder])
    if data.kind != "images":
        raise QuickmergeError(f"--image must be a folder of images, got one of {data.kind}")
    return evenly(data.files, limit), None


def _model(name: str, labels: list[str] | None) -> tuple[Any, Any, list[str] | None]:
    """The model as a classifier if it is one that knows these labels, else for its features."""
    from quickmerge.errors import UnsupportedModelError
    from quickmerge.models.load_vision import load_vision

    if labels is not None:
        try:
            model, processor = load_vision(name, task="classify")
        except UnsupportedModelError:
            pass
        else:
            names = model.config.id2label or {}
            classes = [str(names[i]) for i in range(len(names))]
            if set(labels) <= set(classes):
                return model, processor, classes
    model, processor = load_vision(name)
    return model, processor, None


def _trained(folder: Path) -> tuple[Any, Any]:
    """A trained DynamicViT and the model that was trained with it, None where that is the one that is measured."""
    from quickmerge.merge.reducers import DynamicViT
    from quickmerge.models.load_vision import load_vision

    backbone = folder / "backbone"
    return DynamicViT.from_pretrained(folder), load_vision(backbone, task="classify")[0] if backbone.is_dir() else None


# ``quickmerge bench --image`` with a vision-language model: right answers beside cost on annotated pictures.


KEEPS = "0.5,0.25,0.11"
"""The shares of the visual tokens where nobody says."""


def bench_vlm(
    folder: Path, model: str, reducer: str, keep: str | None, limit: int, rounds: int, out: Path | None,
    json: Path | None,
) -> None:  # fmt: skip
    """Right answers by kind of question, and time, of every method at every share of the visual tokens."""
    from quickmerge.bench.environment import environment
    from quickmerge.datasets.annotated import read_annotated
    from quickmerge.datasets.images import evenly, open_image
    from quickmerge.merge.bench.answers import answer_arms
    from quickmerge.merge.bench.vlm import answers_table, bench_answers, write_answers_report
    from quickmerge.merge.reducers import make_reducer
    from quickmerge.terminal import Terminal

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
