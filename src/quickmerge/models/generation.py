"""What a model's folder may say about how texts are written, and the temperatures that can be sampled at."""

from __future__ import annotations

import math
from typing import Any

from quickmerge.errors import QuickmergeError

__all__ = ["COOLEST", "check_temperature", "own_generation"]

COOLEST = 1e-4
"""Below it sampling is greedy decoding for any model, and quotients leave the range of float32."""

TOKENS = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id")
"""Settings that are kept: what tokens mean."""
SAMPLING = ("epsilon_cutoff", "eta_cutoff", "min_p", "temperature", "top_h", "top_k", "top_p", "typical_p")
"""Settings that are kept, and said, where tokens are sampled: the model's makers know what suits it."""
SILENT = ("do_sample", "max_length", "max_new_tokens", "transformers_version")
"""Settings that change nothing here, since the caller always says these things himself, or they say nothing."""

NEUTRAL = {
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "min_length": 0, "no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0, "length_penalty": 1.0, "encoder_repetition_penalty": 1.0, "diversity_penalty": 0.0,
    "encoder_no_repeat_ngram_size": 0, "use_cache": True,
}  # fmt: skip
"""Values by which a setting changes nothing; so does False, but for ``use_cache``. Saved configs are full of them."""


def own_generation(model: Any) -> list[str]:
    """Take from a model's ``generation_config`` what would change what our commands write without being asked to.

    Kept are the ids of tokens that begin, end and pad a text, and the settings of sampling, which greedy decoding does
    not look at. Everything else goes back to its default: penalties, suppressed and forced tokens, beams, lengths and
    times, watermarks, kinds of caches and outputs. Call it once on a model that a command has opened itself, before it
    generates, and print what it returns; a model that a caller has opened is his.

    Args:
        model: what ``generate`` will be called on; one without a ``generation_config`` stays as it is.

    Returns:
        Sentences for the user: which settings are left out, and which are used where tokens are sampled. Empty if the
        model's folder asks for nothing.

    Raises:
        QuickmergeError: a temperature that nothing can be sampled at.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return []
    # What is not set is None.
    given = {name: value for name, value in vars(config).items() if value is not None and name not in SILENT}
    given = {name: value for name, value in given.items() if name[0] != "_" and not _neutral(name, value)}
    kept = {name: value for name, value in given.items() if name in (*TOKENS, *SAMPLING)}
    if "temperature" in kept:
        check_temperature("temperature in the model's generation_config.json", kept["temperature"])
    model.generation_config = type(config)(**kept)
    told = []
    if left := sorted(given.keys() - kept.keys()):
        told.append(f"note: the model's generation_config sets {', '.join(left)}: left out here")
    if used := [f"{name}={kept[name]}" for name in SAMPLING if name in kept]:
        told.append(f"note: where tokens are sampled, the model's generation_config sets {', '.join(used)}")
    return told


def _neutral(name: str, value: Any) -> bool:
    if value is False:
        return name != "use_cache"
    return name in NEUTRAL and type(value) in (bool, int, float) and value == NEUTRAL[name]


def check_temperature(name: str, value: Any) -> None:
    """Raise QuickmergeError unless tokens can be sampled at a temperature.

    Args:
        name: what it is called.
        value: a number of at least `COOLEST`.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < COOLEST:
        raise QuickmergeError(
            f"{name} must be a number of at least {COOLEST:g} where tokens are sampled, got {value!r}: "
            "0 stands for greedy decoding"
        )
