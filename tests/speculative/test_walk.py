"""The walk draws from the target's own distribution, whatever the draft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoding_samples import EveryWord, tiny
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from quickmerge.speculative import SpeculativeDecoding, Tree
from quickmerge.speculative.walk import Row, walk

WORDS = 5
SAMPLES = 4000
PROMPT = torch.tensor([[3, 1, 4]])

SETTINGS: dict[str, dict[str, Any]] = {
    "T=1": {"temperature": 1.0},
    "T=0.5": {"temperature": 0.5},
    "top-p": {"temperature": 1.0, "top_p": 0.8},
    "top-k": {"temperature": 1.3, "top_k": 3},
    "repetition": {"temperature": 0.8, "repetition_penalty": 1.8},
    "all": {"temperature": 0.7, "repetition_penalty": 0.6, "top_k": 4, "top_p": 0.9},
}


def model_of_words() -> Any:
    return tiny("llama", vocab_size=WORDS, initializer_range=0.35, eos_token_id=None, bos_token_id=None, pad_token_id=0)


def joint(model: Any, settings: dict[str, Any]) -> Tensor:
    """``(5, 5, 5)``: the probability of every text of three tokens, each step written out."""
    processors = LogitsProcessorList()
    if "repetition_penalty" in settings:
        processors.append(RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    processors.append(TemperatureLogitsWarper(settings["temperature"]))
    if "top_k" in settings:
        processors.append(TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        processors.append(TopPLogitsWarper(settings["top_p"]))

    def step(text: Tensor) -> Tensor:
        with torch.no_grad():
            return processors(text, model(input_ids=text).logits[:, -1].float()).softmax(-1).double()

    out = torch.zeros(WORDS, WORDS, WORDS, dtype=torch.float64)
    first = step(PROMPT)[0]
    for a in range(WORDS):
        second = step(torch.cat([PROMPT, torch.tensor([[a]])], 1))[0]
        for b in range(WORDS):
            third = step(torch.cat([PROMPT, torch.tensor([[a, b]])], 1))[0]
            out[a, b] = first[a] * second[b] * third
    return out


def p_value(counts: Tensor, probability: Tensor) -> float:
    """Of Pearson's chi-square, texts that are expected fewer than 5 times taken together."""
    expected = probability.flatten() * counts.sum()
    seen = counts.flatten().double()
    rare = expected < 5
    assert float(seen[expected == 0].sum()) == 0
    cells = torch.cat([expected[~rare], expected[rare].sum()[None]])
    found = torch.cat([seen[~rare], seen[rare].sum()[None]])
    cells, found = cells[cells > 0], found[cells > 0]
    x = ((found - cells) ** 2 / cells).sum()
    return float(1 - torch.special.gammainc(torch.tensor((len(cells) - 1) / 2, dtype=torch.float64), x / 2))


def sampled(model: Any, settings: dict[str, Any], tree: int) -> Tensor:
    torch.manual_seed(7)
    decoding = SpeculativeDecoding(EveryWord(WORDS, seed=3), tree=tree)
    texts = model.generate(
        PROMPT.expand(SAMPLES, -1), do_sample=True, max_new_tokens=3, custom_generate=decoding,
        **{"top_k": 0, "top_p": 1.0, **settings},
    )[:, 3:]  # fmt: skip
    assert decoding.stats.tokens_per_pass > 1.2 or tree == 1
    index = (texts * torch.tensor([WORDS**2, WORDS, 1])).sum(1)
    return torch.bincount(index, minlength=WORDS**3).view(WORDS, WORDS, WORDS)


@pytest.mark.parametrize("name", SETTINGS)
def test_three_tokens_are_distributed_as_the_target_has_them(name: str) -> None:
    model = model_of_words()
    wanted = joint(model, SETTINGS[name])
    assert float(wanted.sum()) == pytest.approx(1, abs=1e-6)
    counts = sampled(model, SETTINGS[name], tree=40)
    assert p_value(counts, wanted) > 1e-3
    # What is told apart: the same at another temperature.
    warmer = joint(model, {**SETTINGS[name], "temperature": SETTINGS[name]["temperature"] * 1.25})
    assert p_value(counts, warmer) < 1e-6


def row(sample: bool = False, processors: Any = (), end: int = 9, eos: int | None = None) -> Row:
    criteria = StoppingCriteriaList([MaxLengthCriteria(end)])
    if eos is not None:
        criteria.append(EosTokenCriteria(eos))
    return Row(torch.tensor([1, 2]), LogitsProcessorList(processors), criteria, sample)


def test_a_walk_by_hand() -> None:
    tree = Tree([2, 5, 6, 7, 5], [0, 0, 0, 1, 1], [1.0] * 5)
    for best, path, text in [
        ([5, 7, 0, 8, 0], [0, 1, 3], [1, 2, 5, 7, 8]),
        ([6, 0, 4, 0, 0], [0, 2], [1, 2, 6, 4]),
        ([3, 0, 0, 0, 0], [0], [1, 2, 3]),
    ]:
        mine, logits = row(), torch.eye(9)[best]
        assert mine.plain
        for given in (best, None):
            mine = row()
            assert walk(tree, mine, logits, given) == path
            assert mine.text.tolist() == text
            assert (mine.last, mine.length, mine.stop) == (text[-1], len(text), None)


def test_a_walk_ends_where_the_text_does() -> None:
    tree, logits = Tree.chain([2, 5, 6, 7]), torch.eye(9)[[5, 6, 7, 8]]
    for more, path, stop in [({"end": 3}, [0], 3), ({"end": 5}, [0, 1, 2], 5), ({"eos": 6}, [0, 1], 4)]:
        mine = row(**more)
        assert walk(tree, mine, logits) == path
        assert (mine.length, mine.stop) == (stop, stop)


def test_processors_see_the_text_so_far_and_may_write_into_the_scores() -> None:
    seen: list[list[int]] = []

    def spy(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(ids[0].tolist())
        assert scores.dtype == torch.float32
        scores[:, 5] = -torch.inf
        return scores

    logits = torch.eye(9, dtype=torch.bfloat16)[[5, 6, 7, 8]] + torch.arange(9) * 0.01
    kept = logits.clone()
    mine = row(processors=[spy])
    assert not mine.plain
    assert walk(Tree.chain([2, 8, 6, 7]), mine, logits) == [0, 1, 2, 3]
    assert mine.text.tolist() == [1, 2, 8, 6, 7, 8]
    assert seen == [[1, 2], [1, 2, 8], [1, 2, 8, 6], [1, 2, 8, 6, 7]]
    assert torch.equal(logits, kept)


def test_a_long_text_has_room() -> None:
    mine = row(end=10**6)
    for token in range(300):
        mine.take(token)
    assert mine.text.tolist() == [1, 2, *range(300)]
    assert mine.length == 302
