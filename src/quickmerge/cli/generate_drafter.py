"""``quickmerge generate --drafter``: answer a prompt with several tokens a step; the text stays the model's own."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickmerge.cli.answers import print_answers
from quickmerge.cli.common import (
    Alone,
    check_model,
    check_output,
    load_writer,
    one_sentence,
    parse_question,
    write_json,
)
from quickmerge.errors import QuickmergeError, near_match

if TYPE_CHECKING:
    from quickmerge.decoding import Drafter
    from quickmerge.evaluation.drafters import DraftArm, Written

LOOKUP = "lookup"


def generate_drafter(
    drafter: str,
    tree: str | None,
    file: Path | None,
    prompt: str,
    model: str | None,
    *,
    max_new_tokens: int,
    sample: bool,
    temperature: float | None,
    seed: int,
    compare: bool,
    raw: bool,
    json: Path | None,
) -> None:
    """Print the answer, and on stderr how many tokens a pass of the model gave."""
    from quickmerge.models.template import question

    check_output(json)
    nodes = parse_tree(tree)
    document, prompt = parse_question(prompt, file)
    name = "smollm2-135m" if model is None else model
    check_model(name, question(document, prompt))
    # what takes seconds to import comes after what can be told at once
    from quickmerge.evaluation.drafters import PLAIN, DraftArm, prepare, prompt_ids, write
    from quickmerge.terminal import Terminal

    arm = DraftArm(drafter_name(drafter), load_drafter(drafter), nodes)
    lm, tokenizer = load_writer(name)
    alone, errors = Alone.writing(lm, tokenizer), Terminal(stderr=True)
    with errors.status("measuring what a pass costs (once)"), one_sentence(alone):
        ids = prompt_ids(lm, tokenizer, document, prompt, max_new_tokens)
        prepare(lm, arm)
        write(lm, tokenizer, ids[:, -8:], max_new_tokens=1)  # what is run first pays for allocation

    def ask(way: DraftArm | None) -> Written:
        return write(
            lm, tokenizer, ids, way or PLAIN, max_new_tokens=max_new_tokens, sample=sample, temperature=temperature,
            seed=seed,
        )  # fmt: skip

    results = print_answers(arm, compare, ask, names=("drafted", "plain"), raw=raw, alone=alone)
    if compare:
        print(_compared(results["drafted"], results["plain"]), file=errors.file)
    write_json(json, {
        "model": name, "drafter": arm.name, "tree": nodes, "prompt": prompt, "sample": sample,
        "temperature": temperature, **{name: found.as_dict() for name, found in results.items()},
    })  # fmt: skip


def _compared(drafted: Written, plain: Written) -> str:
    pace = (plain.seconds / max(1, plain.tokens)) / (drafted.seconds / max(1, drafted.tokens))
    same = drafted.ids.tolist() == plain.ids.tolist()
    text = "the same text, token for token" if same else "another text"
    return f"drafted against plain: {pace:.2f}x as fast a token, {text}"


def parse_tree(text: str | None) -> int | str:
    """``--tree``: ``"auto"`` or a number of nodes."""
    if text is None or text == "auto":
        return "auto"
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise QuickmergeError(f"--tree must be auto or a whole number of at least 1, got {text!r}")


def drafter_name(given: str) -> str:
    """What tables call a drafter: ``lookup`` or the name of its folder, and the settings that were given with it."""
    source, *settings = _SETTING.split(given)
    from quickmerge.data import GUMIHOS

    named = source == LOOKUP or source in GUMIHOS
    return ":".join([source if named else Path(source).absolute().name, *settings])


def load_drafter(given: str) -> Drafter:
    """A drafter by what ``--drafter`` says: ``lookup``, shipped heads by their model, or a folder of ``train gumiho``.

    Settings may follow: ``lookup:ngram=2``, ``runs/gumiho:beam=4:fta=duplicate``.

    Raises:
        QuickmergeError: there is no such folder, it holds something else, or a setting is unknown or out of range.
    """
    from quickmerge.data import GUMIHOS, shipped_gumiho
    from quickmerge.decoding import PromptLookup

    source, *parts = _SETTING.split(given)
    if source == LOOKUP:
        with one_sentence():
            return PromptLookup(**_settings(source, PromptLookup, parts))
    folder = shipped_gumiho(source) or Path(source).expanduser()
    if not folder.is_dir():
        known = [LOOKUP, *GUMIHOS]
        raise QuickmergeError(
            f"--drafter must be {LOOKUP}, {', '.join(GUMIHOS)} (the heads that ship) or a folder of train gumiho, got "
            f"{source!r}{near_match(source, known)}"
        )
    from quickmerge.decoding.gumiho import Gumiho

    with one_sentence():
        return Gumiho.from_pretrained(folder, **_settings(source, Gumiho, parts))


_SETTING = re.compile(r":(?=\w+=)")


def _settings(source: str, drafter: type, parts: list[str]) -> dict[str, Any]:
    """What follows a drafter's name, ``name=value``, as arguments of its class."""
    kinds = (inspect.Parameter.KEYWORD_ONLY,)
    allowed = [name for name, one in inspect.signature(drafter).parameters.items() if one.kind in kinds]
    settings: dict[str, Any] = {}
    for part in parts:
        name, _, value = part.partition("=")
        if name not in allowed:
            raise QuickmergeError(
                f"--drafter {source} takes the settings {', '.join(allowed)}, got {name!r}{near_match(name, allowed)}"
            )
        settings[name] = int(value) if value.isascii() and value.isdigit() else value
    return settings
