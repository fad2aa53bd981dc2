"""The cache in calls of models and in what they give, by the name that the installed transformers has for it."""

from __future__ import annotations

from typing import Any

from quickmerge.models.compat import cache_name, returned_cache


def past(cache: Any) -> dict[str, Any]:
    """The keyword argument of a model or of ``generate``: ``model(ids, **past(cache))``."""
    return {cache_name(): cache}


def held(output: Any) -> Any:
    """The cache that an output holds."""
    return returned_cache(output)
