"""One text written with a drafter, with another, or by the model alone, and what it took."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quickmerge.bench.harness import Arm, Result, interleave, now
from quickmerge.bench.quality import check_fits, check_room
from quickmerge.bench.stats import bootstrap, ratio_interval, spread
from quickmerge.datasets.prompts import Prompt
from quickmerge.errors import QuickmergeError
from quickmerge.models.chat import document_chat
from quickmerge.models.generation import check_temperature
from quickmerge.speculative import Drafter, SpeculativeDecoding, Stats
from quickmerge.speculative.cost import measure
from quickmerge.speculative.proof import check_target

__all__ = [
    "PLAIN",
    "TRANSFORMERS_LOOKUP",
    "Written",
    "bench_drafters",
    "draft_arm",
    "draft_records",
    "draft_rows",
    "paired_row",
    "prepare",
    "prompt_ids",
    "warm_up",
    "write",
]


def draft_arm(name: str, drafter: Drafter, tree: int | str = "auto") -> Arm:
    """A way to write a text with a drafter; the settings of all such arms are arguments of ``generate``.

    Args:
        name: what tables call it.
        drafter: what drafts.
        tree: the nodes of a step, or ``"auto"``; see `quickmerge.SpeculativeDecoding`.

    Raises:
        ValueError: ``tree`` is not what `quickmerge.SpeculativeDecoding` takes.
    """
    engine = SpeculativeDecoding(drafter, tree=tree)
    return Arm(name, settings={"custom_generate": engine}, ingredients={"decoding": (drafter, tree)})


PLAIN = Arm("plain")
"""The model alone, one token a pass."""

TRANSFORMERS_LOOKUP = Arm("lookup (transformers)", settings={"prompt_lookup_num_tokens": 10})
"""The prompt lookup that transformers has, a single continuation of up to ten tokens."""


def engine_of(arm: Arm) -> SpeculativeDecoding | None:
    """What decodes in place of the model's own loop, if anything does."""
    engine: SpeculativeDecoding | None = arm.settings.get("custom_generate")
    return engine


@dataclass(frozen=True)
class Written:
    """A text and what it took.

    Attributes:
        ids: ``(n,)`` new tokens, the one that ends the text included.
        text: what they say.
        passes: of the target, the one that reads the prompt included; counted by a hook, whoever runs them.
        seconds: of the whole call of ``generate``.
        drafted: what the engine counted, where it ran.
    """

    ids: Tensor
    text: str
    passes: int
    seconds: float
    drafted: Stats | None = None

    @property
    def tokens(self) -> int:
        """New tokens."""
        return len(self.ids)

    @property
    def tokens_per_pass(self) -> float:
        """New tokens behind the first for each pass behind the prompt's: the model alone has exactly 1."""
        return (self.tokens - 1) / (self.passes - 1) if self.passes > 1 else 1.0

    @property
    def stats(self) -> str:
        """A few lines for people."""
        if self.drafted is not None:
            return self.drafted.summary()
        return f"{self.tokens} tokens in {self.passes} passes, {self.seconds:.2f} s"

    def as_dict(self) -> dict[str, Any]:
        """Everything but the text's ids, for JSON; with a drafter, what the engine counted too."""
        out: dict[str, Any] = {
            "text": self.text, "tokens": self.tokens, "passes": self.passes, "tokens_per_pass": self.tokens_per_pass,
            "seconds": self.seconds,
        }  # fmt: skip
        if self.drafted is not None:
            found = self.drafted
            out |= {
                "offered": list(found.offered), "accepted": list(found.accepted), "nodes": found.nodes,
                "draft_seconds": found.draft_seconds, "target_seconds": found.target_seconds,
                "prompt_seconds": found.prompt_seconds, "lossless": found.lossless,
            }  # fmt: skip
        return out


def prompt_ids(model: Any, tokenizer: Any, document: str, prompt: str, max_new_tokens: int) -> Tensor:
    """``(1, n)`` ids of a prompt about a document, through the chat template where there is one.

    Raises:
        QuickmergeError: they and ``max_new_tokens`` more are longer than the model's positions.
    """
    text, _ = document_chat(tokenizer, document, prompt)
    check_room(model, tokenizer, "the prompt", text, max_new_tokens)
    ids: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
    check_fits(model, "the prompt", ids, max_new_tokens)
    return ids


def prepare(model: Any, arm: Arm) -> float:
    """Do what is done once for a model: try whether it reads a tree, and measure c(T) for ``"auto"``; in seconds.

    Raises:
        QuickmergeError: the model can't read a tree, or the drafter was not made for it.
    """
    engine = engine_of(arm)
    if engine is None:
        return 0.0
    start = now(model.device)
    check_target(model)
    engine.drafter.check(model)
    if engine.auto:
        measure(model, engine.nodes)
    return now(model.device) - start


