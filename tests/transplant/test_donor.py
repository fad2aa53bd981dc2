from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from transplant_samples import SIZE, model_folder, tensors

from quickmerge.errors import QuickmergeError, UnknownModelError
from quickmerge.transplant.donor import read_donor


def test_a_model_lends_its_matrices(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "untied", "neox", dtype=torch.bfloat16)
    donor = read_donor(folder)
    assert torch.equal(donor.input, tensors(folder)["gpt_neox.embed_in.weight"].float())
    assert torch.equal(donor.output, tensors(folder)["embed_out.weight"].float()) and donor.rows == 420
    tied = read_donor(model_folder(tmp_path / "tied", "gpt2"))
    assert tied.output is tied.input and tied.kind == "model, input matrix for both"
    hf.BertModel(hf.BertConfig(vocab_size=50, max_position_embeddings=32, **SIZE)).save_pretrained(tmp_path / "bert")
    encoder = read_donor(tmp_path / "bert")
    assert encoder.rows == 50 and encoder.output is encoder.input


def test_a_file_of_vectors_will_do(tmp_path: Path) -> None:
    rows = torch.randn(7, 3, dtype=torch.float16)
    file = tmp_path / "vectors.safetensors"
    save_file({"rows": rows, "names": torch.zeros(7)}, file)
    for given in (file, tmp_path, str(tmp_path)):
        donor = read_donor(given)
        assert torch.equal(donor.input, rows.float()) and donor.output is donor.input and donor.kind == "vectors"
    save_file({"rows": rows.double()}, file)
    assert read_donor(file).input.dtype == torch.float64


def test_what_is_no_donor_is_told(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match="no model is called 'nowhere'"):
        read_donor("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(QuickmergeError, match=r"donor must be a model, or a \.safetensors file .* with 0 such files"):
        read_donor(tmp_path / "empty")
    file = tmp_path / "v.safetensors"
    save_file({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, file)
    with pytest.raises(QuickmergeError, match="must hold one matrix of vectors, got 2"):
        read_donor(file)
    save_file({"a": torch.tensor([[1.0, 2.0], [float("nan"), 1.0]])}, file)
    with pytest.raises(QuickmergeError, match="finite numbers, got others in row 1"):
        read_donor(file)
    save_file({"a": torch.zeros(2, 2, dtype=torch.int8)}, file)
    with pytest.raises(QuickmergeError, match="got I8"):
        read_donor(file)
