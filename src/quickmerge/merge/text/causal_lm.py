"""Attaching a reducer to a causal language model, in one of two modes."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from quickmerge.errors import as_index
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.text.block_causal import BlockCausalRun
from quickmerge.merge.text.modes import Mode, Prefix
from quickmerge.merge.text.prefix import PrefixRun
from quickmerge.merge.text.run import Run
from quickmerge.merge.tokens.budget import ReadingBudget, Schedule
from quickmerge.models.decoder import check_free, find_decoder


def reduce_lm(
    model: PreTrainedModel, reducer: Reducer, layer: int | Sequence[int] | Schedule | None, mode: Mode
) -> Run:
    """Attach to a causal language model; see `quickmerge.merge.attach.reduce` for the arguments."""
    if not isinstance(reducer, Reducer):
        raise ValueError(f"reducer must be a quickmerge reducer such as QuickMerge(keep=0.4), got {reducer!r}")
    decoder = find_decoder(model, shared=isinstance(mode, Prefix))
    if "text" not in reducer.places:
        kind = "vision transformers" if "vision" in reducer.places else "the visual tokens of a vision-language model"
        raise ValueError(f"reducer {reducer.name} is for {kind}, and {type(model).__name__} is a language model alone")
    if isinstance(mode, Prefix):
        check_free(model, decoder.attentions, PrefixRun)
        schedule = layer if isinstance(layer, Schedule) else Schedule.of(layer, len(decoder))
        if isinstance(reducer.budget, ReadingBudget):
            raise ValueError(f"keep must be a budget for whole prompts in prefix mode, got {reducer.budget!r}")
        reducer.check(model, schedule.layers, mode.name)
        return PrefixRun(decoder, reducer, schedule, mode)
    reads = reducer.budget.layer if isinstance(reducer.budget, ReadingBudget) else 0
    first = reads if layer is None else as_index(layer)
    if first is None or not 0 <= first < len(decoder):
        raise ValueError(f"layer must be one block in 0..{len(decoder) - 1} in block_causal mode, got {layer!r}")
    reducer.check(model, (first,), mode.name)
    return BlockCausalRun(decoder, reducer, first, mode)