def write(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    arm: Arm = PLAIN,
    *,
    max_new_tokens: int = 128,
    sample: bool = False,
    temperature: float | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> Written:
    """Write on from a prompt. What `prepare` does is done first, and is in no count and no time.

    Args:
        model: the target, a causal LM in eval mode.
        tokenizer: of the model.
        ids: ``(1, n)`` of the prompt.
        arm: how.
        max_new_tokens: the most.
        sample: draw tokens instead of taking the best.
        temperature: of the sampling; None leaves it to the model's generation config.
        seed: for that.
        settings: further arguments of ``generate``.

    Raises:
        QuickmergeError: the drafter does not fit the model; see `quickmerge.SpeculativeDecoding`.
    """
    prepare(model, arm)
    given: dict[str, Any] = {**(settings or {}), **arm.settings}
    if temperature is not None:
        check_temperature("temperature", temperature)
        given["temperature"] = temperature
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    hook = model.base_model.register_forward_hook(count)
    torch.manual_seed(seed)
    try:
        start = now(model.device)
        with torch.inference_mode(), arm.context():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=sample,
                pad_token_id=tokenizer.pad_token_id,
                **given,
            )
        seconds = now(model.device) - start
    finally:
        hook.remove()
    new, engine = out[0, ids.shape[1] :].cpu(), engine_of(arm)
    text = tokenizer.decode(new, skip_special_tokens=True).strip()
    return Written(new, text, passes, seconds, engine.stats if engine is not None else None)


# The benchmark of drafters: how many tokens per forward pass of the target gives, and how much faster texts are
# written.


Row = dict[str, Any]
Advance = Callable[[str], None]

PURE = {"top_k": 0, "top_p": 1.0}
"""Sampling from the model's whole distribution, whatever its generation config says."""


def bench_drafters(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    arms: Sequence[Arm],
    *,
    temperatures: Sequence[float] = (0.0,),
    max_new_tokens: int = 128,
    advance: Advance = lambda _: None,
) -> Result:
    """Write on from every prompt in every way, and by the model alone.

    Args:
        model: the target, a causal LM in eval mode.
        tokenizer: of the model.
        prompts: what to write on from.
        arms: the ways, without the model alone.
        temperatures: 0 for the best token, above it for sampling.
        max_new_tokens: of a text.
        advance: called with a label before each text, for progress.

    Returns:
        One row for each temperature and way, the model alone first, and one record per text.
    """
    warm_up(model, tokenizer, prompts, arms, temperatures)
    records: list[Row] = []
    for number, prompt in enumerate(prompts):
        records += draft_records(
            model, tokenizer, prompt, arms, number, temperatures=temperatures, max_new_tokens=max_new_tokens,
            advance=advance,
        )  # fmt: skip
    return Result(draft_rows(records), records)


def warm_up(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], arms: Sequence[Arm], temperatures: Sequence[float]
) -> None:
    """Let every way write a few tokens once, unmeasured: the first time pays for allocation and for measuring c(T).

    Raises:
        QuickmergeError: there is no prompt, or a drafter does not fit the model.
    """
    if not prompts:
        raise QuickmergeError("prompts must hold at least one, got none")
    for arm in (PLAIN, *arms):
        for temperature in temperatures:
            ids = prompt_ids(model, tokenizer, "", prompts[0].text, 16)
            write(model, tokenizer, ids, arm, max_new_tokens=16, **_drawing(temperature))


def draft_records(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    arms: Sequence[Arm],
    number: int,
    *,
    temperatures: Sequence[float] = (0.0,),
    max_new_tokens: int = 128,
    advance: Advance = lambda _: None,
) -> list[Row]:
    """Write on from one prompt in every way, in an order that turns with the prompt's ``number``: a record for each.

    ``same`` says whether a greedy text is the model's own, token for token; None for texts that were sampled.
    """
    everything = (PLAIN, *arms)
    ids = prompt_ids(model, tokenizer, "", prompt.text, max_new_tokens)
    records = []
    for temperature in temperatures:

        def written(arm: Arm, ids: Tensor, number: int, temperature: float = temperature) -> Written:
            advance(f"{prompt.kind}: {arm.name}")
            return write(
                model, tokenizer, ids, arm, max_new_tokens=max_new_tokens, seed=number, **_drawing(temperature)
            )

        done = [found for (found,) in interleave(everything, [ids], written, first=number)]
        own = done[0].ids
        for arm, found in zip(everything, done, strict=True):
            engine = engine_of(arm)
            measured = {key: value for key, value in found.as_dict().items() if key != "text"}
            records.append({
                "prompt": number, "kind": prompt.kind, "temperature": temperature, "method": arm.name,
                "tree": None if engine is None else _tree(engine), "prompt_tokens": ids.shape[1], **measured,
                "text": hashlib.sha256(found.ids.numpy().tobytes()).hexdigest()[:16],
                "same": found.ids.tolist() == own.tolist() if temperature == 0 else None,
            })  # fmt: skip
    return records


