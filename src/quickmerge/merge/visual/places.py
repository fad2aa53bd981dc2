"""What may be done where in a vision-language model: in its tower, to its visual tokens, to all tokens of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from transformers import PreTrainedModel

from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.merge.cache.evictor import Evictor
from quickmerge.merge.place import POSITIONS, Merge
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.reducers.reread import Reread
from quickmerge.merge.text.blocks import check_blocks
from quickmerge.merge.text.modes import BlockCausal, Prefix
from quickmerge.merge.tokens.budget import Schedule, layers_of
from quickmerge.merge.vision.run import schedule_for
from quickmerge.merge.visual.merged_tower import TowerRun
from quickmerge.merge.visual.tower import MEASURED
from quickmerge.merge.visual.vlm import VlmRun
from quickmerge.models.decoder import check_free
from quickmerge.models.traits import BlockTraits
from quickmerge.models.vlm import Vlm, find_vlm, tower_encoder


def reduce_vlm(
    model: PreTrainedModel,
    reducer: Reducer,
    layer: int | Sequence[int] | None = None,
    *,
    positions: str = "kept",
    cache: Evictor | None = None,
) -> VlmRun:
    """Make a vision-language model read fewer visual tokens; see `quickmerge.merge.attach.reduce` for the arguments."""
    if not isinstance(reducer, Reducer):
        raise ValueError(f"reducer must be a quickmerge reducer such as SCOPE(keep=0.25), got {reducer!r}")
    _check_visual(reducer)
    vlm = _found(model)
    return VlmRun(vlm, reducer, _visual_layers(vlm, reducer, layer, positions), positions=positions, cache=cache)


def reduce_vlm_places(
    model: PreTrainedModel,
    *,
    text: Merge | None = None,
    visual: Merge | None = None,
    tower: Merge | None = None,
    cache: Evictor | None = None,
) -> VlmRun:
    """Merge at several places of a vision-language model; see `quickmerge.merge.attach.reduce_places`.

    Args:
        model: the model.
        text: for all tokens of a prompt, in its language model.
        visual: for its visual tokens.
        tower: for the patches in its vision tower.
        cache: for the cache of a prompt.

    Raises:
        UnsupportedModelError: for a model that can't be served, or one that is inside another run.
        QuickmergeError: for a setting out of range, or a combination that can't be; a ValueError, as all of these.
    """
    if visual is not None:
        _check_visual(visual.reducer)
    vlm = _found(model)
    layers = () if visual is None else _visual_layers(vlm, visual.reducer, visual.layer, visual.positions)
    return VlmRun(
        vlm,
        None if visual is None else visual.reducer,
        layers,
        positions="kept" if visual is None else visual.positions,
        text=None if text is None else _text_stages(vlm, text, layers),
        tower=None if tower is None else _tower_run(vlm, tower),
        cache=cache,
    )


def _found(model: PreTrainedModel) -> Vlm:
    """The parts of a model that no other run is attached to that can't share it."""
    vlm = find_vlm(model, shared=True)
    check_free(model, vlm.decoder.attentions, VlmRun)
    return vlm


def _lowest(vlm: Vlm) -> tuple[int, str]:
    """The lowest block of the language model in front of which tokens may be merged, and why, in words."""
    lowest = vlm.deepstack or 1
    return lowest, f", behind the blocks that are given features of the tower, as {vlm.name} does" * (lowest > 1)


def _check_visual(reducer: Reducer) -> None:
    if "vision" not in reducer.places or (reducer.needs.layers and not reducer.needs.visual):
        raise ValueError(
            f"reducer {reducer.name} ({type(reducer).__name__}) is not for visual tokens; those of "
            "`quickmerge.merge.reducers.VISUAL_TOKEN_REDUCERS` are"
        )


