"""The kinds of folders that quickmerge saves: by what one is known, and the files that belong to it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from quickmerge.models.part import CONFIG, WEIGHTS
from quickmerge.models.weights import read_json

__all__ = ["HUB_ID", "KINDS", "RECIPE", "Kind", "belongs", "folder_files", "kind_of", "looks_like_id"]

RECIPE = "recipe.json"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
"""Owner and name of what lies on the hub."""


@dataclass(frozen=True)
class Kind:
    """One kind of what quickmerge saves.

    Attributes:
        name: what messages call it.
        opener: what opens it, below ``quickmerge``.
        mark: entry and value of its settings by which it is known.
        about: what it is, for its card.
        load: how it is opened and used, for its card: a few lines of Python, with NAME for its id.
        files: patterns of its files; nothing else is sent or fetched.
        settings: the file that says what it is.
    """

    name: str
    opener: str
    mark: tuple[str, str]
    about: str
    load: str
    files: tuple[str, ...] = (CONFIG, WEIGHTS)
    settings: str = CONFIG


_MODEL = (CONFIG, "generation_config.json", WEIGHTS, "model-*-of-*.safetensors", "model.safetensors.index.json")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
              "vocab.txt", "merges.txt", "*.model", "chat_template.jinja")  # fmt: skip
_RECIPE_PARTS = tuple(
    f"{place}-*/{file}" for place in ("merge", "visual", "tower", "decoding") for file in (CONFIG, WEIGHTS)
)

KINDS: dict[str, Kind] = {
    "recipe": Kind(
        "a recipe", "Recipe", ("type", "quickmerge.recipe"),
        "A recipe of quickmerge: what is done to a model so that it predicts with fewer tokens, or with cheaper ones.",
        'import quickmerge as qm\nrecipe = qm.Recipe.from_pretrained("NAME")\n'
        "with qm.apply(model, recipe):  # and inside: model.generate(...)",
        (RECIPE, *_RECIPE_PARTS), RECIPE,
    ),
    "prior": Kind(
        "a prior", "Prior", ("kind", "quickmerge-prior"),
        "A light autoregressive model over merged tokens (QuickMerge++, arXiv 2508.13204), for quickmerge: a learned "
        "term in the choice of the tokens that are kept, and corrections of those that were merged.",
        'import quickmerge as qm\nprior = qm.Prior.from_pretrained("NAME")\n'
        "reducer = qm.QuickMergePrior.from_prior(prior)  # of a language model's prompts: qm.reduce(model, reducer)",
    ),
    "gumiho": Kind(
        "draft heads", "Gumiho", ("kind", "quickmerge-gumiho"),
        "Draft heads (Gumiho, arXiv 2503.10135) for quickmerge: with them a language model writes several tokens a "
        "forward pass, and the text stays its own.",
        'import quickmerge as qm\nrecipe = qm.Recipe(decoding=qm.Gumiho.from_pretrained("NAME"))\n'
        "with qm.apply(model, recipe):  # and inside: model.generate(...)",
    ),
    "dynamicvit": Kind(
        "predictors of DynamicViT", "DynamicViT", ("kind", "quickmerge-dynamicvit"),
        "Predictors of DynamicViT (arXiv 2106.02034) for quickmerge: they say which patches of an image a vision "
        "transformer needs no longer.",
        'import quickmerge as qm\nreducer = qm.DynamicViT.from_pretrained("NAME")\n'
        "with qm.reduce(model, reducer):  # and inside: model(pixel_values)",
        (CONFIG, WEIGHTS, *(f"backbone/{pattern}" for pattern in (*_MODEL, "preprocessor_config.json"))),
    ),
    "recognizer": Kind(
        "a recognizer", "Recognizer", ("kind", "quickmerge-recognizer"),
        "Object recognition as next-token prediction (arXiv 2312.02142), for quickmerge: names what is in an image, in "
        "free words or by a list of labels.",
        'import quickmerge as qm\nrecognizer = qm.Recognizer.from_pretrained("NAME")\n'
        "guesses = recognizer.recognize(pixels)  # or: quickmerge recognize photo.jpg --model NAME",
        (CONFIG, WEIGHTS, *(f"{part}/{pattern}" for part in ("vision", "language") for pattern in _MODEL),
         *(f"tokenizer/{pattern}" for pattern in _TOKENIZER)),
    ),
    "calm": Kind(
        "a CALM", "CalmForCausalLM", ("model_type", "quickmerge-calm"),
        "A continuous autoregressive language model (CALM, arXiv 2510.27688) for quickmerge: each of its steps writes "
        "several tokens at once.",
        'from quickmerge.calm import load_calm\nmodel, tokenizer = load_calm("NAME")\n'
        'out = model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=64)',
        (*_MODEL, *_TOKENIZER),
    ),
    "calm_autoencoder": Kind(
        "a CALM autoencoder", "calm.CalmAutoencoder", ("model_type", "quickmerge-calm-autoencoder"),
        "An autoencoder of chunks of tokens (CALM, arXiv 2510.27688) for quickmerge: a chunk becomes a vector and the "
        "vector that chunk again.",
        'from quickmerge.calm import CalmAutoencoder\nautoencoder = CalmAutoencoder.from_pretrained("NAME").eval()\n'
        "mean, log_std = autoencoder.encode(chunks)  # of token ids, (..., K)",
        (*_MODEL, *_TOKENIZER),
    ),
}  # fmt: skip
"""Every kind of folder that quickmerge saves and the hub may hold."""


def kind_of(folder: Path, wanted: Kind | None = None) -> Kind | None:
    """Which of `KINDS` a folder holds, by its settings alone; None for none of them.

    Args:
        folder: the folder.
        wanted: looked for first, where a folder holds several things.

    Raises:
        DamagedWeightsError: the settings are no JSON.
    """
    held: dict[str, dict[str, Any]] = {}
    for kind in [*([] if wanted is None else [wanted]), *KINDS.values()]:
        path = folder / kind.settings
        if kind.settings not in held:
            held[kind.settings] = read_json(path) if path.exists() else {}
        entry, value = kind.mark
        if held[kind.settings].get(entry) == value:
            return kind
    return None


def belongs(path: str, patterns: Sequence[str]) -> bool:
    """Whether a path, from its folder and with forward slashes, is one of these patterns; a star stops at a slash."""
    return any(fnmatchcase(path, pattern) and path.count("/") == pattern.count("/") for pattern in patterns)


def folder_files(folder: Path, kind: Kind) -> list[str]:
    """The files of a folder that belong to a kind, by their paths from there: what is sent, and all that is."""
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(path for path in found if belongs(path, kind.files))


def looks_like_id(given: object) -> bool:
    """Whether this is the id of something on the hub, owner/name, and no file or folder here."""
    if not isinstance(given, str) or not HUB_ID.fullmatch(given) or len(given) > 200:
        return False
    return given.partition("/")[0] not in (".", "..") and not Path(given).exists()
