"""Which chat template a new vocabulary can have, and the settings files of the new model."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickmerge.errors import QuickmergeError, first_sentence
from quickmerge.files import write_json
from quickmerge.models.chat import DEFAULT, Templates, as_templates, templates_by_name

__all__ = [
    "ROLES",
    "Template",
    "choose_template",
    "copy_companions",
    "former_ids",
    "new_settings",
    "of_tokenizer",
    "read_settings",
    "write_tokenizer",
]


ROLES = ("bos", "eos", "pad")
"""Roles whose tokens templates ask for by name."""


@dataclass(frozen=True)
class Template:
    """The chat template of the new model."""

    text: Templates | None
    source: str
    """``"base"``, ``"tokenizer"`` or ``"none"``."""
    why: str
    """A clause that says why, for the report."""


def of_tokenizer(tokenizer: Any) -> Templates | None:
    """What a tokenizer has.

    Raises:
        QuickmergeError: it is no template.
    """
    return as_templates(tokenizer.chat_template, "chat_template of the tokenizer")


def choose_template(base: Any, tokenizer: Any) -> Template:
    """Keep the base's chat templates if the new vocabulary has their markers, since the body was trained on them.

    The one that is used by default decides. Further ones that lack a marker are left out.

    Args:
        base: the base's tokenizer.
        tokenizer: the new one.

    Raises:
        QuickmergeError: one of the two has a template that is none.
    """
    ours, theirs = of_tokenizer(base), of_tokenizer(tokenizer)
    if ours is None:
        return Template(theirs, "none" if theirs is None else "tokenizer", "the base has no template")
    lacking = {name: _lacking(text, base, tokenizer) for name, text in templates_by_name(ours).items()}
    decides = lacking.get(DEFAULT) if DEFAULT in lacking else min(lacking.values(), key=len)
    if decides:
        why = f"the new vocabulary lacks {', '.join(decides[:3])} of the base's template"
        return Template(theirs, "none" if theirs is None else "tokenizer", why)
    if isinstance(ours, str):
        return Template(ours, "base", "the new vocabulary has all of its markers")
    kept = {name: text for name, text in ours.items() if not lacking[name]}
    if len(kept) == len(ours):
        return Template(kept, "base", "the new vocabulary has all of their markers")
    gone = ", ".join(name for name in ours if name not in kept)
    return Template(kept, "base", f"the new vocabulary has their markers, but not those of {gone}, left out")


def _lacking(text: str, base: Any, tokenizer: Any) -> list[str]:
    """Markers that a template of the base writes and the new vocabulary doesn't have."""
    markers = [str(token) for token in base.added_tokens_decoder.values() if token.special and str(token) in text]
    there = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    lacking = [marker for marker in markers if marker not in there]
    # names of roles that the template reads are spelled out by the tokenizer that applies it
    return lacking + [
        f"{role}_token" for role in ROLES
        if re.search(rf"\b{role}_token\b", text) and getattr(tokenizer, f"{role}_token", None) is None
    ]  # fmt: skip


# The small files of the new model: its config and generation config with the new ids, its tokenizer, its template.


OPTIONAL = ("unk", "sep", "cls", "mask", "decoder_start", "forced_bos", "forced_eos")
"""Roles that a language model does without: they are left out where the new vocabulary has no such token."""
LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
COMPANIONS = ("LICENSE*", "NOTICE*", "*preprocessor_config.json", "processor_config.json")

PROBES = (
    "Hello world, it's 2024: 1234567 and 3.14!", "  two  spaces\n\n\tand lines ", "déjà vu, größer, naïve",
    "Кошка на окне. 猫は窓に。 قطة 🦊", "def add(a, b):\n    return a + b  # the sum\n",
)  # fmt: skip
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"}
# For some types of model transformers puts its own class in the place of the one that is named here, unless a class
# from elsewhere is named, which it then leaves out for want of trust.
TAKEN_AS_IT_IS = {**PLAIN, "auto_map": {"AutoTokenizer": [None, None]}}


def former_ids(copied: Any, special: Mapping[int, tuple[int, ...]]) -> dict[int, int]:
    """Base id -> new id, the lowest where several tokens took a row over; specials come before what merely reads alike.

    Args:
        copied: ``(N, 2)``, new id and base id.
        special: new id -> base ids.
    """
    new: dict[int, int] = {}
    for own, ids in sorted(special.items()):
        if len(ids) == 1:
            new.setdefault(ids[0], own)
    for own, base in sorted(map(tuple, copied.tolist())):
        new.setdefault(base, own)
    return new


