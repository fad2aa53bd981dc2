"""What the card of a recipe on the hub says: each ingredient as one would write it, and what they do to a model."""

from __future__ import annotations

from quickmerge.errors import clean
from quickmerge.models.card import Section
from quickmerge.recipe.ingredients import NAMES, Ingredients, shown_ingredient
from quickmerge.recipe.tell import Told

__all__ = ["card_sections"]

PLACES = {
    "merge": "the text",
    "visual": "visual tokens behind the projector of a vision-language model",
    "tower": "a vision transformer",
    "cache": "the cache of a prompt",
    "attention": "how new tokens read the past",
    "decoding": "how several tokens are drafted",
}


def card_sections(recipe: Ingredients, told: Told | None) -> list[Section]:
    """Sections for `quickmerge.models.card.card_text`.

    Args:
        recipe: the recipe.
        told: what it does to a model, of which the card then says it; None for no model.
    """
    given = {name: getattr(recipe, name) for name in NAMES if getattr(recipe, name) is not None}
    lines = [f"- **{name}**, {PLACES[name]}: `{shown_ingredient(value)}`" for name, value in given.items()]
    sections: list[Section] = [("What is done to a model", "\n".join(lines) or "Nothing.")]
    if told is not None:
        about = "Counted from the shapes of the model; FLOPs and bytes, and no promise of seconds."
        sections.append(("What that means", f"{about}\n\n```text\n{clean(str(told))}\n```"))
    return sections
