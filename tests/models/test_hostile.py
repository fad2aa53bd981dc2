"""Folders that a stranger made: no code of theirs runs, nothing is read without end or built without bound."""

import ast
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quickmerge
from quickmerge.errors import DamagedWeightsError, QuickmergeError, UnknownModelError, UnsupportedModelError
from quickmerge.models import load, load_vision, load_vlm
from quickmerge.models.folder import check_model_folder
from quickmerge.models.weights import (
    HEADER_BYTES,
    Held,
    check_build,
    check_finite,
    check_integers,
    local_path,
    read_header,
    read_json,
)

SOURCE = Path(quickmerge.__file__).parent


# No code ------------------------------------------------------------------------------------------------------------


def test_every_call_that_could_run_a_folders_code_says_no() -> None:
    found = 0
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr not in ("from_pretrained", "from_config"):
                continue
            owner = ast.unparse(node.func.value)
            if not owner.lower().startswith("auto"):
                continue  # a class of ours, or one of transformers' own
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            answer = given.get("trust_remote_code")
            assert isinstance(answer, ast.Constant) and answer.value is False, f"{path}:{node.lineno}"
            found += 1
    assert found > 10


EVIL = "from pathlib import Path\nPath(__file__).with_name('RAN').write_text('')\nraise SystemExit(0)\n"
PLACES = {
    "config.json": ["AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoTokenizer"],
    "tokenizer_config.json": ["AutoTokenizer", "AutoProcessor"],
    "preprocessor_config.json": ["AutoImageProcessor", "AutoProcessor", "AutoFeatureExtractor"],
    "processor_config.json": ["AutoProcessor", "AutoImageProcessor", "AutoVideoProcessor"],
}


def test_no_kind_of_auto_map_runs_code_though_the_user_types_yes(tiny_folder: Path, tmp_path: Path) -> None:
    folders = []
    for name, kinds in PLACES.items():
        for kind in kinds:
            for known in (True, False):  # a model type that transformers has, or one that only the folder knows
                folder = tmp_path / f"{name}-{kind}-{known}"
                shutil.copytree(tiny_folder, folder)
                (folder / "evil.py").write_text(EVIL)
                path = folder / name
                data = json.loads(path.read_text()) if path.exists() else {}
                value: Any = ["evil.Evil", "evil.Evil"] if kind == "AutoTokenizer" else "evil.Evil"
                data["auto_map"] = {kind: value}
                if not known:
                    data |= {"model_type": "mine", "tokenizer_class": "Mine", "processor_class": "Mine"}
                    data |= {"image_processor_type": "Mine"}
                path.write_text(json.dumps(data))
                folders.append(folder)
    generate = tmp_path / "generate"
    shutil.copytree(tiny_folder, generate)
    (generate / "custom_generate").mkdir()
    (generate / "custom_generate" / "generate.py").write_text(EVIL)
    folders.append(generate)
    code = (
        "import sys, quickmerge as qm\n"
        "from quickmerge.models.tokenizers import load_tokenizer\n"
        "from quickmerge.models import load_shape_only\n"
        "for folder in sys.argv[1:]:\n"
        "    for door in (qm.load, qm.load_vision, qm.load_vlm, load_tokenizer, load_shape_only):\n"
        "        try: door(folder)\n"
        "        except qm.QuickmergeError as error: assert '\\n' not in str(error)\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub")}
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, folders)], input="y\n" * 1000, text=True, capture_output=True,
        env=environment, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert "[y/N]" not in run.stdout, "nobody is even asked"
    assert not list(tmp_path.rglob("RAN"))


# Files --------------------------------------------------------------------------------------------------------------


def put_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def put_zeros(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def put_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def put_much(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)  # no disk is needed for it


FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "special_tokens_map.json",
)


