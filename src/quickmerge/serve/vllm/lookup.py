"""Prompt lookup as a proposer of vLLM's: drafts are what followed in the text where it last read like this.

``speculative_config={"method": "custom_class", "model": "quickmerge.serve.vllm.LOOKUP", "num_speculative_tokens": 4}``,
with the value of `quickmerge.serve.vllm.LOOKUP`. vLLM checks one chain of drafts a request and not a tree; what it
writes is what it writes without drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quickmerge.errors import QuickmergeError
from quickmerge.serve.vllm.plugin import check_version
from quickmerge.serve.vllm.settings import KEY, recipe_of
from quickmerge.speculative.lookup import PromptLookup, TextIndex

__all__ = ["LookupProposer"]

NGRAM = 3


class LookupProposer:
    """Drafts for the requests of a batch, by their tokens alone.

    The recipe's ``decoding`` says how long a run is looked up, where the model has a recipe; the length of drafts is
    vLLM's ``num_speculative_tokens``.

    Args:
        vllm_config: of the engine.

    Raises:
        QuickmergeError: vLLM is of an untested version, or the recipe drafts with something else.
    """

    def __init__(self, vllm_config: Any) -> None:
        check_version()
        self.length = int(vllm_config.speculative_config.num_speculative_tokens)
        self.longest = int(vllm_config.model_config.max_model_len)
        self.ngram = _ngram(vllm_config.model_config.hf_config)
        self._texts: dict[int, TextIndex] = {}

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is loaded: there are no weights."""

    def propose(
        self, sampled_token_ids: Sequence[Sequence[int]], num_tokens_no_spec: Any, token_ids_cpu: Any, **_: Any
    ) -> list[list[int]]:
        """Drafts behind each request of the batch.

        Args:
            sampled_token_ids: what was just written by each; nothing where a prompt is still being read.
            num_tokens_no_spec: ``(B,)`` length of each text, what was just written included.
            token_ids_cpu: ``(B, longest)``, their tokens.
        """
        drafts: list[list[int]] = []
        for row, written in enumerate(sampled_token_ids):
            length = int(num_tokens_no_spec[row])
            room = min(self.length, self.longest - length)
            if not len(written) or length < 2 or room < 1:
                drafts.append([])
                continue
            ids = token_ids_cpu[row, :length].tolist()
            drafts.append(self._text(row, ids[:-1]).chain(ids[-1], room))
        return drafts

    def _text(self, row: int, ids: list[int]) -> TextIndex:
        """The index of a request's text. Requests change their rows, so the tokens tell whose it is."""
        held = self._texts.get(row)
        if held is None or ids[: len(held.ids)] != held.ids:
            held = TextIndex([], self.ngram)
            self._texts[row] = held
        held.extend(ids[len(held.ids) :])
        return held


def _ngram(config: Any) -> int:
    """How many tokens are looked up: the recipe's, where there is one that says."""
    if getattr(config, KEY, None) is None:
        return NGRAM
    speculation = recipe_of(config).speculation
    if speculation is None:
        return NGRAM
    if not isinstance(speculation.drafter, PromptLookup):
        raise QuickmergeError(
            f"decoding must be PromptLookup for {__name__}, got {type(speculation.drafter).__name__}; Gumiho's heads "
            "are exported by quickmerge export eagle"
        )
    return speculation.drafter.ngram
