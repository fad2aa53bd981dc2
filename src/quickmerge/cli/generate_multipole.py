"""``quickmerge generate --attention multipole``: answer a prompt about a long document that is read by its clusters."""

from __future__ import annotations

import re
from ast import literal_eval
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickmerge.console.answers import print_answers
from quickmerge.console.options import (
    Alone,
    check_model,
    check_output,
    load_writer,
    one_sentence,
    parse_layer,
    parse_question,
    told_min_tokens,
    write_json,
)
from quickmerge.errors import QuickmergeError, near_match
from quickmerge.merge.cli.options import add_prior, parse_reducer

if TYPE_CHECKING:
    from quickmerge.merge.bench.answer import Answer
    from quickmerge.merge.reducers import Reducer
    from quickmerge.multipole import Multipole

NAME = "multipole"


def generate_multipole(
    attention: str,
    budget: int | None,
    file: Path | None,
    prompt: str,
    model: str | None,
    reducer: str | None,
    keep: float | None,
    layer: str | None,
    prior: str | None,
    min_tokens: int | None,
    *,
    max_new_tokens: int,
    sample: bool,
    temperature: float | None,
    seed: int,
    compare: bool,
    raw: bool,
    json: Path | None,
) -> None:
    """Print the answer, and on stderr what was read and what it cost. Tokens are merged too if anything says how."""
    from quickmerge.models.chat import question

    check_output(json)
    document, prompt = parse_question(prompt, file)
    name = "smollm2-135m" if model is None else model
    check_model(name, question(document, prompt))
    # what takes seconds to import comes after what can be told at once
    from quickmerge.merge.bench.answer import answer
    from quickmerge.multipole import multipole

    settings = parse_attention(attention, budget)
    method: Reducer | None = None
    if any(given is not None for given in (reducer, keep, layer, prior, min_tokens)):
        method = parse_reducer(reducer or "quickmerge", 0.4 if keep is None else keep)
        method = method if prior is None else add_prior(method, prior)
    depth = parse_layer(layer)
    lm, tokenizer = load_writer(name)

    def ask(way: Multipole | None) -> Answer:
        return answer(
            lm, tokenizer, document, prompt, None if way is None else method, depth,
            attention=None if way is None else multipole(lm, way),
            max_new_tokens=max_new_tokens, sample=sample, temperature=temperature, seed=seed,
            **told_min_tokens(min_tokens),
        )  # fmt: skip

    results = print_answers(
        settings, compare, ask, lambda found: str(found.attention), (NAME, "full"), raw=raw,
        alone=Alone.writing(lm, tokenizer),
    )  # fmt: skip
    write_json(json, {
        "model": name, "attention": settings.label, "reducer": None if method is None else method.label,
        "keep": None if method is None else method.keep, "prompt": prompt,
        **{way: found.as_dict() for way, found in results.items()},
    })  # fmt: skip


def parse_attention(text: str, budget: int | None) -> Multipole:
    """Settings of multipole attention by what ``--attention`` and ``--budget`` say: ``multipole:ratio=0.125:sink=4``.

    Settings may also be parted by commas.

    Raises:
        QuickmergeError: it is another attention, or a setting is unknown, given twice, or out of range.
    """
    from quickmerge.multipole import Multipole

    name, *parts = re.split("[:,]", text)
    if name != NAME:
        raise QuickmergeError(f"--attention must be {NAME}, got {name!r}{near_match(name, [NAME])}")
    allowed = [f.name for f in fields(Multipole)]
    settings: dict[str, Any] = {} if budget is None else {"budget": budget}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or key not in allowed:
            raise QuickmergeError(
                f"--attention {NAME} takes settings as name=value with a name of {', '.join(allowed)}, "
                f"got {part!r}{near_match(key, allowed)}"
            )
        if key in settings:
            raise QuickmergeError(f"{key} must be given once, got {settings[key]!r} and {value}")
        settings[key] = _value(value)
    with one_sentence():
        return Multipole(**settings)


def _value(text: str) -> Any:
    """A setting as written on a command line: a number or a truth value where it is one, else the text."""
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text