@pytest.mark.parametrize("put", [put_pipe, put_zeros, put_folder, put_much])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_regular_file_of_a_sensible_size_is_refused(
    tiny_folder: Path, name: str, put: Callable[[Path], None]
) -> None:
    put(tiny_folder / name)
    with pytest.raises(QuickmergeError, match=name.replace(".", r"\.")):
        check_model_folder(tiny_folder)
    if put is not put_much:
        for door in (load, load_vision, load_vlm):
            with pytest.raises(QuickmergeError, match=name.replace(".", r"\.")):
                door(tiny_folder, progress=False)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 200 + "1" + "}" * 200, "[]", "", "{", '{"a": NaN', "\udcff", "9" * 5000]
)
def test_json_that_is_none_or_too_deep_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DamagedWeightsError, match=r"config\.json is damaged"):
        read_json(path)


def test_pickles_are_not_read(tiny_folder: Path) -> None:
    torch.save({}, tiny_folder / "pytorch_model.bin")
    (tiny_folder / "model.safetensors").unlink()
    with pytest.raises(UnknownModelError, match=r"pytorch_model\.bin may hold a program and is not read"):
        load(tiny_folder, progress=False)


@pytest.mark.parametrize("part", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "a.bin"])
def test_an_index_names_files_of_its_own_folder_alone(tiny_folder: Path, part: str) -> None:
    weights = tiny_folder / "model.safetensors"
    (tiny_folder / "sub").mkdir()
    for copy in (tiny_folder.parent / "model.safetensors", tiny_folder / "sub" / "model.safetensors",
                 tiny_folder / "a.bin"):  # fmt: skip
        shutil.copy(weights, copy)
    weights.unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": part}}
    (tiny_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DamagedWeightsError, match=r"index\.json names|is missing although"):
        load(tiny_folder, progress=False)


@pytest.mark.parametrize(
    ("given", "said"),
    [("", "no model is called"), (" ", "no model is called"), ("x" * 5000, "can't be opened|no model"),
     ("~nobody-of-this-name/x", "no such user"), ("a/b\0c", "no file can be called"), ("a/\ud800", "can be called"),
     ("a b/c", "no folder"), ("ü/ö", "no folder")],
)  # fmt: skip
@pytest.mark.parametrize("door", [load, load_vision, load_vlm])
def test_names_that_nothing_has_are_told_in_one_sentence(door: Callable[..., Any], given: str, said: str) -> None:
    with pytest.raises(UnknownModelError, match=said) as caught:
        door(given, progress=False)
    assert len(str(caught.value)) < 600 and "\0" not in str(caught.value)


@pytest.mark.parametrize("given", ["", Path(), Path("."), "a\0b", "~nobody-of-this-name", "x" * 5000])
def test_a_folder_of_a_trained_part_is_never_the_current_one_by_mistake(given: Any) -> None:
    if str(given) == "." and not isinstance(given, Path):
        return
    with pytest.raises(QuickmergeError, match="prior"):
        local_path("prior", given)


# Weights ------------------------------------------------------------------------------------------------------------


def with_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    told = json.dumps(change(header) or header).encode()
    path.write_bytes(struct.pack("<Q", len(told)) + told + data[8 + length :])


LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "longer": lambda header: header["lm_head.weight"].update(shape=[65, 32]),
    "shorter": lambda header: header["lm_head.weight"].update(shape=[64, 31]),
    "negative": lambda header: header["lm_head.weight"].update(shape=[-64, -32]),
    "huge": lambda header: header["lm_head.weight"].update(shape=[2**62, 2**62]),
    "bool": lambda header: header["lm_head.weight"].update(shape=[True, 2048]),
    "text": lambda header: header["lm_head.weight"].update(shape="64"),
    "wider": lambda header: header["lm_head.weight"].update(dtype="F64"),
    "unknown": lambda header: header["lm_head.weight"].update(dtype="F32x"),
    "no dtype": lambda header: header["lm_head.weight"].update(dtype=["F32"]),
    "overlap": lambda header: header["model.norm.weight"].update(data_offsets=[0, 32 * 4]),
    "behind": lambda header: header["lm_head.weight"].update(data_offsets=[2**40, 2**40 + 64 * 32 * 4]),
    "swapped": lambda header: header["lm_head.weight"].update(data_offsets=[8192, 0]),
    "integers": lambda header: header["lm_head.weight"].update(dtype="I32"),
    "deep": lambda header: {"a": json.loads("[" * 500 + "]" * 500)},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(tiny_folder: Path, lie: str) -> None:
    with_header(tiny_folder / "model.safetensors", LIES[lie])
    with pytest.raises(DamagedWeightsError, match=r"model\.safetensors"):
        load(tiny_folder, progress=False)


