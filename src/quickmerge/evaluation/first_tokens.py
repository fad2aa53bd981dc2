"""The first tokens of a text at the cost of those, however long the text is."""

from __future__ import annotations

from typing import Any

from quickmerge.errors import QuickmergeError

__all__ = ["check_room", "first_tokens"]

CHARACTERS = 16
"""Of a text are tokenised at first for each token that is wanted: enough for prose and code of any script."""
EDGE = 16
"""Tokens before a cut that may differ from those of the whole text: they are not used."""


def first_tokens(tokenizer: Any, text: str, limit: int) -> list[int]:
    """At most the first ``limit`` token ids of a text, which is tokenised no further than needed.

    Raises:
        QuickmergeError: the text has no tokens, or the tokenizer can't read it.
    """
    cut = CHARACTERS * (limit + EDGE)
    while True:
        ids: list[int] = tokenizer(text[:cut], add_special_tokens=False, verbose=False)["input_ids"]
        if cut >= len(text) or len(ids) >= limit + EDGE:
            break
        cut *= 4
    if not ids:
        raise QuickmergeError("the text must have some tokens, got none: the tokenizer drops all of it")
    return ids[:limit]


def _positions(model: Any) -> Any:
    """Tokens that a model has positions for; of a CALM, those of the chunks that its backbone has positions for."""
    backbone = getattr(model.config, "backbone", None)
    if backbone is None:
        return getattr(model.config.get_text_config(), "max_position_embeddings", None)
    chunks = getattr(backbone, "max_position_embeddings", None)
    return chunks * model.config.patch if isinstance(chunks, int) else None


def check_room(model: Any, tokenizer: Any, what: str, text: str, max_new_tokens: int) -> None:
    """Before a long text is tokenised: raise QuickmergeError if a model has too few positions for it and an answer.

    Args:
        model: whose config tells its positions; without a limit everything fits.
        tokenizer: of the model.
        what: the text, in words.
        text: all that the model is to read.
        max_new_tokens: of the answer.
    """
    limit = _positions(model)
    if not isinstance(limit, int) or len(text) <= CHARACTERS * limit:
        return
    room = max(0, limit - max_new_tokens)
    if len(first_tokens(tokenizer, text, room + 1)) > room:
        raise QuickmergeError(
            f"{what} and --max-new-tokens must fit the model's {limit} positions, "
            f"got more than {room} and {max_new_tokens} tokens"
        )
