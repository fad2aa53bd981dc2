"""``quickmerge bench``: quality beside cost for several reducers on your documents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quickmerge.cli.common import (
    JSON,
    LAYER,
    MODEL,
    PRIOR,
    add_prior,
    check_output,
    load_model,
    one_sentence,
    parse_keeps,
    parse_layer,
    parse_reducer,
    progress,
    read_text,
    write_json,
)

EXAMPLE = (
    "Example: quickmerge bench --text a.txt b.txt --reducer quickmerge,tome,random --keep 0.2,0.42 --json out.json"
)


def bench(
    text: Annotated[list[Path], typer.Option("--text", help="UTF-8 files of at least 1,000 tokens; give several.")],
    more: Annotated[list[Path] | None, typer.Argument(help="Further files after --text.", show_default=False)] = None,
    model: MODEL = "smollm2-135m",
    reducer: Annotated[
        str,
        typer.Option(
            "--reducer", help="Names with commas; see quickmerge ls. Settings may follow: quickmerge:recency=0.5."
        ),
    ] = "quickmerge,random",
    keep: Annotated[str, typer.Option("--keep", help="Shares with commas.")] = "0.2,0.42,0.6",
    layer: LAYER = None,
    context: Annotated[int, typer.Option("--context", help="Tokens of context per document.")] = 1024,
    target: Annotated[int, typer.Option("--target", help="Tokens of continuation that are scored.")] = 192,
    out: Annotated[Path | None, typer.Option("--out", help="Write report.html here (a folder).")] = None,
    prior: PRIOR = None,
    json: JSON = None,
) -> None:
    """Context recovery and cost of every reducer at every keep, on the same target tokens, timed interleaved."""
    from rich.console import Console

    from quickmerge.evaluation.bench import bench as measure
    from quickmerge.evaluation.bench import environment
    from quickmerge.evaluation.documents import split_document
    from quickmerge.report import bench_report, bench_table, write_page

    check_output(json, out / "report.html" if out is not None else None)
    keeps = parse_keeps(keep)
    methods = [parse_reducer(name.strip(), keeps[0]) for name in reducer.split(",")]
    if prior is not None:
        methods.append(add_prior(parse_reducer("quickmerge", keeps[0]), prior))
    depth = parse_layer(layer)
    paths = [*text, *(more or [])]
    texts = [read_text(path) for path in paths]
    lm, tokenizer = load_model(model)
    # Documents sorted into several folders are told apart by the folder's name in the tables.
    parents = [path.absolute().parent.name for path in paths]
    kinds = parents if len(set(parents)) > 1 else [None] * len(paths)
    documents = [
        # Folder and file name say which document it was, without where this machine keeps it.
        split_document(tokenizer, body, "/".join(path.absolute().parts[-2:]), context=context, target=target, kind=kind)
        for path, body, kind in zip(paths, texts, kinds, strict=True)
    ]
    with progress() as bar, one_sentence():
        task = bar.add_task("measuring", total=len(documents) * (1 + len(methods) * len(keeps)))

        def advance(label: str) -> None:
            bar.update(task, advance=1, description=Path(label).name)

        rows, records = measure(lm, documents, methods, keeps, layer=depth, advance=advance)
    meta = {
        "model": model, "context": context, "target": target, "layer": layer or "default",
        "documents": [document.name for document in documents], "environment": environment(),
        "reducers": {m.label: repr(m) for m in methods},
    }  # fmt: skip
    write_json(json, {"rows": rows, "documents": records, "meta": meta})
    bench_table(rows, Console())
    if out is not None:
        write_page(out / "report.html", bench_report(rows, meta))
        print(f"wrote {out / 'report.html'}")
