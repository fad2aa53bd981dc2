"""Special tokens: what they are, and which token of another vocabulary has the same job.

Their vectors stand for a role in a conversation, not for text, so nothing that is known of text rebuilds them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from quickmerge.errors import QuickmergeError, near_match

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from quickmerge.vocabulary.tokens import Token, Vocabulary

__all__ = ["is_marker", "is_reserved", "match_special", "roles_by_spelling"]

# <|im_start|>, DeepSeek's full-width bars, [INST] and [/INST], <think> and </think>
MARKER = re.compile(r"<\|.+\|>|<\uff5c.+\uff5c>|\[/?[A-Z][A-Z0-9_ ]*\]|</?[A-Za-z][A-Za-z0-9_.:-]*>")
RESERVED = re.compile(r"[\[<](?:unused|extra_id|reserved|control)_?\d+[\]>]|<\|(?:reserved_special_token|extra)_\d+\|>")
# Some vocabularies add these so that a table costs fewer tokens: they are text.
ELEMENTS = frozenset(
    {
        *("table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td", "col", "colgroup"),
        *("h1", "h2", "h3", "h4", "h5", "h6", "p", "br", "hr", "div", "span", "pre", "blockquote", "code"),
        *("ul", "ol", "li", "dl", "dt", "dd", "a", "img", "sub", "sup", "b", "i", "u", "em", "strong", "small", "del"),
        *("html", "head", "body", "title", "script", "style", "link", "meta", "form", "input", "option", "select"),
    }
)
SPELLINGS = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>"),
    "eos": ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>"),
    "unk": ("<unk>", "[UNK]"),
    "pad": ("<pad>", "[PAD]"),
    "cls": ("[CLS]",),
    "sep": ("[SEP]",),
    "mask": ("[MASK]", "<mask>"),
}
# The end of a text first: where one row must stand for several, it is the one that generation stops on.
MEANINGFUL = ("eos", "bos", "sep", "cls", "mask")
# What fills a batch or stands for what isn't known says nothing: it's taken only where nothing else tells.
FILLERS = ("unk", "pad")
# An encoder opens a text with cls and closes it with sep, as a decoder does with bos and eos.
COUSINS = {"cls": "bos", "bos": "cls", "sep": "eos", "eos": "sep"}


def is_marker(text: str) -> bool:
    """Whether an added token reads like a marker of a role (`<|user|>`, `[INST]`, `<think>`) and not like HTML."""
    return MARKER.fullmatch(text) is not None and text.strip("</>").lower() not in ELEMENTS


def is_reserved(text: str) -> bool:
    """Whether a token is an entry that was kept free (`<unused7>`, `[unused7]`, `<|reserved_special_token_7|>`)."""
    return RESERVED.fullmatch(text) is not None


def roles_by_spelling(texts: Iterable[str]) -> dict[str, str]:
    """The roles that special tokens have by the way they are usually spelled.

    Args:
        texts: the special tokens of a tokenizer.

    Returns:
        Role (`"bos"`, `"eos"`, `"unk"`, `"pad"`, `"cls"`, `"sep"`, `"mask"`) and text, for the roles that are found.
    """
    given = set(texts)
    found = {role: next((text for text in usual if text in given), None) for role, usual in SPELLINGS.items()}
    return {role: text for role, text in found.items() if text is not None}


def match_special(
    donor: Vocabulary,
    base: Vocabulary,
    special: Mapping[str, str] | None = None,
    *,
    base_tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[dict[int, tuple[int, ...]], tuple[int, ...]]:
    """Find for each special token of the donor the tokens of the base that do its job.

    The user's map wins. Next come roles: a token that is both bos and eos takes the base's eos and bos, in this order.
    Then the same text, if it is special in the base too. Then, where only one of the two vocabularies is an
    encoder's, its cls and sep and the other's bos and eos. The roles unk and pad come last, since whatever fills a
    batch is mostly another token in disguise.

    Args:
        donor: the vocabulary that is wanted.
        base: the vocabulary of the model.
        special: donor token and a text for it, which the base's tokenizer cuts into one or more tokens.
        base_tokenizer: cuts the texts of `special`; without it they must be single tokens of the base.

    Returns:
        The base ids of each donor id, several where one row should be made of several (their mean); and the donor ids
        that nothing was found for.

    Raises:
        QuickmergeError: `special` names a token that the donor lacks, or a text that the base has no tokens for.
    """
    asked = _asked(donor, base, special or {}, base_tokenizer)
    found: dict[int, tuple[int, ...]] = dict(asked)
    unmapped = []
    for token in donor.tokens:
        if not token.special or token.id in found:
            continue
        if ids := _by_role_or_text(token, donor, base):
            found[token.id] = ids
        else:
            unmapped.append(token.id)
    return dict(sorted(found.items())), tuple(unmapped)


def _by_role_or_text(token: Token, donor: Vocabulary, base: Vocabulary) -> tuple[int, ...]:
    roles = [role for role, one in donor.roles.items() if one == token.id]
    roles.sort(key=lambda role: MEANINGFUL.index(role) if role in MEANINGFUL else len(MEANINGFUL))
    if named := [base.roles[role] for role in roles if role in base.roles and role not in FILLERS]:
        return tuple(dict.fromkeys(named))
    twin = base.by_text.get(token.text)
    if twin is not None and twin.special:
        return (twin.id,)
    cousins = [COUSINS[role] for role in roles if role in COUSINS]
    if related := [base.roles[role] for role in cousins if role in base.roles]:
        return tuple(dict.fromkeys(related))
    return tuple(base.roles[role] for role in FILLERS if role in roles and role in base.roles)[:1]


def _asked(
    donor: Vocabulary,
    base: Vocabulary,
    special: Mapping[str, str],
    base_tokenizer: PreTrainedTokenizerBase | None,
) -> dict[int, tuple[int, ...]]:
    asked = {}
    for text, meaning in special.items():
        if text not in donor.by_text:
            known = [token.text for token in donor.tokens if token.special]
            shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
            raise QuickmergeError(
                f"special names {text!r}{near_match(text, known)}, which the donor's vocabulary lacks; "
                f"its special tokens are: {shown or 'none'}"
            )
        asked[donor.by_text[text].id] = _pieces(text, meaning, base, base_tokenizer)
    return asked


def _pieces(
    text: str, meaning: str, base: Vocabulary, base_tokenizer: PreTrainedTokenizerBase | None
) -> tuple[int, ...]:
    if meaning in base.by_text and base.by_text[meaning].special:
        return (base.by_text[meaning].id,)
    if base_tokenizer is None:
        if meaning in base.by_text:
            return (base.by_text[meaning].id,)
        raise QuickmergeError(
            f"special maps {text!r} to {meaning!r}, which is no token of the base: give base_tokenizer too, to cut it"
        )
    pieces = tuple(int(one) for one in base_tokenizer.encode(meaning, add_special_tokens=False))
    if not pieces or base.roles.get("unk") in pieces:
        raise QuickmergeError(
            f"special maps {text!r} to {meaning!r}, but must map it to a text that the base's tokenizer knows "
            f"(it gives {len(pieces)} tokens{', unknown ones among them' if pieces else ''})"
        )
    return pieces
