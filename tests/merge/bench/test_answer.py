"""Texts that a tokenizer can't take are refused before it sees them."""

from __future__ import annotations

import pytest

from quickmerge.errors import QuickmergeError
from quickmerge.models.chat import document_chat as chat


@pytest.mark.parametrize(("document", "prompt", "name"), [("a\ud800", "b", "document"), ("a", "\udfff", "prompt")])
def test_half_a_character_is_refused(document: str, prompt: str, name: str) -> None:
    with pytest.raises(QuickmergeError, match=rf"^{name} must be a text of whole characters, got half of one"):
        chat(None, document, prompt)
