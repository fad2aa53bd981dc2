"""Which tokens two vocabularies share: those that stand for the same bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from quickmerge.vocabulary.kinds import kind_of
from quickmerge.vocabulary.special import match_special
from quickmerge.vocabulary.tokens import Token, Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Matching", "match"]


@dataclass(frozen=True)
class Matching:
    """What becomes of every token of the donor. Each donor id is in exactly one of `shared`, `special`, `unmapped`
    and `new`.

    Attributes:
        shared: ``(N, 2)``, donor id and base id by rising donor id. A base id may serve several donor ids.
        special: donor id, and the base ids that do its job; several mean the mean of their rows.
        unmapped: special tokens of the donor that nothing in the base corresponds to.
        new: donor ids whose rows have to be rebuilt, rising.
        kinds: the kind of text (`quickmerge.vocabulary.kinds`) of each donor id in `shared` and `new`.
        aliases: donor ids in `shared` or `new` that the donor's tokenizer never gives, since another token stands
            for the same bytes, such as `<0x41>` beside "A". A copy of that token's row in the output layer halves
            the probability of the token that is really used: such rows should not compete.
    """

    shared: NDArray[np.int64]
    special: dict[int, tuple[int, ...]]
    unmapped: tuple[int, ...]
    new: NDArray[np.int64]
    kinds: dict[int, str]
    aliases: tuple[int, ...] = ()


def match(
    donor: Vocabulary,
    base: Vocabulary,
    special: Mapping[str, str] | None = None,
    *,
    base_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Matching:
    """Match the tokens of two vocabularies by the bytes that they stand for.

    Where several tokens stand for the same bytes they are put in the order in which a tokenizer takes them: added
    tokens, which are cut out first; text; what continues a word; single bytes, for which there must be no text; lower
    ids. The first of the donor matches the first of the base, the second the second, and so on, the last of the base
    serving all that are left. So a vocabulary matches itself one to one, and a byte that the donor does use matches
    the token that the base uses for it.

    Args:
        donor: the vocabulary that is wanted.
        base: the vocabulary of the model.
        special: as for `match_special`.
        base_tokenizer: cuts the texts of `special`.

    Raises:
        QuickmergeError: `special` can't be followed.
    """
    found, unmapped = match_special(donor, base, special, base_tokenizer=base_tokenizer)
    mine, theirs = _by_data(donor), _by_data(base)
    pairs: list[tuple[int, int]] = []
    aliases: list[int] = []
    for data, tokens in mine.items():
        known = theirs.get(data, [])
        for place, token in enumerate(tokens):
            if token.id in found:  # the user's map may name a plain token
                continue
            if place:
                aliases.append(token.id)
            if known:
                pairs.append((token.id, known[min(place, len(known) - 1)].id))
    pairs.sort()
    taken = {one for one, _ in pairs} | set(found) | set(unmapped)
    plain = [token for token in donor.tokens if not token.special and token.id not in found]
    return Matching(
        shared=np.array(pairs, dtype=np.int64).reshape(-1, 2),
        special=found,
        unmapped=unmapped,
        new=np.array([token.id for token in plain if token.id not in taken], dtype=np.int64),
        kinds={token.id: kind_of(token.data if token.data is not None else token.text.encode()) for token in plain},
        aliases=tuple(sorted(aliases)),
    )


def _by_data(vocabulary: Vocabulary) -> dict[bytes, list[Token]]:
    groups: dict[bytes, list[Token]] = defaultdict(list)
    for token in vocabulary.tokens:
        if token.data is not None:
            groups[token.data].append(token)
    for tokens in groups.values():
        tokens.sort(key=lambda token: (token.byte, not token.added, token.continuation, token.id))
    return groups
