"""What ``generate`` was given and does not hand on to a callable ``custom_generate``.

transformers gives a ``custom_generate`` neither the streamer (though it has put the prompt into it), nor the tokenizer
of ``stop_strings``, nor ``assistant_model``, nor ``synced_gpus``. So the step in which ``generate`` sorts these
arguments is listened to, from the first `SpeculativeDecoding` on, and what it was given is noted in a context variable,
of which every thread has its own. Calls without a callable ``custom_generate`` are left as they are.
"""

from __future__ import annotations

import inspect
import time
from contextvars import ContextVar
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar
from weakref import ref

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.models.compat import (
    AlternatingCodebooksLogitsProcessor,
    ClassifierFreeGuidanceLogitsProcessor,
    GenerateDecoderOnlyOutput,
    GenerationMode,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    cache_name,
    device_of,
    given_cache,
    hear_generate,
    is_users_cache,
)
from quickmerge.models.generation import check_temperature
from quickmerge.models.moved import onto
from quickmerge.speculative.cost import Cost, Pace, best_size, measure, measure_behind
from quickmerge.speculative.drafter import Drafter, Stats, serving
from quickmerge.speculative.prompt import AnyTarget, Room, read_prompt
from quickmerge.speculative.proof import check_target
from quickmerge.speculative.tree import Packed, Tree, pack
from quickmerge.speculative.walk import Batch, Ends, Row, choices, for_row, walk

__all__ = ["Handed", "SpeculativeDecoding", "check_arguments", "handed_to", "listen"]


@dataclass(frozen=True)
class Handed:
    """Arguments of one ``generate``.

    Attributes:
        streamer: is waiting for tokens; None for nobody.
        assistant_model: as given.
        synced_gpus: as given.
    """

    streamer: Any = None
    assistant_model: Any = None
    synced_gpus: bool = False


_NOW: ContextVar[tuple[ref[Any], Handed] | None] = ContextVar("quickmerge_generate", default=None)


def listen() -> None:
    """Begin to note what ``generate`` is given, unless that is done."""
    hear_generate(_note)


def handed_to(model: Any) -> Handed:
    """What the ``generate`` of ``model`` that is running in this thread was given.

    Raises:
        QuickmergeError: none is running that could be seen, so that a streamer would wait for ever.
    """
    found = _NOW.get()
    if found is None or found[0]() is not model:
        raise QuickmergeError(
            "SpeculativeDecoding must be called by model.generate(..., custom_generate=...), in the same thread: "
            "otherwise what generate was given, such as a streamer, can't be seen"
        )
    return found[1]


