"""Spans in prefix mode: what the host tells a method of the text, and what it says where it knows none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hosts_zoo import build
from tokenizer_samples import byte_level

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.merge.tokens import MergePlan, TokenView
from quickmerge.models.spans import cut, pieces_of

TEXT = "The cat sat on the mat. A dog ran after it! " * 12


@dataclass(frozen=True)
class Watching(qm.QuickMerge):
    """QuickMerge that notes the views it is shown."""

    seen: list[TokenView] = field(default_factory=list, compare=False, repr=False)

    def plan(self, view: TokenView) -> MergePlan:
        self.seen.append(view)
        return super().plan(view)


def ids_of(text: str) -> list[int]:
    return list(byte_level().encode(text, add_special_tokens=False))


@pytest.fixture
def model() -> Any:
    return build("llama", vocab_size=512)


def read(model: Any, reducer: qm.QuickMerge, ids: torch.Tensor, mask: Any = None, **settings: Any) -> Any:
    with torch.no_grad(), qm.reduce(model, reducer, [1, 2], min_tokens=0, **settings) as run:
        model(ids, attention_mask=mask, logits_to_keep=1)
    return run


@pytest.mark.parametrize("side", ["left", "right"])
def test_views_tell_the_span_of_each_token_and_of_each_slot_that_of_its_anchor(model: Any, side: str) -> None:
    rows, pads = [ids_of(TEXT), ids_of(TEXT)[:120]], []
    width = len(rows[0])
    ids, mask = torch.full((2, width), 7), torch.zeros(2, width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
        pads.append(place.start)
    reducer = Watching(0.4)
    run = read(model, reducer, ids, mask, tokenizer=byte_level())
    first, second = reducer.seen
    for i, row in enumerate(rows):
        told, lines = first.group[i, first.valid[i]].tolist(), cut(pieces_of(row, byte_level()), "line")
        shut = first.protected[i, first.valid[i]].tolist()
        for j in range(1, len(row)):
            same = lines[j] == lines[j - 1] and shut[j] == shut[j - 1]
            assert (told[j] == told[j - 1]) is same
        anchors = second.position[i, second.valid[i]] + pads[i] - int(first.position[i, pads[i]])
        assert second.group[i, second.valid[i]].tolist() == first.group[i, anchors].tolist()
    assert run.summary().spans == "line" and "spans:" not in str(run.summary())


def test_a_batch_is_its_rows(model: Any) -> None:
    rows = [ids_of(TEXT)[:150], ids_of("So. " + TEXT)[:110]]
    ids, mask = torch.full((2, 150), 7), torch.ones(2, 150, dtype=torch.long)
    ids[0], ids[1, 40:], mask[1, :40] = torch.tensor(rows[0]), torch.tensor(rows[1]), 0
    both = read(model, qm.QuickMerge(0.4), ids, mask, tokenizer=byte_level()).plan
    for i, row in enumerate(rows):
        alone = read(model, qm.QuickMerge(0.4), torch.tensor([row]), tokenizer=byte_level()).plan
        kept = both.position[i, both.valid[i]]
        assert (kept - kept[0]).tolist() == (alone.position[0] - alone.position[0, 0]).tolist()


def test_where_no_tokenizer_is_known_it_is_said_and_nothing_changes(model: Any) -> None:
    ids = torch.tensor([ids_of(TEXT)])
    run = read(model, qm.QuickMerge(0.4), ids)
    plain = read(model, qm.QuickMerge(0.4, spans="none"), ids)
    assert torch.equal(run.plan.position, plain.plan.position)
    assert "  spans:   none, no tokenizer is known; pass tokenizer=..." in str(run.summary()).split("\n")
    assert plain.summary().spans == "" and "spans:" not in str(plain.summary())
    whole = read(model, qm.QuickMerge(1.0), ids)
    assert whole.plan.slots == ids.shape[1]


def test_a_unit_that_is_asked_for_needs_a_tokenizer_and_ids(model: Any) -> None:
    with pytest.raises(QuickmergeError, match="tokenizer must be given for spans='word', since none is known of Llama"):
        qm.reduce(model, qm.QuickMerge(0.4, spans="word"))
    with pytest.raises(ValueError, match="spans must be auto or none in block_causal mode, got 'line'"):
        qm.reduce(model, qm.QuickMerge(0.4, spans="line"), mode="block_causal")
    with pytest.raises(ValueError, match="tokenizer must be a tokenizer of transformers"):
        qm.reduce(model, qm.QuickMerge(0.4), tokenizer=3)
    ids = torch.tensor([ids_of(TEXT)])
    assert read(model, qm.QuickMerge(0.4, spans="word"), ids, tokenizer=byte_level()).summary().spans == "word"
    embeds = model.get_input_embeddings()(ids).detach()
    settings = {"min_tokens": 0, "tokenizer": byte_level()}
    with torch.no_grad(), qm.reduce(model, qm.QuickMerge(0.4), 1, **settings) as run:
        model(inputs_embeds=embeds)
    assert run.summary().spans == "none, there were inputs_embeds alone"
    refused = pytest.raises(QuickmergeError, match=r"spans='line' needs input_ids, .* called with inputs_embeds")
    with torch.no_grad(), qm.reduce(model, qm.QuickMerge(0.4, spans="line"), 1, **settings), refused:
        model(inputs_embeds=embeds)


def test_gradient_checkpointing_finds_what_was_decided(model: Any) -> None:
    """A block that is computed again merges as it did before, spans and all."""
    ids, grads = torch.tensor([ids_of(TEXT)]), []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            switch = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
            getattr(model, f"{switch}_checkpointing_enable")()
        model.zero_grad()
        with qm.reduce(model, qm.QuickMerge(0.4), [1, 2], min_tokens=0, tokenizer=byte_level()):
            model(ids, use_cache=False).logits.sum().backward()
        grads.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())
    torch.testing.assert_close(grads[0], grads[1])
