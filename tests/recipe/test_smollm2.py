"""A real model in float32: drafts inside a recipe change nothing, prompt by prompt and in padded batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import quickmerge as qm
from quickmerge.merge.place import Merge
from quickmerge.speculative import Stats

NEW = 24
SETTINGS = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


def prompts(count: int, vocabulary: int) -> list[Tensor]:
    """Random tokens of 120 to 240, in which pieces come again, so that there is something to look up."""
    rng = torch.Generator().manual_seed(11)
    found = []
    for _ in range(count):
        length = int(torch.randint(120, 241, (1,), generator=rng))
        words = torch.randint(100, vocabulary, (length // 3,), generator=rng)
        found.append(torch.cat([words, words, words, words[:2]])[:length])
    return found


def padded(rows: list[Tensor]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.slow
@pytest.mark.parametrize("attention", [None, qm.Multipole(budget=64, interval=16)], ids=["merge", "merge + multipole"])
def test_sixty_four_prompts_are_answered_as_without_drafts(
    smollm2: tuple[Any, Any], attention: qm.Multipole | None
) -> None:
    model, _ = smollm2
    merge, total = Merge(qm.QuickMerge(keep=0.4), mode=qm.Prefix(min_tokens=0)), Stats()
    rows = prompts(64, model.config.vocab_size)
    batches = [*([row] for row in rows[:8]), *(rows[i : i + 8] for i in range(8, 64, 8))]
    plain = qm.Recipe(merge=merge, attention=attention)
    drafting = qm.Recipe(merge=merge, attention=attention, decoding=qm.Speculation(qm.PromptLookup(), tree=6))
    for batch in batches:
        inputs = padded(batch)
        with qm.apply(model, plain) as run:
            wanted = model.generate(**inputs, **SETTINGS)
        assert all(kept < whole for kept, whole in zip(*_read(run, batch), strict=True))
        with qm.apply(model, drafting) as run:
            assert torch.equal(model.generate(**inputs, **SETTINGS), wanted)
        total += run.summary()["decoding"]
    print(total.summary())
    assert total.rows == 64 and total.tokens_per_pass > 1.1


def _read(run: Any, batch: list[Tensor]) -> tuple[list[float], list[int]]:
    """Mean tokens that the blocks read of a prompt, and its own."""
    stats: Callable[[], Any] = run.summary
    layers = stats()["merge"].tokens_per_layer
    return [sum(layers) / len(layers)], [max(map(len, batch))]
