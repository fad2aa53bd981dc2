"""``quickmerge bench text``, ``image`` and ``vlm``: quality beside cost of reducers on your documents or images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quickmerge.console.options import (
    FEWER,
    JSON,
    REDUCERS,
    REPORT,
    Alone,
    check_output,
    check_protect,
    load_writer,
    one_sentence,
    parse_keeps,
    parse_layer,
    parse_shares,
    progress,
    quiet,
    read_text,
)
from quickmerge.console.recording import record_of
from quickmerge.errors import QuickmergeError, near_match
from quickmerge.merge.cli.options import add_prior, parse_method, parse_reducer
from quickmerge.merge.cli.vlm import check_needs_no_question, is_vlm, load_vlm

if TYPE_CHECKING:
    from quickmerge.datasets.text import Document

IMAGE_EXAMPLE = "Example: quickmerge bench image photos/ --reducer quickmerge,tome,tofu,random --flops 0.5,0.65"
VLM_EXAMPLE = (
    "Example: quickmerge bench vlm images/ --model runs/vlm --reducer scope,trimtokenator,tome --keep 0.5,0.25"
)
BATCH = 8

BUDGETS = ("share", "entropy")
"""What a share of ``bench text`` is: of every text, or of the texts on average, see `quickmerge.merge.calibrate`."""

IMAGES = Annotated[int, typer.Option("--limit", min=1, help="Images to read, evenly taken from the folder.")]
ROUNDS = Annotated[int, typer.Option("--rounds", min=2, help="How often the methods take turns.")]


def load_documents(
    text: list[Path], model: str, context: int, target: int, dtype: str = "float32"
) -> tuple[Any, Alone, list[Document]]:
    """The model, the model alone, and what of each file is read as a context and scored behind it."""
    from quickmerge.datasets.text import LEAST, split_document

    # no token that matters stands further on, see split_document
    texts = [read_text(path, first=256 * (context + target + LEAST)) for path in text]
    lm, tokenizer = load_writer(model, dtype)
    # Documents sorted into several folders are told apart by the folder's name in the tables.
    parents = [path.absolute().parent.name for path in text]
    kinds = parents if len(set(parents)) > 1 else [None] * len(text)
    alone = Alone.writing(lm, tokenizer)
    with one_sentence(alone):
        documents = [
            # Folder and file name say which document it was, without where this machine keeps it.
            split_document(
                tokenizer, body, "/".join(path.absolute().parts[-2:]), context=context, target=target, kind=kind
            )
            for path, body, kind in zip(text, texts, kinds, strict=True)
        ]
    return lm, alone, documents


def measure_text(
    text: list[Path], model: str, context: int, target: int, reducer: str, keep: str, layer: str | None,
    prior: str | None, out: Path | None, json: Path | None, budget: str = "share", protect: str | None = None,
    literals: int = 0, dtype: str = "float32",
) -> None:  # fmt: skip
    """Context recovery and cost of every reducer at every keep, a ``"share"`` or the mean share of an ``"entropy"``."""
    from quickmerge.console.results import show_result
    from quickmerge.merge.bench.text import bench as measure
    from quickmerge.merge.bench.text import bench_report
    from quickmerge.merge.cache import Evictor
    from quickmerge.merge.reducers import Reducer
    from quickmerge.merge.text.modes import Prefix
    from quickmerge.models.precision import dtype_name
    from quickmerge.models.spans import tokenizer_of

    check_output(json, out / "report.html" if out is not None else None)
    if budget not in BUDGETS:
        hint = near_match(budget, BUDGETS)
        raise QuickmergeError(f"--budget must be one of {', '.join(BUDGETS)}, got {budget!r}{hint}")
    check_protect(protect)
    keeps = parse_keeps(keep)
    methods = [parse_method(name.strip(), keeps[0]) for name in reducer.split(",")]
    if prior is not None:
        methods.append(add_prior(parse_reducer("quickmerge", keeps[0]), prior))
    if budget == "entropy" and (wrong := [each.name for each in methods if isinstance(each, Evictor)]):
        raise QuickmergeError(
            f"--budget entropy is for methods that merge, got {wrong[0]}, which evicts from the cache"
        )
    depth = parse_layer(layer)
    lm, alone, documents = load_documents(text, model, context, target, dtype)
    kept: dict[tuple[str, float], Reducer | Evictor] = {
        (each.label, keep): replace(each, keep=keep) for each in methods for keep in keeps
    }
    if budget == "entropy":
        from quickmerge.merge.calibrate import calibrated

        with one_sentence(alone):
            kept = {
                (each.label, keep): calibrated(lm, tokenizer_of(lm), each, keep, depth, tokens=context)
                for each in methods
                if isinstance(each, Reducer)
                for keep in keeps
            }
    with progress() as bar, one_sentence(alone):
        task = bar.add_task("measuring", total=len(documents) * (1 + len(methods) * len(keeps)))

        def advance(label: str) -> None:
            bar.update(task, advance=1, description=Path(label).name)

        found = measure(
            lm, documents, methods, keeps, layer=depth, advance=advance,
            budget=lambda reducer, keep: kept[reducer.label, keep], literals=literals,
            tokenizer=tokenizer_of(lm) if literals else None, **({} if protect is None else {"protect": protect}),
        )  # fmt: skip
    whole = Prefix(min_tokens=0, protect=protect)
    for row in found.rows:
        method = kept.get((row["reducer"], row["keep"]))
        if method is not None:
            # A context is merged however short it is.
            at: Any = (
                {"cache": replace(method, protect=protect)}
                if isinstance(method, Evictor)
                else {"merge": (method, depth, whole)}
            )
            row.update(record_of(at))
    found = found.about(
        model=model, dtype=dtype_name(lm), context=context, target=target, layer=layer or "default", budget=budget,
        protect=protect or "nothing",
        documents=[document.name for document in documents], reducers={m.label: repr(m) for m in methods},
    )  # fmt: skip
    show_result(found, bench_report(found.rows, found.meta), out=out, json=json, records="documents")


def _is_flops(keep: str | None) -> None:
    if keep is not None:
        raise QuickmergeError(f"--keep is a share of tokens: give the share of the FLOPs as --flops {keep}")


def image(
    image: Annotated[
        Path,
        typer.Argument(help="A folder of images; with a folder for each class, labels count.", metavar="FOLDER"),
    ],
    model: Annotated[str, typer.Option("--model", help="vit-small-14, a folder, or a Hugging Face id.")] = (
        "vit-small-14"
    ),
    limit: IMAGES = 64,
    rounds: ROUNDS = 5,
    dynamicvit: Annotated[
        str | None, typer.Option("--dynamicvit", help="Measure this folder of train dynamicvit too, or hub id.")
    ] = None,
    reducer: REDUCERS = "quickmerge,random",
    flops: Annotated[
        str, typer.Option("--flops", help="Shares of the model's FLOPs, with commas.", rich_help_panel=FEWER)
    ] = "0.5,0.7",
    keep: Annotated[str | None, typer.Option("--keep", hidden=True, callback=_is_flops)] = None,
    out: REPORT = None,
    json: JSON = None,
) -> None:
    """Fidelity to the whole model's features, labels, and time of every method at every share of the FLOPs.

    Labels count where the folder has one for each class and the model a head for them.
    """
    from quickmerge.console.results import recorded, show_result
    from quickmerge.datasets.images import open_image
    from quickmerge.datasets.labelled import load_batch
    from quickmerge.merge.bench.vision import arms, bench_images, vision_report
    from quickmerge.merge.reducers import make_reducer

    if is_vlm(model):
        raise QuickmergeError(f"{model} is a vision-language model: measure it with quickmerge bench vlm")
    check_output(json, out / "report.html" if out is not None else None)
    shares = parse_shares("--flops", flops)
    names = [name.strip() for name in reducer.split(",")]
    for name in names:
        check_needs_no_question(name)
    with one_sentence():
        methods = [make_reducer(name, place="vision") for name in names]
    paths, labels = _images(image, limit)
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

        found = bench_images(
            network, batches, everything, labels=labels, classes=classes, rounds=rounds, advance=advance
        )
    found = recorded(found, everything, "asked").about(model=model, images=len(paths), folder=image.name)
    show_result(found, vision_report(found.rows, found.meta), out=out, json=json, records="images")


def _images(folder: Path, limit: int) -> tuple[list[Path], list[str] | None]:
    """Files, evenly taken from the folder, and their labels where it holds a folder for each class."""
    from quickmerge.datasets import find_data
    from quickmerge.datasets.labelled import read_labelled
    from quickmerge.sampling import evenly

    if folder.is_dir() and sum(path.is_dir() for path in folder.iterdir()) > 1:
        chosen = evenly(read_labelled(folder), limit)
        return [image.path for image in chosen], [image.label for image in chosen]
    data = find_data([folder])
    if data.kind != "images":
        raise QuickmergeError(f"quickmerge bench image needs a folder of images, got one of {data.kind}")
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


def _trained(given: str) -> tuple[Any, Any]:
    """A trained DynamicViT and the model that was trained with it, None where that is the one that is measured."""
    from quickmerge.merge.reducers import DynamicViT
    from quickmerge.models.load_vision import load_vision
    from quickmerge.models.share import fetched

    folder = Path(fetched(given, DynamicViT.hub_kind)).expanduser()
    backbone = folder / "backbone"
    return DynamicViT.from_pretrained(folder), load_vision(backbone, task="classify")[0] if backbone.is_dir() else None


def vlm(
    image: Annotated[Path, typer.Argument(help="A folder of images with annotations.jsonl.", metavar="FOLDER")],
    model: Annotated[str, typer.Option("--model", help="A vision-language model: a folder or a Hugging Face id.")],
    limit: IMAGES = 64,
    rounds: ROUNDS = 5,
    reducer: REDUCERS = "quickmerge,random",
    keep: Annotated[
        str, typer.Option("--keep", help="Shares of the visual tokens, with commas.", rich_help_panel=FEWER)
    ] = "0.5,0.25,0.11",
    out: REPORT = None,
    json: JSON = None,
) -> None:
    """Right answers by kind of question, and time, of every method at every share of the visual tokens."""
    from quickmerge.console.results import recorded, show_result
    from quickmerge.datasets.annotated import read_annotated
    from quickmerge.datasets.images import open_image
    from quickmerge.merge.bench.answers import answer_arms
    from quickmerge.merge.bench.vlm import answers_report, bench_answers
    from quickmerge.merge.reducers import make_reducer
    from quickmerge.sampling import evenly

    check_output(json, out / "report.html" if out is not None else None)
    shares = parse_keeps(keep)
    with one_sentence():
        methods = [make_reducer(name.strip(), place="visual") for name in reducer.split(",")]
    pictures = [picture for picture in read_annotated(image) if picture.questions]
    if not pictures:
        raise QuickmergeError(f"the folder must hold images with questions, got only labels in {image}")
    pictures = evenly(pictures, limit)
    seeing, processor = load_vlm(model)
    seen = open_image(pictures[0].path)
    with progress() as bar, one_sentence(Alone.asked(seeing, processor, seen)):
        arms = answer_arms(seeing, processor, methods, shares)
        task = bar.add_task("measuring", total=(1 + len(arms)) * (len(pictures) + rounds + 1))

        def advance(label: str) -> None:
            bar.update(task, advance=1, description=label)

        found = bench_answers(seeing, processor, pictures, arms, rounds=rounds, advance=advance)
    found = recorded(found, arms, "keep").about(model=model, images=len(pictures), folder=image.name)
    show_result(found, answers_report(found.rows, found.meta), out=out, json=json, records="images")
