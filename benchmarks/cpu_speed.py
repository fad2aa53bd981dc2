"""What a CPU core allows: precisions and drafters in turns on the same prompts (benchmarks/results/cpu_speed.json).

    python benchmarks/documents.py && python benchmarks/cpu_speed.py [--threads 1] [--prompts 6]

Every way writes on greedily from every prompt in turn, in another order for each: the model in float32, in bfloat16
and with dynamic int8 (torch's own), alone and with each drafter. Three kinds of prompts: questions through the chat
template, files of code that go on, and passages that are begun anew, which a model goes on to quote. Seconds are those
of the whole ``generate``, the prompt and everything a drafter does included; a ratio is of two ways on one prompt.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from documents import MANIFEST
from prompts import SAY, held_out_prompts
from torch import Tensor

import quickmerge as qm
from quickmerge.bench.harness import Arm, environment, interleave
from quickmerge.console.options import progress, quiet, write_json
from quickmerge.errors import QuickmergeError
from quickmerge.models import cache_folder
from quickmerge.speculative.bench import PLAIN, Written, draft_arm, prepare, prompt_ids, write
from quickmerge.speculative.cost import measure

HERE = Path(__file__).parent
NEW = 128
DRAFTERS = ("lookup", "suffix", "heads", "suffix+heads")
KINDS = ("chat", "code", "quoting")
PRECISIONS = ("float32", "bfloat16", "int8 (dynamic)")


@dataclass(frozen=True)
class Way:
    """A model in some precision, and what drafts for it."""

    precision: str
    drafter: str
    model: Any
    arm: Arm

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.precision}, {self.drafter}"


def main() -> int:
    """Measure and write; 2 where something that is needed is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=Path, help="folder that documents.py filled (default: in the cache folder)")
    parser.add_argument("--prompts", type=int, default=6, help="of each kind")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu_speed.json")
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(args.threads)
    try:
        write_json(args.out, run(args))
    except QuickmergeError as error:
        SAY.print(str(error), markup=False)
        return 2
    return 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured."""
    _, tokenizer = qm.load("smollm2-135m")
    found = ways()
    texts = prompts(tokenizer, args.documents, args.prompts)
    for way in found:
        prepare(way.model, way.arm)
        write(way.model, tokenizer, texts[0][1][:, -32:], way.arm, max_new_tokens=16)
    records: list[dict[str, Any]] = []
    with progress() as bar:
        task = bar.add_task("writing", total=len(texts) * len(found))

        def written(way: Way, ids: Tensor, number: int) -> Written:
            bar.advance(task)
            return write(way.model, tokenizer, ids, way.arm, max_new_tokens=NEW)

        for number, (kind, ids) in enumerate(texts):
            done = [each for (each,) in interleave(found, [ids], written, first=number)]
            own = {way.precision: each.ids for way, each in zip(found, done, strict=True) if way.drafter == "plain"}
            for way, each in zip(found, done, strict=True):
                records.append(
                    {
                        "kind": kind, "prompt": number, "tokens_in": ids.shape[1], "precision": way.precision,
                        "drafter": way.drafter, "tokens": each.tokens, "passes": each.passes, "seconds": each.seconds,
                        "tokens_per_pass": each.tokens_per_pass,
                        "same": each.ids.tolist() == own[way.precision].tolist(),
                        "same_as_float32": each.ids.tolist() == own["float32"].tolist(),
                    }
                )  # fmt: skip
    costs = {
        way.precision: dict(zip(*_cost(way.model), strict=True))
        for way in found
        if way.drafter == "plain" and way.precision in ("float32", "bfloat16")
    }
    return {
        "rows": rows(records),
        "costs": costs,
        "records": records,
        "meta": {
            "model": "smollm2-135m", "threads": args.threads, "new": NEW, "prompts": args.prompts,
            "environment": environment(),
        },
    }  # fmt: skip


def _cost(model: Any) -> tuple[list[str], list[float]]:
    """Seconds of passes over so many tokens against a pass over one."""
    cost = measure(model, 32)
    return [str(n) for n in cost.tokens], [seconds / cost.seconds[0] for seconds in cost.seconds]


def ways() -> list[Way]:
    """Each precision alone and, where a tree can be read, with each drafter."""
    found = []
    for precision in PRECISIONS:
        model, _ = qm.load("smollm2-135m", dtype="bfloat16" if precision == "bfloat16" else "float32")
        if precision.startswith("int8"):
            model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
        found.append(Way(precision, "plain", model, PLAIN))
        if precision.startswith("int8"):  # reads tokens of a pass together, which speculation refuses
            continue
        for name in DRAFTERS:
            found.append(Way(precision, name, model, draft_arm(name, drafter(name, model))))
    return found


def drafter(name: str, model: Any) -> Any:
    """A drafter by its name here; heads compute in bfloat16, also for a target in float32."""
    kinds = {
        "lookup": qm.PromptLookup,
        "suffix": lambda: qm.SuffixDecoding(memory=0),  # each prompt by itself: nothing is remembered
        "heads": lambda: qm.Gumiho.from_pretrained(qm.shipped_gumiho("smollm2-135m"), dtype="bfloat16"),
    }
    made = [kinds[part]() for part in name.split("+")]
    return made[0] if len(made) == 1 else qm.BestOf(*made)


def prompts(tokenizer: Any, documents: Path | None, count: int) -> list[tuple[str, Tensor]]:
    """``count`` prompts ``(1, n)`` of each kind, in turns."""
    model, _ = qm.load("smollm2-135m")
    chat = [prompt_ids(model, tokenizer, "", each.text, NEW) for each in held_out_prompts(documents, count)]
    folder = documents or cache_folder() / "documents"
    entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["documents"]
    test = [entry for entry in entries if entry["split"] == "test"]
    ids = {
        entry["file"]: tokenizer((folder / entry["file"]).read_text("utf-8"), return_tensors="pt")["input_ids"]
        for entry in test
    }
    code = [ids[entry["file"]][:, :600] for entry in test if entry["kind"] == "code"]
    again = tokenizer("\n\nThe same text once more:\n\n", return_tensors="pt", add_special_tokens=False)["input_ids"]
    prose = [ids[entry["file"]][:, :480] for entry in test if entry["kind"] != "code"]
    quoting = [torch.cat([text, again, text[:, :64]], 1) for text in prose]
    found = dict(zip(KINDS, (chat, code, quoting), strict=True))
    if short := [kind for kind, each in found.items() if len(each) < count]:
        raise QuickmergeError(f"--prompts must be at most {min(len(found[kind]) for kind in short)}, got {count}")
    return [(kind, found[kind][i]) for i in range(count) for kind in KINDS]


def rows(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each kind and way the median and quartiles of how many times as fast a token it is."""
    found = []
    for kind in KINDS:
        mine = [each for each in records if each["kind"] == kind]
        pace = {(r["prompt"], r["precision"], r["drafter"]): r["seconds"] / r["tokens"] for r in mine}
        for precision, drafter in dict.fromkeys((r["precision"], r["drafter"]) for r in mine):
            of = [r for r in mine if (r["precision"], r["drafter"]) == (precision, drafter)]
            own = {r["prompt"]: pace[r["prompt"], precision, drafter] for r in of}
            found.append(
                {
                    "kind": kind,
                    "precision": precision,
                    "drafter": drafter,
                    "of_plain": _spread([pace[i, precision, "plain"] / each for i, each in own.items()]),
                    "of_float32": _spread([pace[i, "float32", "plain"] / each for i, each in own.items()]),
                    "tokens_per_pass": median(r["tokens_per_pass"] for r in of),
                    "same": sum(r["same"] for r in of),
                    "same_as_float32": sum(r["same_as_float32"] for r in of),
                    "prompts": len(of),
                }
            )
    return found


def _spread(values: list[float]) -> list[float]:
    """Median, and the quartiles on both sides."""
    low, mid, high = quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return [mid, low, high]


if __name__ == "__main__":
    sys.exit(main())