def _note(model: Any, custom_generate: Any, given: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Note what one ``generate`` is given.

    Args:
        model: whose it is.
        custom_generate: as given.
        given: ``tokenizer``, ``assistant_model``, ``streamer`` and ``synced_gpus``, as given.
        kwargs: all other keyword arguments.

    Returns:
        What ``custom_generate`` shall get beside what it would have got anyway. ``generate`` makes a stopping
        criterion of ``stop_strings`` only where the tokenizer is among it.
    """
    _NOW.set(None)
    if not callable(custom_generate):
        return {}
    _NOW.set((ref(model), Handed(given["streamer"], given["assistant_model"], bool(given["synced_gpus"]))))
    tokenizer = given["tokenizer"]
    wanted = kwargs.get("stop_strings") is not None and _takes(custom_generate, "tokenizer")
    ours = getattr(custom_generate, "takes_tokenizer", False)
    return {"tokenizer": tokenizer} if tokenizer is not None and (wanted or ours) else {}


def _takes(function: Any, name: str) -> bool:
    """Whether a function can be given an argument by this name."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


# What of ``generate``'s arguments speculation can't keep: each told in one sentence.


NEVER = (
    AlternatingCodebooksLogitsProcessor,
    ClassifierFreeGuidanceLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
"""Processors that run the model themselves, or count its steps."""

OUTPUTS = ("output_attentions", "output_hidden_states", "output_logits", "output_scores")


def check_arguments(
    input_ids: Tensor,
    config: GenerationConfig,
    processors: LogitsProcessorList,
    model_kwargs: dict[str, Any],
    handed: Handed,
) -> None:
    """Raise QuickmergeError for what speculation can't keep."""
    rows = len(input_ids)
    if handed.assistant_model is not None:
        raise QuickmergeError("assistant_model must be left out: the drafter takes its place")
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise QuickmergeError(
            f"speculative decoding is for greedy search and sampling, got {mode.value}: "
            "leave num_beams, penalty_alpha, dola_layers and prompt_lookup_num_tokens out"
        )
    for name in OUTPUTS:
        if getattr(config, name, None):
            raise QuickmergeError(f"{name} must be False with speculative decoding, got True")
    if config.use_cache is False or model_kwargs.get("use_cache") is False:
        raise QuickmergeError("use_cache must be True with speculative decoding, got False")
    if config.do_sample and config.temperature is not None:
        check_temperature("temperature", config.temperature)
    if config.prefill_chunk_size is not None:
        raise QuickmergeError(f"prefill_chunk_size must be left out, got {config.prefill_chunk_size}")
    if handed.synced_gpus:
        raise QuickmergeError("synced_gpus must be False with speculative decoding, got True")
    if input_ids.dim() != 2 or input_ids.shape[1] == 0 or model_kwargs.get("inputs_embeds") is not None:
        raise QuickmergeError("speculative decoding needs the prompt as input_ids of at least one token, no embeddings")
    if handed.streamer is not None and rows > 1:
        raise QuickmergeError(f"streamer takes one row, got {rows}")
    for processor in processors:
        if isinstance(processor, NEVER):
            raise QuickmergeError(
                f"{type(processor).__name__} does not work with speculative decoding: leave guidance_scale out"
            )
        if rows > 1 and isinstance(processor, SynthIDTextWatermarkLogitsProcessor):
            # It remembers what it was last asked about, and would be asked about one row after another.
            raise QuickmergeError(f"watermarking_config of SynthID takes one row, got {rows}")


# ``SpeculativeDecoding``: ``generate`` with several tokens a step, and the same text.


class SpeculativeDecoding:
    """Decoding in which a drafter guesses several tokens and the target checks all guesses in one pass.

    Give it to ``model.generate(..., custom_generate=SpeculativeDecoding(drafter))``. Every token is drawn from the
    target's own distribution, after all of ``generate``'s processors, so the text is what the target alone would
    write: the same greedy text (but for ties within rounding), and samples of the same distribution.

    It keeps greedy search and sampling with any processors, left-padded batches, ``num_return_sequences``, stopping
    criteria (asked after every token), ``stop_strings``, ``max_new_tokens``, ``return_dict_in_generate`` with sequences
    and cache, a cache given, and for one row a streamer. It is seeded by `torch.manual_seed`: each row draws from a
    generator of its own, once a token, so a seed gives the same text whatever the drafter, the size of the trees and
    the machine's speed (but for rounding), though another than ``generate`` gives. Criteria are called with one row at
    a time, and so are processors: one that keeps something from call to call needs a batch of one row.

    transformers hands some arguments of ``generate`` to no ``custom_generate``. They are seen all the same, also where
    ``custom_generate`` is a function that calls this object (see `quickmerge.speculative.engine`): a streamer is
    served, and what can't be kept is refused. One model may serve several threads, each with a drafter of its own.

    Args:
        drafter: what guesses.
        nodes: the most nodes of a tree if ``tree`` is ``"auto"``, the root included.
        tree: how many nodes are read in a step for each row: ``"auto"``, as many as give the most tokens a second by
            the drafter's probabilities and by the time that passes of the target take on this machine, which is
            measured once (see `quickmerge.speculative.cost`); or a number, the root included.

    Attributes:
        stats: of the last ``generate`` that ended.
        takes_tokenizer: that ``generate`` may hand its tokenizer on.

    Raises:
        ValueError: if ``nodes`` or ``tree`` is out of range.
    """

    takes_tokenizer: ClassVar[bool] = True

    def __init__(self, drafter: Drafter, *, nodes: int = 32, tree: str | int = "auto") -> None:
        if not isinstance(drafter, Drafter):
            raise ValueError(f"drafter must be a quickmerge.speculative.Drafter, got {type(drafter).__name__}")
        nodes = whole_number("nodes", nodes)
        if tree != "auto":
            if isinstance(tree, str):
                raise ValueError(f"tree must be 'auto' or a whole number of at least 1, got {tree!r}")
            tree = whole_number("tree", tree)
        self.drafter = drafter
        self.nodes = nodes if isinstance(tree, str) else tree
        self.auto = isinstance(tree, str)
        self.stats = Stats()
        listen()

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        tokenizer: Any = None,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """What ``generate`` calls, with everything prepared.

        Raises:
            UnsupportedModelError: for a model that can't read a tree, or that the drafter was not made for.
            QuickmergeError: for arguments of ``generate`` that can't be kept, and where the drafter is in use.
        """
        handed = handed_to(model)
        check_arguments(input_ids, generation_config, logits_processor, model_kwargs, handed)
        with serving(self.drafter):
            return self._generate(
                model, input_ids, logits_processor, stopping_criteria, generation_config, handed, model_kwargs
            )

    def _generate(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        handed: Handed,
        model_kwargs: dict[str, Any],
    ) -> Tensor | GenerateDecoderOnlyOutput:
        why = check_target(model)
        self.drafter.check(model)
        start = time.perf_counter()
        cost = measure(model, self.nodes) if self.auto else None
        measured = time.perf_counter()
        sample, count, device = bool(generation_config.do_sample), len(input_ids), input_ids.device
        ends = Ends(stopping_criteria, device)
        streamer, generators = handed.streamer, _generators(count, input_ids.device) if sample else [None] * count
        rows = [
            Row(ids, for_row(logits_processor, i, count), ends, sample, streamer, generator, device)
            for i, (ids, generator) in enumerate(zip(input_ids.cpu(), generators, strict=True))
        ]
        run = _Run(self.drafter, self.nodes, cost, Batch(rows, generation_config, stopping_criteria), why)
        # A cache that someone will go on with has to hold all rows to the end.
        cache = given_cache(model_kwargs)
        kept = bool(generation_config.return_dict_in_generate) or is_users_cache(cache)
        run.begin(model, input_ids, model_kwargs, kept)
        while run.live:
            run.step()
        if streamer is not None:
            streamer.end()
        sequences = run.batch.sequences()
        if kept:
            run.finish_cache(sequences)
        self.stats = run.stats
        self.stats.rows = len(rows)
        self.stats.tokens = sum((row.stop or row.length) - input_ids.shape[1] for row in rows)
        self.stats.seconds = time.perf_counter() - measured - self.stats.measure_behind_seconds
        self.stats.measure_seconds = measured - start + self.stats.measure_behind_seconds
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences, **{cache_name(): run.target.cache})
        return sequences


class _Run:
    """One ``generate``: the rows that are in the cache, and among them those that are not done."""

    def __init__(self, drafter: Drafter, nodes: int, cost: Cost | None, batch: Batch, why: str = "") -> None:
        self.drafter = drafter
        self.why = why
        self.nodes = nodes
        self.cost = cost
        self.pace = Pace(cost) if cost is not None else None
        self.batch = batch
        self.rows = list(batch.rows)
        self.stats = Stats(chains=why)
        self.drafted: list[float] = []  # seconds of each draft

    def begin(self, model: PreTrainedModel, ids: Tensor, model_kwargs: dict[str, Any], kept: bool) -> None:
        """Read the prompt and take the first token of each row."""
        start = time.perf_counter()
        wanted = self.drafter.needs_features
        prompt = read_prompt(model, ids.to(device_of(model)), model_kwargs, wanted, self.why)
        self.target: AnyTarget = prompt.target
        self.kept = kept
        self.room = Room(model.config.get_text_config(decoder=True))
        widest = self.target.widest
        if widest is not None and widest < min(2, self.nodes):
            raise QuickmergeError(
                f"queries must be at least 2 in multipole attention for drafted tokens to be read at once, got {widest}"
            )
        self.nodes = min(self.nodes, widest or self.nodes)
        self.offset = list(prompt.offset)
        logits = prompt.logits[:, None]
        roots = [Tree.chain([row.last]) for row in self.rows]
        chosen = choices(self.rows, roots, logits)
        for i, row in enumerate(self.rows):
            walk(roots[i], row, logits[i], None if chosen is None else chosen[i])
        self.live = list(range(len(self.rows)))
        self._rest()
        self.stats.prompt_seconds = time.perf_counter() - start
        if self.live and self.cost is not None and self.target.columns.shift:
            # What a pass takes depends on how long a past is read by clusters.
            start = time.perf_counter()
            self.cost = measure_behind(self.target, self.nodes) or self.cost
            self.pace = Pace(self.cost)
            self.stats.measure_behind_seconds = time.perf_counter() - start
        if self.live:
            start = time.perf_counter()
            self.drafter.expect(self.cost)
            self.drafter.begin(model, prompt.ids, prompt.valid, prompt.features, prompt.positions)
            self._leave(list(range(len(self.rows))))
            self.stats.draft_seconds += time.perf_counter() - start

    def step(self) -> None:
        """Draft, read, walk, and keep what was accepted."""
        live, device = self.live, self.target.columns.valid.device
        drafts = len(self.drafted)
        trees = dict(zip(live, self._draft(), strict=True))
        start = time.perf_counter()
        packed = self._pack([trees.get(i, _NOTHING) for i in range(len(self.rows))], device)
        passes = self.target.passes
        logits, features = self.target.read(packed)
        passes = self.target.passes - passes
        mine = logits if len(live) == len(self.rows) else logits[onto(torch.tensor(live), device)]
        chosen = choices([self.rows[i] for i in live], [trees[i] for i in live], mine)
        # Tokens have been read, so the device is done; but where the texts have a say that comes later.
        self.stats.target_seconds += time.perf_counter() - start
        paths: list[list[int]] = [[] for _ in self.rows]
        for at, i in enumerate(live):
            paths[i] = walk(trees[i], self.rows[i], mine[at], None if chosen is None else chosen[at])
            self.stats.count(max(trees[i].depth), len(paths[i]) - 1, len(trees[i]))
            self.stats.lossless &= not trees[i].extra
        self.stats.passes += passes
        self.stats.row_passes += (passes - 1) * len(live)  # those that caught up, with no tree to count
        if self.pace is not None and len(self.drafted) > max(1, drafts):  # the first one has read the prompt too
            read = [trees[i] for i in live]
            self.pace.saw(
                len(live), max(map(len, read)), sum(sum(tree.prob[1:]) for tree in read),
                sum(len(paths[i]) - 1 for i in live), self._draft_seconds(),
            )  # fmt: skip
        self.target.commit(paths)
        self._rest()
        if self.live:
            start = time.perf_counter()
            tokens = [torch.tensor([trees[i].tokens[node] for node in paths[i]]) for i in live]
            self.drafter.accept(tokens, None if features is None else _along(features, [paths[i] for i in live], live))
            self._leave(live)
            self.stats.draft_seconds += time.perf_counter() - start

    def finish_cache(self, sequences: Tensor) -> None:
        """Make the cache what ``generate`` would leave: every token but the last of all, each in its column."""
        self.target.finish(sequences)

    def _rest(self) -> None:
        """Rows that are done are live no longer."""
        live, pad = self.live, self.batch.pad or 0
        self.live = [i for i in live if not self.batch.done(self.rows[i])]
        if self.kept:
            for i in live:
                if i not in self.live:
                    self.target.rest(i, self.rows[i].last, pad)

    def _draft(self) -> list[Tree]:
        """A tree for each live row."""
        rows = [self.rows[i] for i in self.live]
        roots = [row.length - 1 + self.offset[i] for i, row in zip(self.live, rows, strict=True)]
        depths = self.room.depths(roots, [self.batch.left(row) for row in rows])
        if (room := self.target.room()) is not None:
            depths = [min(depth, room[i]) for i, depth in zip(self.live, depths, strict=True)]
        last = [row.last for row in rows]
        if self.nodes == 1 or not any(depths) or (self.pace is not None and not self.pace.drafts()):
            return [Tree.chain([token]) for token in last]
        start = time.perf_counter()
        trees = self.drafter.draft(torch.tensor(last), self.nodes)
        self.drafted.append(time.perf_counter() - start)
        self.stats.draft_seconds += self.drafted[-1]
        if [tree.tokens[0] for tree in trees] != last:
            raise QuickmergeError(
                f"{type(self.drafter).__name__}.draft must return a tree for each row with its last token as the root, "
                f"got roots {[tree.tokens[0] for tree in trees]} for {last}"
            )
        trees = [self.target.narrowed(tree).cut(depth) for tree, depth in zip(trees, depths, strict=True)]
        nodes = self.nodes
        if self.cost is not None:
            nodes = best_size([tree.prob for tree in trees], self.cost, self._draft_seconds())
        return [tree.best(nodes) for tree in trees]

    def _pack(self, trees: list[Tree], device: torch.device) -> Packed:
        """The trees side by side, padded to a size that is faster to read if there is one."""
        wide = max(len(tree) for tree in trees)
        padded = wide if self.cost is None else int(self.cost.widths(len(trees), wide)[-1])
        return pack(trees, device, min(padded, self.target.widest or padded))

    def _draft_seconds(self) -> float:
        """What a draft takes, the first one left out where there are others."""
        return median(self.drafted[1:] or self.drafted)

    def _leave(self, drafted: list[int]) -> None:
        """Let rows that are done leave the drafter, which holds rows ``drafted``, and the cache if nobody keeps it."""
        if self.live == drafted:
            return
        self.drafter.rows(torch.tensor([drafted.index(i) for i in self.live]))
        if not self.kept:
            self.target.select(torch.tensor(self.live))
            self.rows = [self.rows[i] for i in self.live]
            self.offset = [self.offset[i] for i in self.live]
            self.live = list(range(len(self.rows)))


_NOTHING = Tree.chain([0])
"""Stands for a row that is done."""


def _generators(rows: int, device: torch.device) -> list[torch.Generator]:
    """One for each row, seeded by torch's global one."""
    seeds = torch.randint(2**63 - 1, (rows,), device=device).tolist()
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def _along(features: Tensor, paths: list[list[int]], rows: list[int]) -> list[Tensor]:
    """The features ``(k, H)`` of the nodes on each path, of ``features (B, T, H)`` and the paths of some rows."""
    flat = [row * features.shape[1] + node for row, path in zip(rows, paths, strict=True) for node in path]
    picked = features.flatten(0, 1).index_select(0, onto(torch.tensor(flat), features.device))
    return list(torch.split(picked, [len(path) for path in paths]))
