"""Experimental: prompts merged inside vLLM's Llama. Blocks from one on read slots, and their caches hold slots.

vLLM counts a request by its tokens, and gives every block as many places in its cache. In front of the block where a
prompt is merged this takes over: what the blocks above are told of lengths, places in caches and positions is that of
the slots. Behind the last block rows of slots go back to those of tokens, so vLLM finds the last row of each request
where it looks. Compute is saved; memory of caches is not, since places that slots leave empty stay the request's.

Which request a row is, is known by the first block of its cache, which is its own as long as it runs. That is why
prefixes that requests share, prompts in chunks, drafts and preemption are refused, each by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError
from quickmerge.merge.place import Merge
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.reducers.reread import Reread
from quickmerge.merge.text.modes import Prefix
from quickmerge.merge.text.rows import protection, special_tokens
from quickmerge.merge.tokens.budget import Count, Ratio
from quickmerge.merge.tokens.plan import MergePlan
from quickmerge.merge.tokens.saliency import AttentionTrace
from quickmerge.merge.tokens.view import Evidence, TokenView
from quickmerge.serve.vllm.plugin import check_version

check_version()  # in front of what other versions may not have

from vllm import _custom_ops as ops  # noqa: E402
from vllm.config import CompilationMode, VllmConfig  # noqa: E402
from vllm.forward_context import get_forward_context  # noqa: E402
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM  # noqa: E402
from vllm.model_executor.models.utils import extract_layer_index  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.sequence import IntermediateTensors  # noqa: E402

from quickmerge.serve.vllm.settings import check_only, recipe_of  # noqa: E402

__all__ = ["QuickmergeLlama"]

WHERE = "quickmerge's Llama in vLLM"


@dataclass
class Reading:
    """One forward: which rows are prompts to merge, and what the blocks above the merge are told.

    ``starts (R + 1,)`` rows of each request, ``lengths (R,)`` of their texts, ``table (R, blocks)`` of their caches.
    """

    ids: Tensor | None
    starts: list[int]
    lengths: list[int]
    table: Tensor
    traces: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    positions: Tensor | None = None
    sizes: list[int] = field(default_factory=list)
    """Rows of each request above the merge."""

    @property
    def rows(self) -> Iterator[tuple[int, int, int]]:
        """Number, first row and rows of each request."""
        for row, first in enumerate(self.starts[:-1]):
            yield row, first, self.starts[row + 1] - first


class MergingLayer(LlamaDecoderLayer):
    """A block of vLLM's Llama that asks its model what it reads."""

    owner: Any = None

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", **more: Any) -> None:
        super().__init__(vllm_config, prefix=prefix, **more)
        self.index = extract_layer_index(prefix)
        self.self_attn.attn.register_forward_pre_hook(self._probe)

    def _probe(self, module: Any, args: Any) -> None:
        owner = self.owner[0]
        if owner.reading is not None and self.index in owner.probed:
            owner.reading.traces[self.index] = tuple(x.detach() for x in args[:3])

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Read tokens below the merge and slots above it."""
        owner = self.owner[0]
        reading: Reading | None = owner.reading
        if reading is not None and self.index >= owner.layer:
            if self.index == owner.layer:
                stream = hidden_states if residual is None else hidden_states + residual
                hidden_states, residual = owner.merged(reading, stream, positions), None
            assert reading.positions is not None
            positions = reading.positions
        out: tuple[Tensor, Tensor] = super().forward(positions, hidden_states, residual)
        return out


class QuickmergeLlama(LlamaForCausalLM):
    """vLLM's Llama, whose prompts the reducer of ``hf_overrides["quickmerge"]["merge"]`` merges in front of one block.

    What it writes is what `quickmerge.reduce(model, reducer, layer=...)` writes in transformers.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **more: Any) -> None:
        config = vllm_config.model_config.hf_config
        _check_engine(vllm_config)
        merge = _merge_of(config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=MergingLayer, **more)
        assert isinstance(merge.layer, int)
        self.layer, self.reducer = merge.layer, merge.reducer
        self.mode = merge.mode if isinstance(merge.mode, Prefix) else Prefix()
        self.probed = range(max(0, self.layer - self.reducer.needs.layers), self.layer)
        self.reading: Reading | None = None
        self._special = special_tokens(config)
        self._gone: dict[int, int] = {}
        """Tokens that are no longer there above the merge, of each request by the first block of its cache."""
        self._room = vllm_config.scheduler_config.max_num_seqs, vllm_config.model_config.max_model_len
        for layer in self.model.layers:
            layer.owner = (self,)  # in a tuple, so that it is no module inside of its own part

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        """As vLLM's own; the rows of prompts that were merged are NaN, but for the last one of each."""
        context = get_forward_context()
        if not isinstance(context.attn_metadata, dict) or not context.attn_metadata:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        names = [layer.self_attn.attn.layer_name for layer in self.model.layers]
        told = context.attn_metadata[names[0]]
        starts, lengths = told.query_start_loc.tolist(), told.seq_lens.tolist()
        self._check_room(told)
        self.reading = Reading(input_ids, starts, lengths, told.block_table)
        for row, _, count in self.reading.rows:
            if count not in (1, lengths[row]):
                raise QuickmergeError(
                    f"max_num_batched_tokens must let {WHERE} read a prompt at once, got {count} of {lengths[row]} "
                    "tokens"
                )
        try:
            with self._told_anew(context, names[self.layer :]):
                made: Tensor = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)
            return self._spread(self.reading, made, len(positions))
        finally:
            self.reading = None

    # Merging ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merged(self, reading: Reading, stream: Tensor, positions: Tensor) -> Tensor:
        """The rows that the blocks above the merge read, and what they are told of them."""
        parts, places, gone = [], [], []
        for row, first, count in reading.rows:
            own, at = stream[first : first + count], positions[first : first + count]
            block = int(reading.table[row, 0])
            if count == reading.lengths[row]:  # a prompt
                plan = self._plan(reading, first, own, at)
                if plan is not None:
                    own, at = plan.merge(own[None])[0], plan.position[0]
                self._gone[block] = count - len(own)
            parts.append(own)
            places.append(at.to(positions.dtype))
            gone.append(self._gone[block])
        reading.sizes, reading.positions = [len(each) for each in parts], torch.cat(places)
        self._tell(reading, gone)
        return torch.cat(parts)

    def _plan(self, reading: Reading, first: int, stream: Tensor, at: Tensor) -> MergePlan | None:
        """The plan for a prompt, as a run in prefix mode makes it; None where every token stays."""
        count = len(stream)
        if count < self.mode.min_tokens:
            return None
        valid = torch.ones(1, count, dtype=torch.bool, device=stream.device)
        ids = None if reading.ids is None else reading.ids[None, first : first + count]
        kept = protection(valid, ids, self._special, sinks=self.mode.sinks, recent=self.mode.recent)
        traces = []
        for layer in self.probed:
            attention = self.model.layers[layer].self_attn
            heads = attention.num_heads, attention.num_kv_heads, attention.num_kv_heads
            query, key, value = (
                x[first : first + count].view(count, n, attention.head_dim).transpose(0, 1)[None]
                for x, n in zip(reading.traces[layer], heads, strict=True)
            )
            traces.append(AttentionTrace(query, key, value, attention.scaling))
        view = TokenView(
            stream[None], valid=valid, protected=kept.protected, exempt=kept.exempt, position=at[None],
            evidence=Evidence(attention=traces, layer=self.layer),
        )  # fmt: skip
        if not bool(view.free.any()):
            return None
        plan = self.reducer.plan(view)
        return None if int(plan.valid.sum()) == count else plan

    # Telling vLLM -----------------------------------------------------------------------------------------------

    @contextmanager
    def _told_anew(self, context: Any, names: list[str]) -> Iterator[None]:
        """Keep what the blocks above the merge are told apart from what vLLM gave, which is put back."""
        was = {name: (context.attn_metadata[name], context.slot_mapping.get(name)) for name in names}
        try:
            yield
        finally:
            for name, (told, slots) in was.items():
                context.attn_metadata[name] = told
                if slots is not None:
                    context.slot_mapping[name] = slots

    def _tell(self, reading: Reading, gone: list[int]) -> None:
        """Tell the blocks above the merge how long their texts are, and where in their caches rows belong."""
        context = get_forward_context()
        above = [layer.self_attn.attn for layer in self.model.layers[self.layer :]]
        told, first = context.attn_metadata[above[0].layer_name], above[0]
        size = first.kv_cache.shape[2]
        lengths = [length - less for length, less in zip(reading.lengths, gone, strict=True)]
        slots = []
        for row, (length, count) in enumerate(zip(lengths, reading.sizes, strict=True)):
            place = torch.arange(length - count, length, device=reading.table.device)
            slots.append(reading.table[row, place // size].long() * size + place % size)
        starts = torch.tensor([0, *reading.sizes]).cumsum(0).to(told.query_start_loc)
        seq_lens = torch.tensor(lengths).to(told.seq_lens)
        impl = first.impl
        plan = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lengths), num_heads=impl.num_heads, num_kv_heads=impl.num_kv_heads, head_dim=impl.head_size,
            seq_lens=seq_lens, dtype=reading_dtype(self), query_start_loc=starts, causal=True, sliding_window_size=-1,
            isa=first.isa, enable_kv_split=False, dynamic_causal=None, kv_cache_dtype=impl.kv_cache_dtype,
        )  # fmt: skip
        mapping = torch.cat(slots).to(told.slot_mapping)
        new = replace(
            told, num_actual_tokens=sum(reading.sizes), max_query_len=max(reading.sizes), query_start_loc=starts,
            max_seq_len=max(lengths), seq_lens=seq_lens, slot_mapping=mapping, scheduler_metadata=plan,
        )  # fmt: skip
        for attention in above:
            context.attn_metadata[attention.layer_name] = new
            context.slot_mapping[attention.layer_name] = mapping

    def _spread(self, reading: Reading, made: Tensor, rows: int) -> Tensor:
        """Rows of slots as rows of tokens: of a prompt that was merged the last one alone."""
        out = made.new_full((rows, made.shape[-1]), torch.nan)
        at = 0
        for (_, first, count), size in zip(reading.rows, reading.sizes, strict=True):
            own = size if size == count else 1
            out[first + count - own : first + count] = made[at + size - own : at + size]
            at += size
        return out

    def _check_room(self, told: Any) -> None:
        """Refuse a cache that requests may be thrown out of: those that come back can't be told from new prompts."""
        cache = self.model.layers[0].self_attn.attn.kv_cache
        blocks, size = cache.shape[0] - 1, cache.shape[2]  # vLLM keeps one block for itself
        requests, longest = self._room
        if blocks < requests * -(-longest // size):
            raise QuickmergeError(
                f"max_num_seqs must be at most {blocks // -(-longest // size)} for {WHERE}, so that all requests of "
                f"{longest} tokens fit into the cache at once and none is preempted, got {requests}"
            )


def reading_dtype(model: Any) -> torch.dtype:
    """What a model computes in."""
    found: torch.dtype = next(model.parameters()).dtype
    return found


def _check_engine(vllm_config: Any) -> None:
    """Raise for settings of an engine under which a prompt can't be merged, each by its name."""
    scheduler, cache, parallel = vllm_config.scheduler_config, vllm_config.cache_config, vllm_config.parallel_config
    if not current_platform.is_cpu():
        raise QuickmergeError(f"{WHERE} is experimental and runs on CPUs alone, whose attention it knows")
    wanted: list[tuple[str, Any, Any]] = [
        ("enforce_eager", vllm_config.compilation_config.mode == CompilationMode.NONE, True),
        ("enable_prefix_caching", bool(cache.enable_prefix_caching), False),
        ("enable_chunked_prefill", bool(scheduler.enable_chunked_prefill), False),
        ("tensor_parallel_size", parallel.tensor_parallel_size, 1),
        ("pipeline_parallel_size", parallel.pipeline_parallel_size, 1),
    ]
    for name, given, must in wanted:
        if given != must:
            raise QuickmergeError(f"{name} must be {must!r} for {WHERE}, got {given!r}")
    if vllm_config.speculative_config is not None:
        raise QuickmergeError(f"speculative_config must be left out for {WHERE}, which reads one new token at a time")
    if getattr(vllm_config.model_config.hf_config, "sliding_window", None):
        raise QuickmergeError(f"sliding_window must be None for {WHERE}, whose slots have no distance in tokens")


def _merge_of(config: Any) -> Merge:
    """What a configuration asks for.

    Raises:
        QuickmergeError: it asks for something that can't be.
    """
    recipe = recipe_of(config)
    check_only(recipe, "merge")
    merge = recipe.merge
    assert isinstance(merge, Merge)
    reducer: Reducer = merge.reducer
    depth = config.num_hidden_layers
    if not isinstance(merge.layer, int) or not 1 <= merge.layer < depth:
        raise QuickmergeError(f"layer must be one block in 1..{depth - 1} for {WHERE}, got {merge.layer!r}")
    if not isinstance(merge.mode, (Prefix, type(None))):
        raise QuickmergeError(f"mode must be Prefix(...) for {WHERE}, got {merge.mode!r}")
    if not isinstance(reducer.budget, (Count, Ratio)):
        raise QuickmergeError(f"keep must be a share or a Count for {WHERE}, got {reducer.keep!r}")
    if isinstance(reducer, Reread) or type(reducer).align is not Reducer.align:
        raise QuickmergeError(f"merge must be a method that reads a prompt once and was not trained for {WHERE}, got "
                              f"{reducer.name}")  # fmt: skip
    if reducer.needs.spans is not None:
        raise QuickmergeError(f"spans must be 'none' for {WHERE}, which knows no text of tokens, got {reducer.label}")
    if reducer.proportional:
        raise QuickmergeError(
            f"proportional must be False for {WHERE}, whose attention can't count a slot as its tokens, got "
            f"{reducer.label}"
        )
    return merge
