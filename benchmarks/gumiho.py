"""Drafters side by side: tokens per forward pass and speed on held-out prompts (results/gumiho.json).

    python benchmarks/documents.py
    python benchmarks/gumiho.py --drafters gumiho=runs/gumiho,serial=runs/serial,parallel=runs/parallel

Plain generate, prompt lookup (ours and that of transformers) and every folder of draft heads write on from each prompt
in turn, in another order for each, greedily and sampling, all drafters with trees of as many nodes (--tree). On some of
the prompts the first heads then run with trees of other sizes, with those that are chosen by cost, and with Full Tree
Attention; prompt lookup with chosen ones too. At the end passes of the target are timed by the number of nodes.

What was measured is noted prompt by prompt in the cache folder: a run that was broken off goes on where it was when it
is started again with the same settings. Timings of such a run come from several sittings, but every prompt from one.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from notes import Notes
from prompts import COUNT, SAY, held_out_prompts
from rich.console import Console

import quickmerge as qm
from quickmerge.bench.harness import Arm, environment
from quickmerge.console.options import one_sentence, progress, quiet, write_json
from quickmerge.datasets.prompts import Prompt
from quickmerge.errors import QuickmergeError
from quickmerge.models import cache_folder
from quickmerge.models.identity import model_hash
from quickmerge.speculative.bench import (
    TRANSFORMERS_LOOKUP,
    draft_arm,
    draft_records,
    draft_rows,
    paired_row,
    prepare,
    warm_up,
)
from quickmerge.speculative.cost import measure as measure_cost
from quickmerge.speculative.gumiho import Gumiho
from quickmerge.speculative.report import drafters_report

HERE = Path(__file__).parent
TREES = (4, 8, 16, 32)
FTA_TREE = 16
"""Nodes of the trees with Full Tree Attention: fixed, so that it is all that differs."""
MOST_NODES = 64


def main() -> int:
    """Measure and write; 2 where something that is needed is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafters", default="", help="name=FOLDER of train gumiho, with commas, the main one first")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--documents", type=Path, help="folder that documents.py filled (default: in the cache folder)")
    parser.add_argument("--prompts", type=int, default=COUNT, help="the first so many")
    parser.add_argument("--tree-prompts", type=int, default=24, help="of them for the trees of fixed sizes; 0 for none")
    parser.add_argument("--tree", type=int, default=8, help="nodes of a step, for all drafters alike")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, help="of torch; default: as many as it takes")
    parser.add_argument("--notes", type=Path, help="default: gumiho.partial.jsonl in the cache folder")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gumiho.json")
    args = parser.parse_args()
    if args.prompts < 1 or args.tree_prompts < 0 or args.max_new_tokens < 2 or min(args.temperature) < 0:
        parser.error("--prompts must be at least 1, --tree-prompts 0, --max-new-tokens 2 and --temperature 0")
    if args.tree < 2:
        parser.error("--tree must be at least 2")
    quiet()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        with one_sentence():
            measure(args)
    except QuickmergeError as error:
        SAY.print(str(error), markup=False)
        return 2
    return 0


def measure(args: argparse.Namespace) -> None:
    """Write on from every prompt in every way, and put the results into one file."""
    folders = parse_drafters(args.drafters)
    heads = {name: Gumiho.from_pretrained(folder) for name, folder in folders.items()}
    prompts = held_out_prompts(args.documents, args.prompts)
    model, tokenizer = qm.load(args.model)
    arms = [TRANSFORMERS_LOOKUP, draft_arm("lookup", qm.PromptLookup(), args.tree)]
    arms += [draft_arm(name, drafter, args.tree) for name, drafter in heads.items()]
    trees = tree_arms(*next(iter(folders.items()))) if folders else tree_arms("lookup", None)
    settings = {
        "model": model_hash(model), "prompts": _told(prompts), "arms": [arm.name for arm in arms],
        "trees": [arm.name for arm in trees], "tree": args.tree,
        "heads": {name: _weights(folder) for name, folder in folders.items()},
        "temperature": args.temperature, "max_new_tokens": args.max_new_tokens, "threads": torch.get_num_threads(),
    }  # fmt: skip
    notes = Notes(args.notes or cache_folder() / "gumiho.partial.jsonl", settings)
    parts = {
        "all": (prompts, arms, args.temperature),
        "trees": (prompts[: args.tree_prompts], trees, [0.0]),
    }
    for arm in (*arms, *trees):
        prepare(model, arm)
    with progress() as bar:
        total = sum(len(asked) * (1 + len(ways)) * len(at) for asked, ways, at in parts.values())
        task = bar.add_task("measuring", total=total)

        def advance(label: str) -> None:
            bar.update(task, advance=1, description=label)

        records = {part: _answers(part, model, tokenizer, notes, args, advance, *of) for part, of in parts.items()}
    cost = measure_cost(model, MOST_NODES)
    rows = draft_rows(records["all"])
    first = next(iter(heads), "lookup")
    others = [arm.name for arm in arms if arm.name != first]
    meta = {
        "model": args.model, "dtype": str(model.dtype).removeprefix("torch."), "prompts": len(prompts),
        "tree": args.tree, "tree_prompts": args.tree_prompts, "temperature": args.temperature,
        "max_new_tokens": args.max_new_tokens,
        "heads": {name: _shape(drafter) for name, drafter in heads.items()},
    }  # fmt: skip
    write_json(args.out, {
        "rows": rows,
        "paired": [paired_row(records["all"], first, other, t) for t in args.temperature for other in others],
        "trees": draft_rows(records["trees"]) if records["trees"] else [],
        "costs": [
            {"nodes": n, "seconds": s, "ratio": s / cost.seconds[0]}
            for n, s in zip(cost.tokens, cost.seconds, strict=True)
        ],
        "prompts": [_short(record) for record in records["all"]],
        "meta": meta,
        "environment": environment(),
    })  # fmt: skip
    notes.remove()
    drafters_report(rows, meta).print(Console())


