"""``python -m quickmerge.lm_eval`` is lm-eval's own command line, which then knows ``--model quickmerge``.

    python -m quickmerge.lm_eval --model quickmerge --model_args pretrained=smollm2-135m,reducer=quickmerge,keep=0.4 \\
        --tasks quickmerge_needle_number --limit 20

lm-eval 0.4.13 has no door for models of others; releases after it find ours by the entry point ``lm_eval.models``.
"""

from __future__ import annotations

from typing import Any

from quickmerge.console.ending import end
from quickmerge.errors import QuickmergeError, first_sentence, need

__all__ = ["main"]


def run() -> None:
    """Run lm-eval's command line with our model and tasks, and print what reading took.

    Raises:
        QuickmergeError: lm-eval is not installed, or it says that something that was given is wrong.
    """
    need("lm_eval", "harness", "tasks of lm-eval")
    from lm_eval._cli import HarnessCLI  # type: ignore[import-untyped]
    from lm_eval.utils import setup_logging  # type: ignore[import-untyped]

    from quickmerge.serve.harness import prepare, register

    setup_logging()
    cli = HarnessCLI()
    args = cli.parse_args()
    register()
    if getattr(args, "command", None) in ("run", "ls", "validate"):
        prepare(args)
    try:
        cli.execute(args)
    except QuickmergeError:
        raise
    except (ValueError, OSError, ImportError) as error:  # what lm-eval and datasets say of what was given
        raise QuickmergeError(f"lm-eval stopped ({first_sentence(error)})") from error
    _print_costs()


def _print_costs() -> None:
    from quickmerge.serve.costs import costs_table
    from quickmerge.serve.lm_eval import QuickmergeLM

    for made in QuickmergeLM.made:
        told: dict[str, Any] = made.told()
        if told["costs"]:
            print(f"What reading took, means over prompts, with {told['label']}:\n")
            print(costs_table(told["costs"]).markdown())


def main() -> None:
    """End as every command of quickmerge does: with one sentence and exit code 2 where what was given is wrong."""
    end(run)


if __name__ == "__main__":
    main()
