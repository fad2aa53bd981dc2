"""``quickmerge bench decode``, and what ``quickmerge generate text --drafter`` does: several tokens a step."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quickmerge.console.answers import print_answers
from quickmerge.console.options import (
    DTYPE,
    JSON,
    MODEL,
    REPORT,
    WRITING,
    Alone,
    check_dtype,
    check_model,
    check_output,
    load_writer,
    one_sentence,
    parse_numbers,
    parse_question,
    progress,
    write_json,
)
from quickmerge.errors import QuickmergeError, near_match

if TYPE_CHECKING:
    from collections.abc import Callable

    from quickmerge.bench.harness import Arm
    from quickmerge.datasets.prompts import Prompt
    from quickmerge.speculative import Drafter
    from quickmerge.speculative.bench import Written

DECODE_EXAMPLE = (
    "Example: quickmerge bench decode --drafter runs/gumiho,lookup --prompts prompts.jsonl --temperature 0,1"
)
LOOKUP, SUFFIX = "lookup", "suffix"


def generate_drafter(
    drafter: str,
    tree: str | None,
    file: Path | None,
    prompt: str,
    model: str,
    *,
    dtype: str,
    max_new_tokens: int,
    sample: bool,
    temperature: float | None,
    seed: int,
    compare: bool,
    raw: bool,
    json: Path | None,
    record: Callable[[Drafter, int | str], dict[str, Any]] = lambda drafter, tree: {},
) -> None:
    """Print the answer, and on stderr how many tokens per forward pass of the model gave.

    ``record`` is told the drafter and its tree once the answer is there, and says what else the JSON holds.
    """
    from quickmerge.models.chat import question

    check_output(json)
    nodes = parse_tree(tree)
    document, prompt = parse_question(prompt, file)
    check_model(model, question(document, prompt))
    # what takes seconds to import comes after what can be told at once
    from quickmerge.models.precision import dtype_name
    from quickmerge.speculative.bench import PLAIN, draft_arm, prepare, prompt_ids, write
    from quickmerge.terminal import Terminal

    drafts = load_drafter(drafter)
    arm = draft_arm(drafter_name(drafter), drafts, nodes)
    lm, tokenizer = load_writer(model, dtype)
    alone, errors = Alone.writing(lm, tokenizer), Terminal(stderr=True)
    with errors.status("measuring what a pass costs (once)"), one_sentence(alone):
        ids = prompt_ids(lm, tokenizer, document, prompt, max_new_tokens)
        prepare(lm, arm)
        write(lm, tokenizer, ids[:, -8:], max_new_tokens=1)  # what is run first pays for allocation

    def ask(way: Arm | None) -> Written:
        return write(
            lm, tokenizer, ids, way or PLAIN, max_new_tokens=max_new_tokens, sample=sample, temperature=temperature,
            seed=seed,
        )  # fmt: skip

    results = print_answers(arm, compare, ask, names=("drafted", "plain"), raw=raw, alone=alone)
    if compare:
        print(_compared(results["drafted"], results["plain"]), file=errors.file)
    more = record(drafts, nodes)
    write_json(json, {
        "model": model, "dtype": dtype_name(lm), **more, "drafter": arm.name, "tree": nodes, "prompt": prompt,
        "sample": sample, "temperature": temperature, **{name: found.as_dict() for name, found in results.items()},
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
    from quickmerge.data import GUMIHOS

    if parts := _joined(given):
        return "+".join(map(drafter_name, parts))
    source, *settings = _SETTING.split(given)
    named = source in (LOOKUP, SUFFIX) or source in GUMIHOS
    return ":".join([source if named else Path(source).absolute().name, *settings])


def load_drafter(given: str) -> Drafter:
    """A drafter by what ``--drafter`` says.

    It is ``lookup``, ``suffix``, shipped heads by their model, a folder of ``train gumiho``, or a hub id. Settings may
    follow: ``lookup:ngram=2``, ``runs/gumiho:beam=4:fta=duplicate``. One of the first two and any other, joined by a
    plus sign, draft together: ``suffix+smollm2-135m``.

    Raises:
        QuickmergeError: there is no such folder, it holds something else, or a setting is unknown or out of range.
    """
    from quickmerge.data import GUMIHOS, shipped_gumiho
    from quickmerge.speculative import BestOf, PromptLookup, SuffixDecoding

    if joined := _joined(given):
        return BestOf(*map(load_drafter, joined))
    source, *parts = _SETTING.split(given)
    for name, kind in ((LOOKUP, PromptLookup), (SUFFIX, SuffixDecoding)):
        if source == name:
            with one_sentence():
                return kind(**_settings(source, kind, parts))
    from quickmerge.models.kinds import looks_like_id

    folder = source if looks_like_id(source) else shipped_gumiho(source) or Path(source).expanduser()
    if isinstance(folder, Path) and not folder.is_dir():
        known = [LOOKUP, SUFFIX, *GUMIHOS]
        raise QuickmergeError(
            f"--drafter must be {LOOKUP}, {SUFFIX}, {', '.join(GUMIHOS)} (the heads that ship), a folder of train "
            f"gumiho or a hub id, got {source!r}{near_match(source, known)}"
        )
    from quickmerge.speculative.gumiho import Gumiho

    with one_sentence():
        return Gumiho.from_pretrained(folder, **_settings(source, Gumiho, parts))


_SETTING = re.compile(r":(?=\w+=)")
_JOINED = re.compile(rf"((?:{LOOKUP}|{SUFFIX})(?::\w+=[^+]*)*)\+(.+)")


def _joined(given: str) -> tuple[str, str] | None:
    """Both parts of two drafters that are joined; None for a single one, also for a folder with such a name."""
    found = None if Path(given).expanduser().is_dir() else _JOINED.fullmatch(given)
    return None if found is None else (found[1], found[2])


_WHOLE, _DECIMAL = re.compile(r"[0-9]{1,18}"), re.compile(r"[0-9]{1,18}\.[0-9]{1,18}")


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
        settings[name] = int(value) if _WHOLE.fullmatch(value) else float(value) if _DECIMAL.fullmatch(value) else value
    return settings


# ``quickmerge bench decode``: tokens per forward pass and speed of drafters, on the same prompts.


def decode(
    drafter: Annotated[
        str,
        typer.Option("--drafter", help="lookup, suffix, smollm2-135m, folders of train gumiho, hub ids; with commas."),
    ] = LOOKUP,
    model: MODEL = "smollm2-135m",
    dtype: DTYPE = "float32",
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="A prompt a line, or .jsonl. Default: a shipped dozen."),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Prompts that are answered, the first ones.")] = 64,
    tree: Annotated[str, typer.Option("--tree", help="Drafted tokens that a pass reads: auto or a number.")] = "auto",
    temperature: Annotated[
        str, typer.Option("--temperature", help="With commas; 0 is greedy.", rich_help_panel=WRITING)
    ] = "0",
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=2, help="Longest answer.", rich_help_panel=WRITING)
    ] = 128,
    out: REPORT = None,
    json: JSON = None,
) -> None:
    """Tokens for each pass of the model, and speed, of drafters beside plain decoding of the same prompts."""
    from quickmerge.console.results import recorded, show_result
    from quickmerge.models.precision import dtype_name
    from quickmerge.speculative.bench import PLAIN, bench_drafters, draft_arm
    from quickmerge.speculative.report import drafters_report

    check_output(json, out / "report.html" if out is not None else None)
    check_dtype(dtype)
    nodes = parse_tree(tree)
    temperatures = parse_temperatures(temperature)
    given = [name.strip() for name in drafter.split(",")]
    names = [drafter_name(name) for name in given]
    taken = [PLAIN.name, *names]
    if twice := [name for name in names if taken.count(name) > 1]:
        raise QuickmergeError(f"--drafter must give each drafter a name of its own, got {twice[0]!r} for two ways")
    arms = [draft_arm(name, load_drafter(source), nodes) for name, source in zip(names, given, strict=True)]
    asked = _prompts(prompts)[:limit]
    lm, tokenizer = load_writer(model, dtype)
    with progress() as bar, one_sentence(Alone.writing(lm, tokenizer)):
        task = bar.add_task("measuring", total=(1 + len(arms)) * len(asked) * len(temperatures))

        def advance(label: str) -> None:
            bar.update(task, advance=1, description=label)

        found = bench_drafters(
            lm, tokenizer, asked, arms, temperatures=temperatures, max_new_tokens=max_new_tokens, advance=advance
        )
    found = recorded(found, arms).about(
        model=model, dtype=dtype_name(lm), prompts=len(asked), max_new_tokens=max_new_tokens,
        prompts_file=prompts.name if prompts is not None else "about the shipped document",
    )  # fmt: skip
    show_result(found, drafters_report(found.rows, found.meta), out=out, json=json, records="prompts")


def parse_temperatures(text: str) -> list[float]:
    """``"0,1"`` as numbers of at least 0."""
    temperatures = parse_numbers("--temperature", text, "numbers with commas (0,1)")
    from quickmerge.models.generation import check_temperature

    for temperature in temperatures:
        if temperature != 0:
            check_temperature("--temperature", temperature)
    return temperatures


def _prompts(path: Path | None) -> list[Prompt]:
    from quickmerge.data import demo_document
    from quickmerge.datasets.prompts import Source, document_prompts, read_prompts

    if path is not None:
        return read_prompts(path)
    return document_prompts([Source("handbook", "prose", demo_document())], 12)
