"""The benchmark of drafters: how many tokens a pass of the target gives, and how much faster texts are written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import Any

import numpy as np

from quickmerge.errors import QuickmergeError
from quickmerge.evaluation.drafters import PLAIN, DraftArm, prompt_ids, write
from quickmerge.evaluation.prompts import Prompt
from quickmerge.evaluation.recovery import bootstrap

__all__ = ["bench_drafters", "draft_records", "draft_rows", "paired_row", "warm_up"]

Row = dict[str, Any]
Advance = Callable[[str], None]

PURE = {"top_k": 0, "top_p": 1.0}
"""Sampling from the model's whole distribution, whatever its generation config says."""


def bench_drafters(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    arms: Sequence[DraftArm],
    *,
    temperatures: Sequence[float] = (0.0,),
    max_new_tokens: int = 128,
    advance: Advance = lambda _: None,
) -> tuple[list[Row], list[Row]]:
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
    return draft_rows(records), records


def warm_up(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], arms: Sequence[DraftArm], temperatures: Sequence[float]
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
    arms: Sequence[DraftArm],
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
        done = {}
        for turn in range(len(everything)):
            arm = everything[(turn + number) % len(everything)]
            advance(f"{prompt.kind}: {arm.name}")
            done[arm.name] = write(
                model, tokenizer, ids, arm, max_new_tokens=max_new_tokens, seed=number, **_drawing(temperature)
            )
        own = done[PLAIN.name].ids
        for arm in everything:
            found = done[arm.name]
            measured = {key: value for key, value in found.as_dict().items() if key != "text"}
            records.append({
                "prompt": number, "kind": prompt.kind, "temperature": temperature, "method": arm.name,
                "tree": arm.tree if arm.drafter is not None else None, "prompt_tokens": ids.shape[1], **measured,
                "text": hashlib.sha256(found.ids.numpy().tobytes()).hexdigest()[:16],
                "same": found.ids.tolist() == own.tolist() if temperature == 0 else None,
            })  # fmt: skip
    return records


def draft_rows(records: Sequence[Row]) -> list[Row]:
    """Average records over prompts, by temperature and way.

    ``per_pass`` is the sum of new tokens behind the first over the sum of passes behind the prompt's, with a bootstrap
    interval over prompts (prompts whose text ended with its first token count in neither); ``speedup`` the median over
    prompts, with quartiles, of the model's own seconds for each token over this way's; ``per_second`` all tokens over
    all seconds. ``reached`` is the share of steps whose walk came to depth 1, 2, ..., and ``nodes`` the mean number of
    nodes that a step read, where the engine ran.
    """
    rows = []
    for temperature, method in dict.fromkeys((r["temperature"], r["method"]) for r in records):
        mine = [r for r in records if (r["temperature"], r["method"]) == (temperature, method)]
        own = {
            r["prompt"]: r for r in records if (r["temperature"], r["method"]) == (temperature, PLAIN.name)
        }  # fmt: skip
        gain = [_pace(r) / _pace(own[r["prompt"]]) for r in mine]
        low, middle, high = quantiles(gain, n=4) if len(gain) > 1 else gain * 3
        row: Row = {
            "temperature": temperature, "method": method, "tree": mine[0]["tree"], "prompts": len(mine),
            "tokens": sum(r["tokens"] for r in mine), "passes": sum(r["passes"] for r in mine), **_per_pass(mine),
            "speedup": middle, "speedup_low": low, "speedup_high": high,
            "per_second": sum(r["tokens"] for r in mine) / sum(r["seconds"] for r in mine),
            "same": sum(r["same"] for r in mine) if temperature == 0 else None,
            "kinds": {
                kind: {"prompts": len(those), "per_pass": _per_pass(those, interval=False)["per_pass"],
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

    ``gain`` is the difference of their tokens a pass (see `draft_rows`), with a 95 % bootstrap interval for which
    prompts are drawn for both at once; ``speedup`` the median over prompts, with quartiles, of the other's seconds a
    token over the first's; ``faster`` the share of prompts on which the first was faster.

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
    draw = np.random.default_rng(0).integers(0, len(shared), (2000, len(shared)))
    drawn = tokens[:, draw].sum(-1) / np.maximum(1, passes[:, draw].sum(-1))
    mean = tokens.sum(-1) / np.maximum(1, passes.sum(-1))
    low, high = np.percentile(drawn[0] - drawn[1], [2.5, 97.5])
    pace = [_pace(pair[0][n]) / _pace(pair[1][n]) for n in shared]
    quarter, middle, upper = quantiles(pace, n=4) if len(pace) > 1 else pace * 3
    return {
        "temperature": temperature, "method": first, "other": other, "prompts": len(shared),
        "gain": float(mean[0] - mean[1]), "gain_low": float(low), "gain_high": float(high),
        "speedup": middle, "speedup_low": quarter, "speedup_high": upper,
        "faster": sum(p > 1 for p in pace) / len(pace),
    }  # fmt: skip


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
        return {"per_pass": 1.0, "per_pass_low": 1.0, "per_pass_high": 1.0}
    found: Row = {"per_pass": float(tokens.sum() / passes.sum())}
    if interval:
        found["per_pass_low"], found["per_pass_high"] = bootstrap(tokens, passes, resamples=2000, seed=0)
    return found