def draft_rows(records: Sequence[Row]) -> list[Row]:
    """Average records over prompts, by temperature and way.

    ``tokens_per_pass`` is the sum of new tokens behind the first over the sum of passes behind the prompt's, with a
    bootstrap interval over prompts (prompts whose text ended with its first token count in neither); ``speedup`` the
    median over prompts, with quartiles, of the model's own seconds for each token over this way's;
    ``tokens_per_second`` all tokens over all seconds. ``reached`` is the share of steps whose walk came to depth 1, 2,
    ..., and ``nodes`` the mean number of nodes that a step read, where the engine ran.
    """
    rows = []
    for temperature, method in dict.fromkeys((r["temperature"], r["method"]) for r in records):
        mine = [r for r in records if (r["temperature"], r["method"]) == (temperature, method)]
        own = {
            r["prompt"]: r for r in records if (r["temperature"], r["method"]) == (temperature, PLAIN.name)
        }  # fmt: skip
        gain = [_pace(r) / _pace(own[r["prompt"]]) for r in mine]
        row: Row = {
            "temperature": temperature, "method": method, "tree": mine[0]["tree"], "prompts": len(mine),
            "tokens": sum(r["tokens"] for r in mine), "passes": sum(r["passes"] for r in mine), **_per_pass(mine),
            **spread("speedup", gain),
            "tokens_per_second": sum(r["tokens"] for r in mine) / sum(r["seconds"] for r in mine),
            "same": sum(r["same"] for r in mine) if temperature == 0 else None,
            "kinds": {
                kind: {"prompts": len(those), "tokens_per_pass": _per_pass(those, interval=False)["tokens_per_pass"],
                       "speedup": median(g for g, r in zip(gain, mine, strict=True) if r["kind"] == kind)}
                for kind in sorted({r["kind"] for r in mine})
                for those in [[r for r in mine if r["kind"] == kind]]
            },
        }  # fmt: skip
        if "draft_seconds" in mine[0]:
            steps = max(1, sum(r["passes"] - 1 for r in mine))
            depth = max(len(r["accepted"]) for r in mine)
            padded = [r["accepted"] + [0] * (depth - len(r["accepted"])) for r in mine]
            row |= {
                "draft_share": sum(r["draft_seconds"] for r in mine) / sum(r["seconds"] for r in mine),
                "target_share": sum(r["target_seconds"] for r in mine) / sum(r["seconds"] for r in mine),
                "nodes": sum(r["nodes"] for r in mine) / steps,
                "reached": [sum(counts) / steps for counts in zip(*padded, strict=True)],
                "lossless": all(r["lossless"] for r in mine),
            }  # fmt: skip
        rows.append(row)
    return rows


def paired_row(records: Sequence[Row], first: str, other: str, temperature: float = 0.0) -> Row:
    """One way against another on the same prompts.

    ``gain`` is the difference of their tokens per forward pass (see `draft_rows`), with a 95 % bootstrap interval for
    which prompts are drawn for both at once; ``speedup`` the median over prompts, with quartiles, of the other's
    seconds a token over the first's; ``faster`` the share of prompts on which the first was faster.

    Raises:
        QuickmergeError: no prompt was answered by both.
    """
    pair = [
        {r["prompt"]: r for r in records if (r["temperature"], r["method"]) == (temperature, name)}
        for name in (first, other)
    ]
    shared = sorted(pair[0].keys() & pair[1].keys())
    if not shared:
        raise QuickmergeError(f"records must hold a prompt that {first} and {other} both wrote on from, got none")
    tokens, passes = (
        np.array([[found[n][key] - 1 for n in shared] for found in pair], float) for key in ("tokens", "passes")
    )

    def gain(*counts: Any, axis: int) -> Any:
        first, other, passes_first, passes_other = (count.sum(axis) for count in counts)
        return first / np.maximum(1, passes_first) - other / np.maximum(1, passes_other)

    low, high = bootstrap(gain, *tokens, *passes)
    pace = [_pace(pair[0][n]) / _pace(pair[1][n]) for n in shared]
    return {
        "temperature": temperature, "method": first, "other": other, "prompts": len(shared),
        "gain": float(gain(*tokens, *passes, axis=-1)), "gain_low": float(low), "gain_high": float(high),
        **spread("speedup", pace),
        "faster": sum(p > 1 for p in pace) / len(pace),
    }  # fmt: skip


def _tree(engine: SpeculativeDecoding) -> int | str:
    return "auto" if engine.auto else engine.nodes


def _drawing(temperature: float) -> dict[str, Any]:
    """How `write` chooses tokens at a temperature."""
    return {"sample": True, "temperature": temperature, "settings": PURE} if temperature else {}


def _pace(record: Row) -> float:
    """Tokens a second."""
    return float(record["tokens"] / record["seconds"])


def _per_pass(records: Sequence[Row], *, interval: bool = True) -> Row:
    tokens = np.array([r["tokens"] - 1 for r in records], float)
    passes = np.array([r["passes"] - 1 for r in records], float)
    if not passes.sum():
        return {"tokens_per_pass": 1.0, "tokens_per_pass_low": 1.0, "tokens_per_pass_high": 1.0}
    found: Row = {"tokens_per_pass": float(tokens.sum() / passes.sum())}
    if interval:
        found["tokens_per_pass_low"], found["tokens_per_pass_high"] = ratio_interval(tokens, passes)
    return found
