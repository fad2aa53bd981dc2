"""A prompt with images that was read: what is left of it, and how what follows it fits on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from quickmerge.merge.text.shortened import ShortPrompt


@dataclass
class VisualPrompt(ShortPrompt):
    """What a cache knows of a prompt with images."""

    gone_are: ClassVar[str] = "visual ones that are gone included"
