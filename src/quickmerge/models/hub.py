"""Fetching a model from the hub as files, which then pass the same checks as any folder."""

from __future__ import annotations

from pathlib import Path

from quickmerge.errors import UnknownModelError, first_sentence

__all__ = ["hub_folder"]

FILES = ("*.json", "*.model", "*.tiktoken", "*.jinja", "*.txt", "LICENSE*", "NOTICE*")
"""What is fetched of a model besides its weights: its settings and its tokenizer."""
OTHERS = ("onnx/*", "openvino/*", "original/*", "coreml/*", "*/*.safetensors", "consolidated*.safetensors")
"""The same model for other programs, and other models that lie in folders of their own."""


def hub_folder(name: str, *, weights: bool = True) -> Path:
    """The folder in the hub's cache that holds a model's files, fetched if need be.

    Args:
        name: a hub id, ``"owner/name"``.
        weights: whether its weights are wanted; only safetensors are fetched.

    Raises:
        UnknownModelError: there is no such model, or the hub can't be reached.
    """
    from huggingface_hub import snapshot_download

    wanted = [*FILES, *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=list(OTHERS)))
    except (OSError, ValueError) as error:  # what the hub's client raises derives from these
        raise UnknownModelError(
            f"the hub has no model {name!r} that can be reached from here ({first_sentence(error)}): "
            "check the id and the connection, or give a local model folder"
        ) from error
