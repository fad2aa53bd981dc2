"""What ``python -m quickmerge.lm_eval`` does before lm-eval begins: our model and tasks are named, lengths checked.

RULER's tasks are lm-eval's own. Three of them look for the longest prompt that fits, and may look for ever where none
does; so the least length that each needs with the tokenizer at hand is found first, by lm-eval's own generators.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Any

from quickmerge.errors import QuickmergeError, need
from quickmerge.models.load import MODELS

__all__ = ["TASKS_FOLDER", "check_lengths", "prepare", "register"]

TASKS_FOLDER = Path(__file__).parent / "lm_eval_tasks"
"""Where our tasks lie, for ``--include_path``."""

NAME = "quickmerge"

RULER = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multiquery", "niah_multivalue", "ruler_vt", "ruler_cwe", "ruler_fwe", "ruler_qa_squad", "ruler_qa_hotpot",
)  # fmt: skip
GROUPS = ("ruler", "longcxt")
"""Names under which lm-eval has all of them."""

DRAWS = 8
"""How often a prompt is drawn to see how long one may be."""
SLACK = 1.05
"""What longer ones may have beyond these."""
EXAMPLE = 500
"""Tokens into which lm-eval fits the solved example of ``ruler_vt``, its answer of at most 30 included."""


def register() -> None:
    """Make lm-eval know ``--model quickmerge``, if its release does not find it by the entry point."""
    import_module("lm_eval.models")  # which registers lm-eval's own
    from lm_eval.api.registry import model_registry  # type: ignore[import-untyped]

    if NAME not in model_registry:
        model_registry.register(NAME, target="quickmerge.serve.lm_eval:QuickmergeLM")


def prepare(args: Namespace) -> None:
    """Complete what was given to lm-eval: the folder of our tasks, and for an embedded model its tokenizer's.

    Args:
        args: lm-eval's, parsed; changed in place.

    Raises:
        QuickmergeError: a task of RULER can't be made at one of the lengths.
    """
    own = getattr(args, "include_path", None)
    args.include_path = [str(TASKS_FOLDER), own] if own else str(TASKS_FOLDER)
    if args.command != "run":
        return
    written = _written(args)
    model_args, metadata = (_mapping(written.get(name)) for name in ("model_args", "metadata"))
    if written.get("model") == NAME and "tokenizer" not in {**model_args, **metadata}:
        pretrained = model_args.get("pretrained")
        if (
            pretrained in MODELS
        ):  # tasks that measure prompts load the tokenizer by a name that the hub knows, or a folder
            from quickmerge.serve.lm_eval import model_folder

            metadata = {**metadata, "tokenizer": model_folder(str(pretrained))}
            args.metadata = metadata
    given = written.get("tasks") or []
    patterns = [each.strip() for one in ([given] if isinstance(given, str) else given) for each in str(one).split(",")]
    names = [name for name in RULER if any(p in GROUPS or fnmatch(name, p) for p in patterns)]
    if not names:
        return
    need("wonderwords", "harness", "tasks of RULER")
    if any(name in LEAST for name in names):
        from lm_eval.tasks.ruler import common_utils  # type: ignore[import-untyped]

        told = {**model_args, **metadata}
        tokenizer = common_utils.resolve_tokenizer_name(told)
        if tokenizer is None:
            raise QuickmergeError("tasks of RULER need a tokenizer: give --metadata tokenizer=FOLDER")
        lengths = told.get("max_seq_lengths", common_utils.DEFAULT_SEQ_LENGTHS)
        check_lengths(names, lengths, common_utils.get_tokenizer(tokenizer))


def _written(args: Namespace) -> dict[str, Any]:
    """What stands in the YAML of ``--config``, and over it what stands on the command line."""
    found: dict[str, Any] = {}
    if getattr(args, "config", None):
        from lm_eval.config.evaluate_config import EvaluatorConfig  # type: ignore[import-untyped]

        found.update(EvaluatorConfig.load_yaml_config(args.config))
    found.update({name: value for name, value in vars(args).items() if value})
    return found


def _mapping(given: Any) -> dict[str, Any]:
    if isinstance(given, str):
        from lm_eval.utils import simple_parse_args_string  # type: ignore[import-untyped]

        given = simple_parse_args_string(given)
    return dict(given) if isinstance(given, Mapping) else {}


# The shortest prompts of RULER's tasks.


def check_lengths(tasks: list[str], lengths: Any, tokenizer: Any) -> None:
    """Raise QuickmergeError for a length at which one of RULER's tasks may look for a prompt for ever, or ask nothing.

    Args:
        tasks: names of lm-eval's; those that need no look are passed over.
        lengths: ``max_seq_lengths``, in tokens.
        tokenizer: with which lm-eval measures prompts.
    """
    if isinstance(lengths, (int, float)) or not isinstance(lengths, (list, tuple)) or not lengths:
        raise QuickmergeError(f"max_seq_lengths must be a list of numbers such as [1024,2048], got {lengths!r:.80}")
    for task in tasks:
        if task not in LEAST:
            continue
        least = LEAST[task](lambda text: len(tokenizer(text).input_ids))
        if least is None:
            raise QuickmergeError(f"{task} can't be made with this tokenizer, which needs more than {EXAMPLE} tokens "
                                  "for the shortest example of the task")  # fmt: skip
        if min(lengths) < least:
            raise QuickmergeError(f"max_seq_lengths must be at least {least} for {task} with this tokenizer, got "
                                  f"{min(lengths)}: at fewer lm-eval may look for one that fits for ever")  # fmt: skip


Length = Callable[[str], int]


def _longest(draw: Callable[[], int]) -> int:
    return round(max(draw() for _ in range(DRAWS)) * SLACK)


def _variables(length: Length) -> int | None:
    """``ruler_vt``: ten sentences of filler, behind an example of five."""
    from lm_eval.tasks.ruler.vt_utils import generate_input_output  # type: ignore[import-untyped]

    if _longest(lambda: length(generate_input_output(5, 1, 4, is_icl=True)[0])) + 30 > EXAMPLE:
        return None

    def whole() -> int:
        prompt, answer = generate_input_output(10, 1, 4)
        return length(prompt + f" {answer}")

    return _longest(whole) + 30 + round(EXAMPLE * SLACK)


def _common_words(length: Length) -> int:
    """``ruler_cwe``: ten words, six times each, behind an example of twenty."""
    from lm_eval.tasks.ruler.cwe_utils import generate_input_output  # type: ignore[import-untyped]

    def whole() -> int:
        example, prompt, answer = generate_input_output(10, EXAMPLE)
        return length(example + "\n" + prompt + " " + " ".join(f"{i + 1}. {word}" for i, word in enumerate(answer)))

    return _longest(whole) + 120


def _frequent_words(length: Length) -> int:
    """``ruler_fwe``: the question alone, twice, and a vocabulary of which three words can be asked for."""
    from lm_eval.tasks.ruler.fwe_utils import TEMPLATE  # type: ignore[import-untyped]

    return max(2 * length(TEMPLATE), 256)


LEAST: dict[str, Callable[[Length], int | None]] = {
    "ruler_vt": _variables, "ruler_cwe": _common_words, "ruler_fwe": _frequent_words,
}  # fmt: skip
"""The least length of the tasks whose generators never give up."""