def test_a_header_is_read_no_further_than_safetensors_reads_one(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", HEADER_BYTES + 1))
        file.truncate(2 * HEADER_BYTES)
    with pytest.raises(DamagedWeightsError, match="its header has"):
        read_header(path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.int64, torch.float8_e4m3fn])
def test_weights_that_are_no_floating_point_numbers_are_refused(tiny_folder: Path, dtype: torch.dtype) -> None:
    path = tiny_folder / "model.safetensors"
    save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(DamagedWeightsError, match="weights must be one of F64, F32, F16, BF16"):
        load(tiny_folder, progress=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite_are_refused(tiny_folder: Path, value: float, dtype: torch.dtype) -> None:
    path = tiny_folder / "model.safetensors"
    weights = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    weights["model.layers.1.mlp.up_proj.weight"][-1, -1] = value
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(DamagedWeightsError, match=r"layers\.1\.mlp\.up_proj\.weight holds values that are not finite"):
        load(tiny_folder, progress=False)


def test_counters_are_no_weights_and_may_be_integers(tiny_folder: Path) -> None:
    path = tiny_folder / "model.safetensors"
    save_file({**load_file(path), "model.position_ids": torch.arange(4)}, path, {"format": "pt"})
    load(tiny_folder, progress=False)


def test_finite_numbers_are_let_pass_whatever_their_dtype() -> None:
    most = torch.finfo(torch.bfloat16).max
    tensors = {"a": torch.full((3,), most, dtype=torch.bfloat16), "b": torch.zeros(0), "c": torch.arange(3),
               "d": torch.zeros(2, dtype=torch.float8_e4m3fn), "e": torch.empty(2, device="meta")}  # fmt: skip
    check_finite("it", tensors.items())


# Sizes --------------------------------------------------------------------------------------------------------------


SIZES = (
    "num_hidden_layers",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_labels",
    "num_key_value_heads",
    "head_dim",
)


@pytest.mark.parametrize("value", [10**6, 10**9, 10**18, 10**30])
@pytest.mark.parametrize("name", SIZES)
def test_sizes_that_the_weights_do_not_hold_are_refused_before_anything_is_built(
    tiny_folder: Path, name: str, value: int
) -> None:
    path = tiny_folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(QuickmergeError, match=r"config\.json|cannot be|can't be"):
        load(tiny_folder, progress=False)


def test_a_thousand_layers_more_than_there_are_weights_are_refused() -> None:
    held = Held(tensors=20, elements=10_000, largest=64)
    check_integers("it", {"num_hidden_layers": 48, "moe": {"num_experts": 512}, "vocab_size": 10**6}, held)
    check_integers("it", {"rope_theta": 10**9, "limits": [0.0, float("inf")], "block_size": 4096}, held)
    for config in ({"num_hidden_layers": 1025}, {"a": [{"depths": [1, 10**6]}]}, {"n_head": 10**6}, {"x": 10**17}):
        with pytest.raises(UnsupportedModelError, match="asks for"):
            check_integers("it", config, held)


def test_a_build_is_stopped_when_it_makes_more_than_the_weights_are() -> None:
    held = Held(tensors=2, elements=1000, largest=30)

    def many() -> torch.nn.Module:
        return torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(10**9))

    for build in (many, lambda: torch.nn.Linear(10**6, 10**6)):
        with pytest.raises(UnsupportedModelError, match="it asks for"):
            check_build("it", build, held)
    check_build("it", lambda: torch.nn.Linear(30, 33), held)
    with pytest.raises(UnsupportedModelError, match="tables"):
        check_build("it", lambda: with_table(10**10), held)


def with_table(size: int) -> torch.nn.Module:
    module = torch.nn.Module()
    module.register_buffer("table", torch.zeros(size))
    return module