def new_settings(
    settings: Mapping[str, Any], ids: Mapping[int, int], roles: Mapping[str, int], *, size: int | None
) -> tuple[dict[str, Any], list[str]]:
    """A config or generation config for the new vocabulary.

    Args:
        settings: what the base's file holds.
        ids: base id -> new id.
        roles: role -> new id, as the new tokenizer has them.
        size: the new ``vocab_size``; None for a file that has none.

    Returns:
        The settings, and a sentence for each thing that had to be left out.

    Raises:
        QuickmergeError: the model needs a token (of an image, say) that the new vocabulary lacks.
    """
    new, notes = dict(settings), []
    for key, value in settings.items():
        role = re.sub(r"_(token_id|token_index|index)$", "", key)
        if key == "text_config" and isinstance(value, dict):
            new[key], further = new_settings(value, ids, roles, size=size)
            notes += further
        elif key == "vocab_size" and size is not None:
            new[key] = size
        elif role == key or value is None:
            if key in LISTS and value:
                new[key] = _translated(value, ids)
                if new[key] != value and len(new[key]) < len(value):
                    notes.append(f"{key}: {len(value) - len(new[key])} of {len(value)} have no counterpart")
        elif role in ROLES:  # what the tokenizer decides about, whatever the base said
            found = [ids[one] for one in (value if isinstance(value, list) else [value]) if one in ids]
            own = [roles[role]] if role in roles else []
            every = list(dict.fromkeys([*own, *found]))
            new[key] = (every or None) if isinstance(value, list) else (every[0] if every else None)
            if not every:
                notes.append(f"{key}: the new vocabulary has none")
        elif isinstance(value, int) and not isinstance(value, bool) and key.endswith(("_token_id", "_token_index")):
            if value in ids:
                new[key] = ids[value]
            elif role in OPTIONAL:
                new[key] = None
                notes.append(f"{key}: the new vocabulary has none")
            else:
                raise QuickmergeError(
                    f"tokenizer must have a counterpart of the base's {key} ({value}), got none: name one with special"
                )
    for role in ROLES:
        key = f"{role}_token_id"
        if role in roles and new.get(key) is None:
            new[key] = roles[role]
    return new, notes


def write_tokenizer(folder: Path, tokenizer: Any, base: Any, template: Template) -> None:
    """Save the new tokenizer with what belongs to the body: how long a text it can read, and on which side it pads.

    `AutoTokenizer` chooses a class by the type of the model as well, and some classes build their own rules of cutting
    whatever the file says. So what was saved is opened again, and must cut texts as before; if it doesn't, the file is
    marked so that it is taken as it is.

    Args:
        folder: holds the new ``config.json`` already.
        tokenizer: the new one; it is not changed.
        base: the base's.
        template: the chat template.

    Raises:
        QuickmergeError: it can't be saved, or transformers opens it as something else for this type of model.
    """
    new = copy.deepcopy(tokenizer)
    new.chat_template = template.text
    new.model_max_length = base.model_max_length
    new.padding_side = base.padding_side
    try:
        new.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # the tokenizers library raises a bare Exception, for a full disk too
        raise QuickmergeError(f"the tokenizer can't be written ({first_sentence(error)})") from error
    path = folder / "tokenizer_config.json"
    saved = read_settings(path)
    if saved is None or not (folder / "tokenizer.json").is_file():
        raise QuickmergeError(
            "tokenizer must be one that transformers saves as tokenizer.json, got one that it doesn't"
        )
    for more in ({}, PLAIN, TAKEN_AS_IT_IS):
        if more:
            write_json(path, {**saved, **more})
        if _cuts_alike(folder, tokenizer):
            return
    raise QuickmergeError(
        f"tokenizer can't be kept with this type of model: transformers opens a {type(tokenizer).__name__} there as "
        "another one, which cuts texts differently"
    )


def _cuts_alike(folder: Path, tokenizer: Any) -> bool:
    from transformers import AutoTokenizer

    from quickmerge.models.read import transformers_silenced

    try:
        with transformers_silenced():
            again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # whatever the class does with a file that is not made for it
        return False
    return all(
        again(text, add_special_tokens=special)["input_ids"] == tokenizer(text, add_special_tokens=special)["input_ids"]
        for text in PROBES for special in (False, True)
    )  # fmt: skip


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what goes with a model and says nothing about its tokens: licence, settings of its image processor."""
    for pattern in COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def read_settings(path: Path) -> dict[str, Any] | None:
    """A config of the base; None if there is no such file.

    Raises:
        QuickmergeError: it is not a JSON object.
    """
    if not path.is_file():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise QuickmergeError(f"{path} must be JSON, got something else ({error})") from None
    if not isinstance(settings, dict):
        raise QuickmergeError(f"{path} must be a JSON object, got a {type(settings).__name__}")
    return settings


def _translated(value: list[Any], ids: Mapping[int, int]) -> list[Any]:
    """Ids, or lists of ids, without those that have no counterpart."""
    new: list[Any] = []
    for one in value:
        if isinstance(one, list):
            if all(id_ in ids for id_ in one):
                new.append([ids[id_] for id_ in one])
        elif one in ids:
            new.append(ids[one])
    return new
