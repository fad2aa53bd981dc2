"""Attaching a reducer to a causal language model, in one of two modes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Unpack, overload

from torch import nn
from transformers import PreTrainedModel

from quickmerge.errors import QuickmergeError, as_index
from quickmerge.merge.cache import Evictor, as_evictor
from quickmerge.merge.place import PLACES, Merge, Place
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.reducers.reread import Reread
from quickmerge.merge.run import Run
from quickmerge.merge.text.block_causal import BlockCausalRun
from quickmerge.merge.text.blocks import schedule_of
from quickmerge.merge.text.modes import BlockCausal, Mode, ModeSettings, Prefix, as_mode
from quickmerge.merge.text.prefix import PrefixRun
from quickmerge.merge.text.reread import RereadRun
from quickmerge.merge.tokens.budget import Schedule
from quickmerge.merge.tokens.removal import Removal
from quickmerge.merge.vision.timm import reduce_timm
from quickmerge.merge.vision.vit import VisionRun, reduce_vit
from quickmerge.merge.visual.places import reduce_vlm, reduce_vlm_places
from quickmerge.merge.visual.vlm import VlmRun
from quickmerge.models.attachment import Attachment
from quickmerge.models.decoder import check_free, find_decoder
from quickmerge.models.encoder import holds_encoder, holds_timm
from quickmerge.models.vlm import check_kind, holds_vlm, unwrapped


def reduce_lm(
    model: PreTrainedModel,
    reducer: Reducer | None,
    layer: int | Sequence[int] | Schedule | None,
    mode: Mode,
    cache: Evictor | None = None,
) -> Run:
    """Attach to a causal language model; see `quickmerge.merge.attach.reduce` for the arguments."""
    if reducer is None and cache is not None:
        decoder = find_decoder(model, shared=True)
        check_free(model, decoder.attentions, PrefixRun)
        _check_cache(mode, cache)
        assert isinstance(mode, Prefix)
        return PrefixRun(decoder, None, None, mode, cache)
    if not isinstance(reducer, Reducer):
        raise ValueError(f"reducer must be a quickmerge reducer such as QuickMerge(keep=0.4), got {reducer!r}")
    _check_cache(mode, cache)
    decoder = find_decoder(model, shared=isinstance(mode, Prefix))
    if "text" not in reducer.places:
        kind = "vision transformers" if "vision" in reducer.places else "the visual tokens of a vision-language model"
        raise ValueError(f"reducer {reducer.name} is for {kind}, and {type(model).__name__} is a language model alone")
    if isinstance(mode, Prefix):
        check_free(model, decoder.attentions, PrefixRun)
        if isinstance(reducer, Reread):
            if layer is not None:
                raise ValueError(
                    f"layer must be left out for {reducer.name}, which reads a prompt again from the first block: say "
                    f"{type(reducer).__name__}(block=...) where it looks, got {layer!r}"
                )
            if cache is not None and (cache.replays or cache.unrotates):
                raise ValueError(
                    f"cache must be another method than {cache.name} beside {reducer.name}, which changes where tokens "
                    "stand: one that neither reads a prompt again nor turns keys back"
                )
            reducer.check(model, (), mode.name)
            return RereadRun(decoder, reducer, mode, cache)
        schedule = schedule_of(decoder, layer)
        reducer.check(model, schedule.layers, mode.name)
        return PrefixRun(decoder, reducer, schedule, mode, cache)
    if isinstance(reducer, Reread):
        raise ValueError(f"reducer {reducer.name} reads a prompt twice, which block_causal mode can't: use prefix mode")
    first = 0 if layer is None else as_index(layer)
    if first is None or not 0 <= first < len(decoder):
        raise ValueError(f"layer must be one block in 0..{len(decoder) - 1} in block_causal mode, got {layer!r}")
    reducer.check(model, (first,), mode.name)
    return BlockCausalRun(decoder, reducer, first, mode)


def _check_cache(mode: Mode, cache: Evictor | None) -> None:
    if cache is not None and not isinstance(mode, Prefix):
        raise QuickmergeError(
            f"cache must be None in {mode.name} mode, whose cache holds slots of chunks already, got {cache.label}"
        )


# ``reduce``: run a model with fewer tokens inside a ``with`` block, and leave it as it was.


@overload
def reduce(
    model: PreTrainedModel | nn.Module,
    reducer: Reducer | Evictor | None,
    layer: int | Sequence[int] | Schedule | None = None,
    *,
    mode: Prefix,
    cache: Evictor | float | str | None = None,
) -> PrefixRun: ...


@overload
def reduce(
    model: PreTrainedModel | nn.Module,
    reducer: Reducer,
    layer: int | None = None,
    *,
    mode: BlockCausal,
) -> BlockCausalRun: ...


@overload
def reduce(
    model: PreTrainedModel | nn.Module,
    reducer: Reducer,
    layer: int | Sequence[int] | Removal | None = None,
    *,
    unmerge: Literal[True],
) -> VisionRun: ...


@overload
def reduce(
    model: PreTrainedModel | nn.Module,
    reducer: Reducer | Evictor | None,
    layer: int | Sequence[int] | Schedule | Removal | None = None,
    *,
    mode: Mode | str | None = None,
    unmerge: bool = False,
    positions: str = "kept",
    cache: Evictor | float | str | None = None,
    **settings: Unpack[ModeSettings],
) -> Run | VisionRun | VlmRun: ...


def reduce(
    model: PreTrainedModel | nn.Module,
    reducer: Reducer | Evictor | None,
    layer: int | Sequence[int] | Schedule | Removal | None = None,
    *,
    mode: Mode | str | None = None,
    unmerge: bool = False,
    positions: str = "kept",
    cache: Evictor | float | str | None = None,
    **settings: Unpack[ModeSettings],
) -> Any:
    """Make ``model`` read with fewer tokens while the returned run is entered as a context manager.

    Language models have two modes. ``prefix`` mode merges the residual stream of a fully known prompt at the given
    depth: blocks below read every token, blocks above read the slots, and so do their caches. ``block_causal`` mode
    merges keys and values of every finished chunk once it has left the recent window. Its budget comes from the chunk
    alone and its saliency from the chunk and the window that follows, all read before the merge is first seen; it is
    exact for scoring.

    In a vision transformer each block of the schedule takes tokens out between its attention and its feed-forward part
    (ToMe, arXiv 2210.09461), or in front of it where the method says so. Class, distillation and register tokens stay
    alone. What the model pools, it pools as if every original token that was not dropped were still there. Enter the
    run before `torch.compile` or `torch.export`.

    In a vision-language model visual tokens alone are taken out, an image (or video) at a time with a budget of its
    own, behind the projector or in front of blocks of the language model. The tower and the projector run as always,
    and so do ``generate`` and its check of placeholders. Every other token stays. Behind the projector a method sees
    the visual tokens as the language model gets them, or the features of the tower where it is made for these (SCOPE),
    with what it asks for: attention and keys of the tower's layer, the embeddings of the instruction, the grid. Inside
    it sees the residual stream, and attention and keys of the block below. Rows that end with different numbers of
    tokens are padded on the left. Images of a later turn, read behind a filled cache, are read in full, and so are
    those that come in ``inputs_embeds`` without ids. An image of LLaVA-NeXT is one set of tokens with its crops, but
    every tile of Idefics3 and SmolVLM is an image.

    Args:
        model: a decoder-only causal LM (``quickmerge ls models`` lists the families), or a vision transformer
            (see `quickmerge.models.encoder.find_encoder`), or timm's ``VisionTransformer`` or a module that holds
            one, or a vision-language model, see `quickmerge.models.vlm.find_vlm`. It may be wrapped by PEFT,
            `torch.compile` (a language model then runs as it was written while it is inside), or
            `DistributedDataParallel`.
        reducer: the method, with its ``keep``; or one of `quickmerge.merge.cache`, which is then the ``cache``; or None
            where there is a ``cache``.
        layer: in ``prefix`` mode the first block that reads the reduced sequence, 1..L-1; a list of such blocks
            or a `Schedule` merges at several depths. Default: blocks 4/15 and 5/6 of the way up (8 and 25 of
            30), see `Schedule.of`. In ``block_causal`` mode the first block whose cache is merged, 0..L-1; default 0.
            In a vision transformer a `Removal`, which says how many tokens every block takes out; or a block, or a list
            of them, 0..L-1, of which the i-th leaves the share ``keep^i`` of the patches (or what the budget says).
            Default: the constant `Removal` with which the blocks together read the share ``keep``, or the blocks for
            which the method was trained. In a vision-language model 0, behind the projector, which is the default; a
            block 1..L-1 of its language model; or a list of these, of which the i-th leaves the share ``keep^i`` of the
            visual tokens (or what the budget says). More tokens than there are asks for all.
        mode: language models only: `Prefix` or `BlockCausal` with its settings, or its name, ``"prefix"`` (the default)
            or ``"block_causal"``.
        unmerge: vision transformers only: give back ``last_hidden_state`` at full length, every patch with the features
            of its slot and zeros where it was dropped; of a model of timm, what ``forward_features`` and
            ``forward_intermediates`` give (the latter needs it).
        positions: vision-language models only, and of no account inside: ``"kept"``, every token keeps the position
            that it had, and the next one gets the one that it would have had; or ``"consecutive"``, as if the prompt
            had been shorter from the first (LLaVA, LLaVA-NeXT, Idefics3 and SmolVLM only).
        cache: language and vision-language models only: what leaves the cache when a prompt has been read, from every
            layer and key head other entries; a share is that of `AttentionNorm`. The memory is free afterwards;
            the prompt itself was read with all of them. Default: ``cache`` of the reducer where it has one.
        **settings: those of the mode, where it was not given as an object.

    Returns:
        A `Run`, a `VisionRun` or a `VlmRun`: enter it with ``with``, or call its ``attach()`` and later ``detach()``;
        afterwards ask it for its ``summary()``. A run that is never entered does nothing, and warns of it when it goes.
        Copies and pickles of the model that are made inside are of the plain model.

    Raises:
        UnsupportedModelError: for a model that can't be served, naming its class.
        QuickmergeError: for a setting out of range; a ValueError, as all of these.
    """
    model = unwrapped(model)
    check_kind(model)
    if isinstance(reducer, Evictor):
        if cache is not None:
            raise QuickmergeError(f"cache must be left out beside {reducer.label}, which is one, got {cache!r:.200}")
        reducer, cache = None, reducer
    run = _run(model, reducer, layer, mode, settings, unmerge=unmerge, positions=positions, cache=as_evictor(cache))
    return run.warn_if_unused("quickmerge.reduce")


def _run(
    model: Any, reducer: Reducer | None, layer: Any, mode: Any, settings: Mapping[str, Any], *, unmerge: bool,
    positions: str, cache: Evictor | None = None,
) -> Attachment:  # fmt: skip
    cache = _own_cache(reducer, cache)
    if reducer is None and cache is not None:
        if layer is not None:
            raise QuickmergeError(f"layer must be None where nothing is merged, got {layer!r}")
        reads = cache.unit is not None or cache.protect is not None or "protect" in settings
        for name in ("sinks", "min_tokens", *([] if reads else ["tokenizer"])):
            if name in settings:
                own = f": say {type(cache).__name__}({name}=...)" * (name != "tokenizer")
                raise QuickmergeError(f"{name} is of what is merged, and nothing is, got {settings[name]!r:.80}{own}")
    elif not isinstance(reducer, Reducer):
        raise QuickmergeError(
            f"reducer must be a quickmerge reducer such as QuickMerge(keep=0.4), got {reducer!r:.200}"
        )
    given = [*(["mode"] if mode is not None else []), *settings]
    if holds_vlm(model):
        for name in [*given, *(["unmerge"] if unmerge else [])]:
            raise QuickmergeError(
                f"{name} must be left out for {type(model).__name__}, whose visual tokens are reduced"
            )
        if isinstance(layer, (Schedule, Removal)):
            raise QuickmergeError(
                f"layer must be a block or a list of blocks for visual tokens, got a {type(layer).__name__}"
            )
        if reducer is None:
            return reduce_vlm_places(model, cache=cache)
        return reduce_vlm(model, reducer, layer, positions=positions, cache=cache)
    if positions != "kept":
        raise QuickmergeError(
            f"positions is for vision-language models and must be left out for {type(model).__name__}"
        )
    timm = holds_timm(model)
    if timm or holds_encoder(model):
        for name in given:
            raise QuickmergeError(f"{name} is for language models and must be left out for {type(model).__name__}")
        if isinstance(layer, Schedule):
            raise QuickmergeError(
                "layer must be a block, a list of blocks or a Removal in a vision transformer, got a Schedule"
            )
        if cache is not None or reducer is None:
            told = "nothing" if cache is None else cache.label
            raise QuickmergeError(f"cache must be None for {type(model).__name__}, which has none, got {told}")
        return (reduce_timm if timm else reduce_vit)(model, reducer, layer, unmerge=unmerge)
    if unmerge:
        raise QuickmergeError(f"unmerge is for vision transformers and must be False for {type(model).__name__}")
    if isinstance(layer, Removal):
        raise QuickmergeError(
            "layer must be a block, a list of blocks or a Schedule in a language model, got a Removal"
        )
    return reduce_lm(model, reducer, layer, as_mode(mode, settings), cache)


def _own_cache(reducer: Reducer | None, cache: Evictor | None) -> Evictor | None:
    """What a reducer says of the cache itself, or what was said beside it."""
    own = as_evictor(getattr(reducer, "cache", None))
    if own is not None and cache is not None:
        raise QuickmergeError(
            f"cache must be said once, of the reducer or beside it, got {own.label} and {cache.label}"
        )
    return cache if own is None else own


# ``reduce_places``: the same at several places of a model at once.


def reduce_places(
    model: PreTrainedModel | nn.Module,
    *,
    text: Merge | None = None,
    visual: Merge | None = None,
    tower: Merge | None = None,
    cache: Evictor | None = None,
) -> Run | VisionRun | VlmRun:
    """Make ``model`` read with fewer tokens at one place or at several, while the returned run is entered.

    A language model has ``text`` alone and a vision transformer ``tower`` alone; there this is what `reduce` is. A
    vision-language model has all three, in any combination:

    - ``tower``: patches are merged inside the vision tower, as in any vision transformer. The model picks the layers
      that it reads as always: there every patch has the features of its slot. In LLaVA and LLaVA-NeXT the language
      model then reads one visual token a slot, and none for a patch that was dropped; with ``unmerge`` it reads as many
      as before, with the mean of the others for what was dropped. In Idefics3 and SmolVLM, whose visual tokens are
      squares of patches, there is ``unmerge`` alone; where patches of all images lie in one packed sequence, in the
      Qwen family and PaddleOCR-VL, the tower can't be merged. What a method for visual tokens is told of the tower is
      of slots: each patch has what was measured of its own.
    - ``visual``: visual tokens become fewer behind the projector, or in front of blocks of the language model. A share
      is one of the tokens that an image has without any merging.
    - ``text``: all tokens of the prompt, visual ones among them, are merged in front of blocks of the language model,
      as `Prefix` mode does. These blocks lie above those where visual tokens become fewer, and the method sees what is
      left there: its ``keep`` is a share of that, ``sinks`` and ``recent`` count it, rows that have fewer than
      ``min_tokens`` of it are read in full, and ``protect`` is asked about its ids.

    - ``cache``: when the prompt has been read, entries leave the cache of every layer, whatever was merged in it, see
      `quickmerge.merge.cache`.

    Where methods differ in whether a slot counts in attention as its size, each decides for the slots that it made. In
    a vision-language model the run is a `VlmRun`: its ``tower_run`` is the run in the tower, and its ``summary()``
    tells of all places.

    Args:
        model: see `reduce`.
        text: what is done to all tokens of a prompt, in a language model.
        visual: what is done to the visual tokens.
        tower: what is done in a vision transformer.
        cache: what is done to the cache of a prompt.

    Returns:
        One run for all places.

    Raises:
        UnsupportedModelError: for a model that can't be served, naming its class.
        QuickmergeError: for a setting out of range, a place that the model does not have, or a combination that can't
            be; a ValueError, as all of these.
    """
    model = unwrapped(model)
    check_kind(model)
    given: dict[Place, Merge | None] = {"text": text, "visual": visual, "tower": tower}
    merges = {place: merge for place, merge in given.items() if merge is not None}
    if cache is not None and not isinstance(cache, Evictor):
        raise QuickmergeError(f"cache must be a method such as AttentionNorm(keep=0.3), got {cache!r:.200}")
    if not merges and cache is None:
        raise QuickmergeError("text, visual, tower or cache must say what is to be done, got None for each")
    for place, merge in merges.items():
        if not isinstance(merge, Merge):
            raise QuickmergeError(f"{place} must be a Merge(reducer, ...) or None, got {type(merge).__name__}")
        merge.check(place)
    if holds_vlm(model):
        own = None if text is None else text.reducer
        run: Attachment = reduce_vlm_places(model, **merges, cache=_own_cache(own, cache))
    else:
        only: Place = "tower" if holds_timm(model) or holds_encoder(model) else "text"
        for place in merges:
            if place != only:
                raise QuickmergeError(
                    f"{place} must be None for {type(model).__name__}, which has no {place} to merge in, only {only}: "
                    f"{PLACES[only]}"
                )
        given_here = merges.get(only)
        if given_here is None:
            run = _run(model, None, None, None, {}, unmerge=False, positions="kept", cache=cache)
        else:
            run = _run(
                model, given_here.reducer, given_here.layer, given_here.mode, {}, unmerge=given_here.unmerge,
                positions="kept", cache=cache,
            )  # fmt: skip
    return run.warn_if_unused("quickmerge.merge.attach.reduce_places")  # type: ignore[return-value]
