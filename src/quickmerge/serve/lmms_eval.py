"""The door of lmms-eval: what its entry point ``lmms_eval.models`` loads. The model is in ``lmms_model.py``.

python -m lmms_eval --model quickmerge --model_args pretrained=FOLDER,visual=scope,keep=0.25 --tasks ...
"""

from __future__ import annotations

from typing import Any

__all__ = ["manifest"]


def manifest() -> Any:
    """The ``ModelManifest`` by which lmms-eval knows ``--model quickmerge``."""
    from lmms_eval.models.registry_v2 import ModelManifest  # type: ignore[import-not-found]

    return ModelManifest("quickmerge", chat_class_path="quickmerge.serve.lmms_model.QuickmergeVLM")
