"""Whole lines in a cache: what the host tells a method of the text, in layers that were merged and in others."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from caches import past
from hosts_zoo import build
from tokenizer_samples import byte_level
from torch import Tensor
from transformers import DynamicCache

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.merge.cache.view import CacheView
from quickmerge.models.spans import cut, pieces_of, within

TEXT = "The cat sat on the mat. A dog ran after it! " * 12


@dataclass(frozen=True)
class Noting(qm.AttentionNorm):
    """Keeps by lines, and notes what it is shown."""

    seen: list[CacheView] = field(default_factory=list, compare=False, repr=False)

    def scores(self, view: CacheView) -> Tensor:
        self.seen.append(view)
        return super().scores(view)


@pytest.fixture
def model() -> Any:
    return build("llama", vocab_size=512)


def ids_of(text: str) -> list[int]:
    return list(byte_level().encode(text, add_special_tokens=False))


def lines_of(row: list[int]) -> list[int]:
    """A number for each token, the same within a line."""
    return list(cut(pieces_of(row, byte_level()), "line"))


def breaks(lines: list[int]) -> list[bool]:
    """Where a line ends between neighbours."""
    return [a != b for a, b in pairwise(lines)]


@pytest.mark.parametrize("merge", [False, True])
def test_a_method_is_told_the_line_of_every_entry(model: Any, merge: bool) -> None:
    row = ids_of(TEXT)
    method = Noting(0.4, min_tokens=0)
    first, more = (qm.QuickMerge(0.5), {"layer": [2], "min_tokens": 0, "cache": method}) if merge else (method, {})
    with torch.no_grad(), qm.reduce(model, first, tokenizer=byte_level(), **more) as run:
        model(torch.tensor([row]), **past(DynamicCache(config=model.config)))
    assert run.summary().spans == "line"
    there = torch.ones(1, len(row), dtype=torch.bool)
    told = within(torch.tensor([lines_of(row)]), there, run.protected)[0].tolist()
    for layer, view in enumerate(method.seen):
        assert view.group is not None
        places = view.position[0].tolist()
        assert (len(places) < len(row)) == (merge and layer >= 2)
        assert breaks(view.group[0].tolist()) == breaks([told[place] for place in places])


def test_lines_stay_whole_but_for_the_one_at_which_the_budget_ends(model: Any) -> None:
    row = ids_of(TEXT)
    with torch.no_grad(), qm.reduce(model, qm.AttentionNorm(0.5, recency=0.0, min_tokens=0), tokenizer=byte_level()):
        cache = DynamicCache(config=model.config)
        model(torch.tensor([row]), **past(cache))
    full = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([row]), **past(full))
    told = lines_of(row)
    for layer, whole in zip(cache.layers, full.layers, strict=True):
        for head in range(2):
            kept = (layer.keys[0, head][:, None] == whole.keys[0, head][None]).all(-1).any(0).tolist()
            inner = [k for k in range(len(row)) if 4 <= k < len(row) - 16]
            broken = {told[k] for k in inner if kept[k]} & {told[k] for k in inner if not kept[k]}
            # Those at the borders of what is protected are cut there, and one by the budget.
            assert len(broken) <= 3


def test_where_no_tokenizer_is_known_it_is_said(model: Any) -> None:
    ids = torch.tensor([ids_of(TEXT)])
    with torch.no_grad():
        with qm.reduce(model, qm.AttentionNorm(0.4, min_tokens=0)) as run:
            model(ids)
        assert run.summary().spans.startswith("none, no tokenizer is known")
        with qm.reduce(model, qm.AttentionNorm(0.4, spans="none", min_tokens=0)) as run:
            model(ids)
        assert run.summary().spans == ""
        with (
            qm.reduce(model, qm.AttentionNorm(0.4, spans="word", min_tokens=0), tokenizer=byte_level()),
            pytest.raises(QuickmergeError, match="'word' needs input_ids"),
        ):
            model(inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(QuickmergeError, match="tokenizer is of what is merged"):
        qm.reduce(model, qm.SnapKV(0.4), tokenizer=byte_level())
    with pytest.raises(QuickmergeError, match=r"spans must be one of auto, line, word, none, got 'lines'.*line"):
        qm.AttentionNorm(spans="lines")
