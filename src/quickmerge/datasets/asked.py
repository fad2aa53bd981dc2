"""Windows of running text of which some end in a question: so that what is trained learns to keep what may be asked."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from quickmerge.datasets.task_prompts import FORMATS, lay_out
from quickmerge.datasets.tasks import TASKS, TaskMaker
from quickmerge.datasets.text import TextWindows
from quickmerge.errors import QuickmergeError, near_match

__all__ = ["ASKED", "AskedWindows"]

ASKED = ("needle", "needles4", "pairs12", "people", "copy", "follows", "steps", "constant", "labels")
"""Tasks that are asked unless others are named."""

FIRST_SEED = 1_000_000
"""Seeds of training begin here, far from those that anything is measured with."""

EACH_FORMAT = (0.4, 0.3, 0.3)
"""How often a prompt ends in the begun answer, in ``Answer:`` and in a chat template."""


class AskedWindows(Dataset[Tensor]):
    """Windows ``(context + target,)`` of token ids; a share of them holds facts and ends its context in a question.

    In such a window the facts of a task (`quickmerge.datasets.TaskMaker`) are hidden in the window's own text, the
    question ends with the last token of the context, and the target is the answer and then the window's own text again.
    So one loss serves both kinds. What a window holds depends on its index and the seed alone.

    Args:
        windows: running text, each ``context + target`` tokens.
        tokenizer: the one that made them; windows end in a chat template only where it has one.
        context: tokens of a window that are the prompt.
        share: of the windows that ask, in [0, 1].
        tasks: names of tasks that are asked.
        seed: of the draws.

    Raises:
        QuickmergeError: for a share, a task or a context out of range.
    """

    def __init__(
        self,
        windows: TextWindows,
        tokenizer: object,
        *,
        context: int,
        share: float = 0.5,
        tasks: Sequence[str] = ASKED,
        seed: int = 0,
    ) -> None:
        if isinstance(share, bool) or not (isinstance(share, (int, float)) and 0 <= share <= 1):
            raise QuickmergeError(f"share must be a number in [0, 1], got {share!r}")
        for task in tasks:
            if task not in TASKS:
                raise QuickmergeError(f"tasks must be of {', '.join(TASKS)}, got {task!r}{near_match(task, TASKS)}")
        if not 0 < context < windows.length:
            raise QuickmergeError(f"context must be in 1..{windows.length - 1}, got {context}")
        self.windows, self.context, self.share, self.tasks, self.seed = windows, context, share, tuple(tasks), seed
        self._maker = TaskMaker(tokenizer, context)
        self._formats = FORMATS if getattr(tokenizer, "chat_template", None) else FORMATS[:2]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Tensor:
        """One window, ``(context + target,)`` token ids as int64."""
        own = self.windows[index]
        draw = random.Random(f"{self.seed} {index % len(self)}")
        return own if draw.random() >= self.share else self._asked(own, draw)

    def _asked(self, own: Tensor, draw: random.Random) -> Tensor:
        tokenizer = self._maker.tokenizer
        text = tokenizer.decode(own[: self.context])
        maker = replace(self._maker, texts=(text,), code=(text,), queries=1)
        sample = maker.make(draw.choice(self.tasks), FIRST_SEED + draw.randrange(FIRST_SEED))
        asked = lay_out(
            tokenizer, sample, sample.queries[0], draw.choices(self._formats, EACH_FORMAT[: len(self._formats)])[0]
        )
        # The question ends where the context does: what is too long loses its front, what is too short gets more text.
        prompt = list(asked.prompt)[-self.context :]
        front = own[: self.context - len(prompt)].tolist()
        behind = [*asked.lead, *asked.answer, *own[self.context :].tolist()]
        return torch.tensor([*front, *prompt, *behind][: len(own)])

    def describe(self, index: int) -> str:
        """Where the window's text stands."""
        return self.windows.describe(index)

    def fingerprint(self) -> str:
        """A sha256, in hexadecimal: it differs where the training would."""
        told = [self.windows.fingerprint(), self.context, self.share, self.tasks, self.seed, self._maker.fingerprint]
        return hashlib.sha256(repr(told).encode()).hexdigest()
