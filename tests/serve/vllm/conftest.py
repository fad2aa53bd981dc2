"""Engines of vLLM, one process a module: `make vllm` runs each module of this folder in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

THERE = importlib.util.find_spec("vllm") is not None

if THERE:
    # Before vLLM is imported, which reads them once.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # What an engine starts is a fresh Python; it needs the same torchvision.
    site = str(Path(__file__).parent / "site")
    if site not in sys.path:
        sys.path.insert(0, site)
        import sitecustomize

        sys.meta_path.insert(0, sitecustomize._Declares())
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH", "")]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs an engine is for `make vllm` alone."""
    if THERE:
        return
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.skip(reason="vllm is not installed: make vllm runs these"))
