"""``quickmerge generate text FILE --ask ... --ask ...``: a document is read once, and every question behind it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickmerge.console.options import Alone, check_text, load_writer, one_sentence, read_text, write_json
from quickmerge.errors import QuickmergeError, clean
from quickmerge.files import MOST_TEXT
from quickmerge.recipe.options import record

if TYPE_CHECKING:
    from quickmerge.recipe import Recipe

__all__ = ["ask_each", "check_asked"]


def check_asked(file: Path | None, questions: Sequence[str]) -> str:
    """The text of the document that is asked about.

    Raises:
        QuickmergeError: there is none, or a question is no text.
    """
    if file is None:
        raise QuickmergeError("--ask is for questions about a document: give its file too")
    for each in questions:
        check_text("--ask", each)
    return check_text(str(file), read_text(file, most=MOST_TEXT))


def ask_each(
    model: str, document: str, questions: Sequence[str], recipe: Recipe, settings: dict[str, Any], *, compare: bool,
    raw: bool, json: Path | None, dtype: str = "float32",
) -> None:  # fmt: skip
    """Read the document and answer every question, by a recipe and, if compared, by the model alone.

    Answers go to stdout, each under its question; what reading and answering cost goes to stderr.

    Args:
        model: its name.
        document: what the questions are about.
        questions: in their order.
        recipe: what is done to the model.
        settings: of `quickmerge.Reading.ask`.
        compare: ask the unmodified model, too.
        raw: print the answers as they are.
        json: the file of the results.
        dtype: of the weights, as for `quickmerge.load`.
    """
    from quickmerge.models.precision import dtype_name
    from quickmerge.recipe import read
    from quickmerge.terminal import Terminal

    lm, tokenizer = load_writer(model, dtype)
    alone, errors = Alone.writing(lm, tokenizer), Terminal(stderr=True)
    told: dict[str, Any] = {}
    for name, way in [("recipe", recipe), ("plain", None)][: 2 if compare else 1]:
        with errors.status(f"reading ({name})"), one_sentence(alone):
            reading = read(lm, tokenizer, document, way)
        if compare:
            print(f"== {name} ==")
        answers = []
        for each in questions:
            with errors.status(f"answering ({name})"), one_sentence(alone):
                found = reading.ask(each, **settings)
            print(f"{each if raw else clean(each)}\n{found.text if raw else clean(found.text)}\n")
            answers.append({"prompt": each, **found.as_dict()})
        first = sum(each["ttft_seconds"] for each in answers) / len(answers)
        print(reading.stats, file=errors.file)
        print(f"read once: {reading.ids.shape[1]} tokens in {reading.seconds:.2f} s, "
              f"{reading.cache_bytes / 2**20:.2f} MiB; then {first:.2f} s to the first token of an answer",
              file=errors.file)  # fmt: skip
        told["by_recipe" if way is not None else "plain"] = {
            "reading": {"tokens": reading.ids.shape[1], "seconds": reading.seconds, "cache_bytes": reading.cache_bytes,
                        **reading.stats.as_dict()},
            "answers": answers,
        }  # fmt: skip
    if json is not None:
        write_json(json, {"model": model, "dtype": dtype_name(lm), **record(recipe), **settings, **told})