def _answers(
    part: str,
    model: Any,
    tokenizer: Any,
    notes: Notes,
    args: argparse.Namespace,
    advance: Any,
    prompts: list[Prompt],
    arms: list[Arm],
    temperatures: list[float],
) -> list[dict[str, Any]]:
    """The records of one part, those that are noted already among them."""
    left = [number for number in range(len(prompts)) if f"{part} {number}" not in notes.done]
    if left:
        warm_up(model, tokenizer, prompts, arms, temperatures)
    for number, prompt in enumerate(prompts):
        key = f"{part} {number}"
        if number in left:
            found = draft_records(
                model, tokenizer, prompt, arms, number, temperatures=temperatures, max_new_tokens=args.max_new_tokens,
                advance=advance,
            )  # fmt: skip
            notes.add(key, found)
        else:
            for record in notes.done[key]:
                advance(record["method"])
    return [record for number in range(len(prompts)) for record in notes.done[f"{part} {number}"]]


def parse_drafters(text: str) -> dict[str, Path]:
    """``"gumiho=runs/a,serial=runs/b"`` as folders by name.

    Raises:
        QuickmergeError: it is something else, or a name is taken.
    """
    found: dict[str, Path] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, folder = part.partition("=")
        if not (name and equals and folder):
            raise QuickmergeError(f"--drafters must be name=FOLDER with commas, got {part!r}")
        if name in found or name in ("plain", "lookup", TRANSFORMERS_LOOKUP.name):
            raise QuickmergeError(f"--drafters must give each a name of its own, got {name!r} again")
        found[name] = Path(folder).expanduser()
    return found


def tree_arms(name: str, folder: Path | None) -> list[Arm]:
    """Fixed trees and ``auto`` for one drafter, and Full Tree Attention where it has parallel heads."""
    drafter = qm.PromptLookup() if folder is None else Gumiho.from_pretrained(folder)
    arms = [draft_arm(f"{name}, {tree} nodes", drafter, tree) for tree in TREES] + [draft_arm(f"{name}, auto", drafter)]
    if folder is not None:
        arms.append(draft_arm("lookup, auto", qm.PromptLookup()))
    if folder is not None and drafter.config.heads:
        arms += [
            draft_arm(f"{name}, {FTA_TREE} nodes, fta={fta}", Gumiho.from_pretrained(folder, fta=fta), FTA_TREE)
            for fta in ("duplicate", "reference")
        ]
    return arms


def _told(prompts: list[Prompt]) -> str:
    return hashlib.sha256("\n\0".join(prompt.text for prompt in prompts).encode()).hexdigest()


def _weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def _shape(drafter: Gumiho) -> dict[str, Any]:
    """What a set of heads is made of."""
    config = drafter.config
    return {
        "parameters": sum(p.numel() for p in drafter.network.parameters()), "serial": config.serial,
        "serial_layers": config.serial_layers, "heads": config.heads, "draft_vocabulary": config.draft_vocabulary,
    }  # fmt: skip


def _short(record: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a record in the results."""
    kept = ("prompt", "kind", "temperature", "method", "prompt_tokens", "tokens", "passes", "same", "text")
    return {key: record[key] for key in kept} | {"seconds": round(record["seconds"], 4)}


if __name__ == "__main__":
    sys.exit(main())
