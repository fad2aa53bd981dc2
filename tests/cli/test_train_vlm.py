"""``quickmerge train vlm`` with a tiny vision transformer and a tiny language model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
import vlm_samples
from safetensors.torch import load_file


@pytest.fixture
def base(tiny: Path, tmp_path: Path) -> list[str]:
    """The command with a vision transformer, a language model and images."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=40, **sizes)).save_pretrained(tmp_path / "language")
    vlm_samples.tokenizer().save_pretrained(tmp_path / "language")
    for name in ("one", "two"):
        vlm_samples.annotated(tmp_path / name, 3)
    return ["train", "vlm", "--model", str(tmp_path / "language"), "--vision", str(tiny), "--layers", "2,4", "--data",
            f"{tmp_path / 'one'},{tmp_path / 'two'}", "--batch", "2", "--save-every", "2"]  # fmt: skip


def test_it_trains_measures_and_goes_on(run, base: list[str], tmp_path: Path) -> None:
    from quickmerge.models import load_vlm

    whole = ["--steps", 4, "--precision", "bf16", "--questions", 1]
    code, told, err = run(*base, *whole, "--out", tmp_path / "whole", "--test", tmp_path / "one")
    assert code == 0, err
    assert "6 images with 12 questions" in err and f"wrote {tmp_path / 'whole'}" in told
    assert "answered with exact match on 3 images: " in told and "colour " in told and "where " in told
    model, processor = load_vlm(tmp_path / "whole", progress=False)
    assert model.config.vision_feature_layer == [2, 4] and processor.patch_size == 8
    code, told, _ = run(*base, *whole, "--out", tmp_path / "parts", "--max-minutes", "1e-6")
    assert code == 0 and "stopped after step 1; go on with --resume" in told
    assert run(*base, *whole, "--out", tmp_path / "parts", "--resume")[0] == 0
    one, two = (load_file(tmp_path / which / "model.safetensors") for which in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    code, _, err = run(*base, *whole, "--out", tmp_path / "parts", "--resume", "--language-rate", "0.5")
    assert code == 2 and "language_rate was 0.3" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "2,x"], "--layers must be whole numbers with commas (4,8,11), got '2,x'"),
        (["--layers", "2,9"], "layers must be different whole numbers from 0 to 4, got"),
        (["--data", "a,,b"], "--data must be a folder, or several with commas between them, got 'a,,b'"),
        (["--data", "NONE"], "there is no file"),
        (["--test", "NONE"], "there is no file"),
        (["--questions", "0"], "questions must be a whole number of at least 1, got 0"),
        (["--warmup-language", "2"], "warmup_language must be a number in [0, 1], got 2.0"),
        (["--language-rate", "-1"], "language_rate must be a number in [0, 1], got -1.0"),
        (["--steps", "0"], "steps must be a whole number of at least 1, got 0"),
        (["--resume"], "nothing to resume"),
        (["--align", "2"], "images must have objects (texts with boxes) to align the projector by"),
        (["--model", "VISION"], "is not a causal language model"),
        (["--vision", "LANGUAGE"], "is not a vision model"),
    ],
)
def test_bad_input_is_told_in_one_sentence(
    run, base: list[str], tiny: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    places = {"NONE": tmp_path / "none", "VISION": tiny, "LANGUAGE": tmp_path / "language"}
    given = [str(places.get(option, option)) for option in options]
    code, _, err = run(*base, "--out", tmp_path / "o", "--steps", 1, *given)
    assert code == 2 and message in " ".join(err.split()), err
    assert "Traceback" not in err and not (tmp_path / "o" / "model.safetensors").exists()
