"""Attaching a reducer to a causal language model, in one of two modes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from quickmerge.errors import as_index, whole_number
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.text.block_causal import BlockCausalRun
from quickmerge.merge.text.prefix import PrefixRun
from quickmerge.merge.text.rows import MIN_TOKENS
from quickmerge.merge.text.run import Run
from quickmerge.merge.tokens.budget import ReadingBudget, Schedule
from quickmerge.models.decoder import check_free, find_decoder

MODES = ("prefix", "block_causal")


def reduce_lm(
    model: PreTrainedModel,
    reducer: Reducer,
    layer: int | Sequence[int] | Schedule | None = None,
    *,
    mode: str = "prefix",
    sinks: int = 4,
    recent: int = 16,
    protect: Callable[[Tensor], Tensor] | None = None,
    min_tokens: int = MIN_TOKENS,
    chunk: int = 128,
    window: int = 64,
) -> Run:
    """Attach to a causal language model; see `quickmerge.merge.attach.reduce` for the arguments."""
    if not isinstance(reducer, Reducer):
        raise ValueError(f"reducer must be a quickmerge reducer such as QuickMerge(keep=0.4), got {reducer!r}")
    decoder = find_decoder(model, shared=mode == "prefix")
    if "text" not in reducer.places:
        kind = "vision transformers" if "vision" in reducer.places else "the visual tokens of a vision-language model"
        raise ValueError(f"reducer {reducer.name} is for {kind}, and {type(model).__name__} is a language model alone")
    if mode == "prefix":
        check_free(model, decoder.attentions, PrefixRun)
        schedule = layer if isinstance(layer, Schedule) else Schedule.of(layer, len(decoder))
        sinks = whole_number("sinks", sinks, 0)
        recent = whole_number("recent", recent, 1)
        min_tokens = whole_number("min_tokens", min_tokens, 0)
        if isinstance(reducer.budget, ReadingBudget):
            raise ValueError(f"keep must be a budget for whole prompts in prefix mode, got {reducer.budget!r}")
        reducer.check(model, schedule.layers, mode)
        return PrefixRun(decoder, reducer, schedule, sinks=sinks, recent=recent, protect=protect, min_tokens=min_tokens)
    if mode == "block_causal":
        reads = reducer.budget.layer if isinstance(reducer.budget, ReadingBudget) else 0
        first = reads if layer is None else as_index(layer)
        if first is None or not 0 <= first < len(decoder):
            raise ValueError(f"layer must be one block in 0..{len(decoder) - 1} in block_causal mode, got {layer!r}")
        if protect is not None:
            raise ValueError("protect must be None in block_causal mode, got a function")
        if min_tokens != MIN_TOKENS:
            raise ValueError(f"min_tokens is for prefix mode and must be left out in {mode} mode, got {min_tokens!r}")
        sinks = whole_number("sinks", sinks, 0)
        chunk = whole_number("chunk", chunk, 2)
        window = whole_number("window", window, 1)
        reducer.check(model, (first,), mode)
        return BlockCausalRun(decoder, reducer, first, sinks=sinks, chunk=chunk, window=window)
    raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
