"""From a recipe and a model to the runs that do what the recipe says, each of one capability."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quickmerge.errors import UnsupportedModelError
from quickmerge.merge.attach import reduce_places
from quickmerge.merge.cache import Evictor
from quickmerge.merge.place import Merge, Place
from quickmerge.models.attachment import Attachment
from quickmerge.models.encoder import holds_encoder, holds_timm
from quickmerge.models.vlm import check_kind, holds_vlm, unwrapped
from quickmerge.multipole.run import multipole
from quickmerge.recipe.ingredients import PLACES, Ingredients
from quickmerge.recipe.speculation import SpeculationRun

__all__ = ["check_places", "parts"]


def parts(model: Any, recipe: Ingredients) -> dict[str, Attachment]:
    """The runs that a recipe asks for, none of them entered, by the argument that asked; in the order of entering.

    Args:
        model: a model that `quickmerge.reduce` takes, wrapped or not.
        recipe: what is done to it.

    Raises:
        UnsupportedModelError: for a model that can't be served, or that has no such place, naming its class.
        QuickmergeError: for a setting that does not fit it.
    """
    model = unwrapped(model)
    check_kind(model)
    found: dict[str, Attachment] = {}
    if recipe.speculation is not None:
        # Whether a model reads trees is tried on the plain model, so this one is made first, and entered last.
        found["decoding"] = SpeculationRun(model, recipe.speculation)
    if recipe.attention is not None:
        found["attention"] = multipole(model, recipe.attention).owned()
    found |= _merging(model, recipe)
    return {name: found[name].owned() for name in reversed(found)}


def _merging(model: Any, recipe: Ingredients) -> dict[str, Attachment]:
    """The run in which tokens become fewer, and entries of the cache: one for all places, by their names."""
    merges, cache = recipe.merges, recipe.evictor
    check_places(model, merges)
    if not merges and cache is None:
        return {}
    if cache is not None and not holds_vlm(model) and (holds_encoder(model) or holds_timm(model)):
        raise UnsupportedModelError(f"cache must be left out for {type(model).__name__}, which has none")
    # What a reducer says of the cache itself it is asked for by whoever merges.
    beside = recipe.cache if isinstance(recipe.cache, Evictor) else None
    places: dict[Place, Merge] = {PLACES[name]: merge for name, merge in merges.items()}
    names = [*merges, *(["cache"] if cache is not None else [])]
    return {
        "+".join(names): reduce_places(
            model, text=places.get("text"), visual=places.get("visual"), tower=places.get("tower"), cache=beside
        )
    }


def check_places(model: Any, merges: Mapping[str, Merge]) -> None:
    """Raise UnsupportedModelError for a place that the model does not have, by the name that a recipe gives it."""
    if holds_vlm(model):
        have: tuple[str, ...] = ("merge", "visual", "tower")
        kind = "a vision-language model"
    elif holds_encoder(model) or holds_timm(model):
        kind, have = "a vision transformer", ("tower",)
    else:
        kind, have = "a language model", ("merge",)
    for name in merges:
        if name not in have:
            raise UnsupportedModelError(
                f"{name} must be left out for {type(model).__name__}, {kind}: give {' or '.join(have)} instead"
            )
