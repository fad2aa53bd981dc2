"""One text written with a drafter, with another, or by the model alone, and what it took."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quickmerge.decoding import Drafter, SpeculativeDecoding, Stats
from quickmerge.decoding.cost import measure
from quickmerge.decoding.target import check_target
from quickmerge.evaluation.answer import chat, check_fits
from quickmerge.evaluation.first_tokens import check_room
from quickmerge.models.generation import check_temperature

__all__ = ["PLAIN", "TRANSFORMERS_LOOKUP", "DraftArm", "Written", "prepare", "prompt_ids", "write"]


@dataclass(frozen=True)
class DraftArm:
    """A way to write a text.

    Attributes:
        name: what tables call it.
        drafter: what drafts; None for nobody.
        tree: the nodes of a step, or ``"auto"``; see `quickmerge.SpeculativeDecoding`.
        settings: further arguments of ``generate``, such as ``prompt_lookup_num_tokens``.
    """

    name: str
    drafter: Drafter | None = None
    tree: int | str = "auto"
    settings: Mapping[str, Any] = field(default_factory=dict)


PLAIN = DraftArm("plain")
"""The model alone, one token a pass."""

TRANSFORMERS_LOOKUP = DraftArm("lookup (transformers)", settings={"prompt_lookup_num_tokens": 10})
"""The prompt lookup that transformers has, a single continuation of up to ten tokens."""


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
    text, _ = chat(tokenizer, document, prompt)
    check_room(model, tokenizer, "the prompt", text, max_new_tokens)
    ids: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
    check_fits(model, "the prompt", ids, max_new_tokens)
    return ids


def prepare(model: Any, arm: DraftArm) -> float:
    """Do what is done once for a model: try whether it reads a tree, and measure c(T) for ``"auto"``; in seconds.

    Raises:
        QuickmergeError: the model can't read a tree, or the drafter was not made for it.
        ValueError: ``arm.tree`` is not what `quickmerge.SpeculativeDecoding` takes.
    """
    if arm.drafter is None:
        return 0.0
    start = time.perf_counter()
    engine = SpeculativeDecoding(arm.drafter, tree=arm.tree)
    check_target(model)
    arm.drafter.check(model)
    if engine.auto:
        measure(model, engine.nodes)
    return time.perf_counter() - start


def write(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    arm: DraftArm = PLAIN,
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
    engine = None
    if arm.drafter is not None:
        engine = SpeculativeDecoding(arm.drafter, tree=arm.tree)
        given["custom_generate"] = engine
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
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=sample,
                pad_token_id=tokenizer.pad_token_id,
                **given,
            )
        new = out[0, ids.shape[1] :].cpu()  # waits for the device
        seconds = time.perf_counter() - start
    finally:
        hook.remove()
    text = tokenizer.decode(new, skip_special_tokens=True).strip()
    return Written(new, text, passes, seconds, engine.stats if engine is not None else None)
