"""A real model in float32: the same greedy text, prompt by prompt and in padded batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quickmerge.speculative import PromptLookup, SpeculativeDecoding, Stats

ROOT = Path(__file__).parents[2]
NEW = 24


def texts(count: int) -> list[str]:
    """Pieces of this repository's prose and code, each of another length."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "src").rglob("*.py"))]
    lines = [line for file in files for line in file.read_text().splitlines() if len(line) > 40]
    step = len(lines) // count
    return ["\n".join(lines[i * step : i * step + 1 + i % 4]) for i in range(count)]


@pytest.mark.slow
def test_fifty_prompts_are_answered_as_without_speculation(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    decoding, total = SpeculativeDecoding(PromptLookup(), tree=6), Stats()
    prompts = texts(50)
    for batch in [*([one] for one in prompts[:10]), *(prompts[i : i + 10] for i in range(10, 50, 10))]:
        inputs = tokenizer(batch, return_tensors="pt", padding=True)
        wanted = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        found = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, custom_generate=decoding)
        assert torch.equal(found, wanted)
        total += decoding.stats
    print(total.summary())
    assert total.tokens_per_pass > 1.2