def _visual_layers(vlm: Vlm, reducer: Reducer, layer: Any, positions: str) -> tuple[int, ...]:
    """Where visual tokens are reduced."""
    depth, (lowest, why) = len(vlm.decoder), _lowest(vlm)
    layers = (0,) if layer is None else layers_of(layer)
    whole = all(isinstance(x, int) and not isinstance(x, bool) and (x == 0 or lowest <= x < depth) for x in layers)
    if not layers or not whole or any(a >= b for a, b in pairwise(layers)):
        raise ValueError(
            f"layer must be 0 (behind the projector) or rising blocks in {lowest}..{depth - 1}{why}, got {layer!r}"
        )
    if positions not in POSITIONS:
        raise ValueError(f"positions must be one of {', '.join(POSITIONS)}, got {positions!r}")
    if positions == "consecutive" and vlm.family.mrope:
        raise ValueError(
            f"positions must be 'kept' for {type(vlm.model).__name__}, whose visual tokens have places in a grid, "
            f"got {positions!r}"
        )
    if inner := [x for x in layers if x > 0]:
        check_blocks(vlm.decoder, inner)
        vlm.decoder.need("reducing visual tokens inside the language model", _inside, [min(inner)])
    asks = reducer.needs.visual & MEASURED
    if 0 in layers and asks and vlm.family.layout == "closed":
        raise UnsupportedModelError(
            f"reducer {reducer.name} asks what the vision tower attends to ({', '.join(sorted(asks))}), and that of "
            f"{type(vlm.model).__name__} has no blocks with one attention module each: a method that asks nothing of "
            "the tower would do, or a layer inside the language model"
        )
    reducer.check(vlm.model, layers, "visual")
    return layers


def _inside(block: BlockTraits) -> str | None:
    return f"{block.streams} hidden streams side by side" if block.streams > 1 else None


def _tower_run(vlm: Vlm, tower: Merge) -> TowerRun:
    """The run inside the tower."""
    encoder, given = tower_encoder(vlm), tower.layer
    if not tower.unmerge and vlm.family.layout != "patches":
        raise QuickmergeError(
            f"unmerge must be True in tower for {type(vlm.model).__name__}, whose visual tokens are squares of patches "
            "side by side: the language model reads as many as before, got False"
        )
    schedule = schedule_for(encoder, tower.reducer, given)  # type: ignore[arg-type]
    return TowerRun(vlm, encoder, tower.reducer, schedule, unmerge=tower.unmerge)


def _text_stages(vlm: Vlm, text: Merge, visual: tuple[int, ...]) -> tuple[Reducer, Schedule, Prefix]:
    """How all tokens are merged, above the blocks ``visual``."""
    reducer, mode, depth = text.reducer, text.mode or Prefix(), len(vlm.decoder)
    if isinstance(mode, BlockCausal):
        raise QuickmergeError(
            f"mode must be Prefix(...) for the text of {vlm.model.__class__.__name__}, since block_causal mode is for "
            "language models alone"
        )
    if "text" not in reducer.places:
        raise QuickmergeError(f"text must be a reducer for the prompt of a language model, got {reducer.name}")
    if isinstance(reducer, Reread):
        raise QuickmergeError(
            f"text must be a reducer that acts inside a language model in {vlm.name}, got {reducer.name}, which reads "
            "a prompt twice"
        )
    layer: Any = text.layer
    schedule = layer if isinstance(layer, Schedule) else Schedule.of(layer, depth)
    schedule.check(depth)
    lowest, why = _lowest(vlm)
    if schedule.layers[0] < lowest:
        raise QuickmergeError(
            f"layer must be rising blocks in {lowest}..{depth - 1} for the text{why}, got {schedule.layers}"
        )
    if visual and schedule.layers[0] <= visual[-1]:
        raise QuickmergeError(
            f"layer must lie above block {visual[-1]} for the text, where the visual tokens become fewer, got "
            f"{schedule.layers}: visual tokens that were merged with words can't be told from these"
        )
    reducer.check(vlm.model, schedule.layers, mode.name)
    return reducer, schedule, mode
