from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from hosts_zoo import assert_detached, build, generate, tokens
from torch import nn

import quickmerge as qm
from quickmerge.errors import UnsupportedModelError

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def swin() -> Any:
    return hf.SwinModel(hf.SwinConfig(embed_dim=8, depths=[1], num_heads=[2], image_size=16, patch_size=4))


def resnet() -> Any:
    return hf.ResNetForImageClassification(hf.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1]))


def whisper() -> Any:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    more = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(d_model=16, **sizes, **more))


def t5() -> Any:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )


def bert() -> Any:
    return hf.BertForMaskedLM(hf.BertConfig(vocab_size=20, **SMALL))


def llama_base() -> Any:
    return build("llama").model


KINDS: dict[str, tuple[Any, str, str]] = {
    "swin": (
        swin,
        "SwinModel .*is a vision model, which is not supported",
        "vision transformers of beit",
    ),
    "resnet": (resnet, "ResNetForImageClassification .*is a vision model", "vision transformers of beit"),
    "whisper": (whisper, "WhisperForConditionalGeneration .*is an audio model", "decoder-only language models "),
    "t5": (t5, "T5ForConditionalGeneration .*is an encoder-decoder model", "decoder-only language models "),
    "bert": (bert, "BertForMaskedLM reads text in both directions, as encoders do", "a decoder"),
    "base": (llama_base, "LlamaModel has no language-model head", "base decoder"),
    "linear": (lambda: nn.Linear(2, 2), "model must be a transformers PreTrainedModel, got Linear", "neither"),
    "name": (lambda: "smollm2-135m", "model must be a transformers PreTrainedModel, .* got 'smollm2-135m'", ""),
    "none": (lambda: None, "model must be a transformers PreTrainedModel, .* got None", ""),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "reducer", [qm.QuickMerge(), qm.ToMe(), qm.QuickMergeVision(), qm.SCOPE()], ids=lambda r: str(r.name)
)
def test_whatever_cannot_be_reduced_is_told_what_it_is(name: str, reducer: Any) -> None:
    make, what, would = KINDS[name]
    model = make()
    for more in ({}, {"unmerge": True} if "vision" in what else {}):
        with pytest.raises(UnsupportedModelError, match=what) as told:
            qm.reduce(model, reducer, **more)
        assert would in str(told.value)


@pytest.mark.parametrize("name", KINDS)
def test_multipole_tells_it_too(name: str) -> None:
    make, what, _ = KINDS[name]
    with pytest.raises(UnsupportedModelError, match=what):
        qm.multipole(make())


def test_multipole_wants_a_language_model() -> None:
    vit = hf.ViTModel(hf.ViTConfig(image_size=16, patch_size=4, **SMALL))
    with pytest.raises(UnsupportedModelError, match=r"ViTModel .*is a vision model, .*: decoder-only language models "):
        qm.multipole(vit)


def test_a_model_is_not_loaded_again() -> None:
    with pytest.raises(UnsupportedModelError, match=r"must be a name, .* got LlamaForCausalLM: a model that"):
        qm.load(build("llama"))


# What wraps a model ------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """Built as a PEFT model is: another module in between, and the way to the model inside."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model = nn.ModuleDict({"model": model})

    def get_base_model(self) -> Any:
        return self.base_model["model"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_base_model()(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_base_model().generate(*args, **kwargs)


WRAPS: dict[str, Any] = {
    "adapted": Adapted,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "both": lambda model: torch.compile(Adapted(model), backend="eager"),
}
RUNS: dict[str, Any] = {
    "prefix": lambda model: qm.reduce(model, qm.Uniform(keep=0.5), layer=2, min_tokens=0),
    "block_causal": lambda model: qm.reduce(model, qm.QuickMerge(keep=0.5), mode="block_causal", chunk=8, window=4),
    "multipole": lambda model: qm.multipole(model, budget=8, sink=2, interval=4, block=16),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("wrap", WRAPS)
def test_what_wraps_a_model_is_taken_for_it(wrap: str, run: str) -> None:
    model, ids = build("llama"), tokens(1, 80)
    wrapped = WRAPS[wrap](model)
    with torch.no_grad():
        plain = generate(model, ids, 2)
        with RUNS[run](model):
            wanted = generate(model, ids, 2)
        assert not torch.equal(wanted.logits[-1], plain.logits[-1])
        with RUNS[run](wrapped):
            found = generate(model if wrap == "parallel" else wrapped, ids, 2)
            read = wrapped(ids).logits
            assert torch.equal(read, model(ids).logits)
            with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM is already inside a quickmerge run"):
                RUNS[run](wrapped).attach()
            assert qm.detach(wrapped) == 1
        assert_detached(model, "sdpa")
    assert torch.equal(found.sequences, wanted.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, wanted.logits, strict=True))


def test_a_model_on_several_devices_at_once_is_refused() -> None:
    wrapped = nn.DataParallel(build("llama"))
    wrapped.device_ids = [0, 1]
    with pytest.raises(UnsupportedModelError, match="got a DataParallel over 2 of them"):
        qm.reduce(wrapped, qm.Uniform())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks models for what transformers deprecates
def test_a_model_of_peft() -> None:
    peft = pytest.importorskip("peft")
    model, ids = build("llama"), tokens(1, 80)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    )
    with torch.no_grad():
        plain = adapted(ids).logits[:, -1]
        with adapted.disable_adapter():
            assert not torch.allclose(plain, adapted(ids).logits[:, -1])
        with qm.reduce(adapted, qm.Uniform(keep=0.5), layer=2, min_tokens=0) as run:
            reduced = adapted(ids).logits[:, -1]
            assert run.summary().tokens_per_layer[-1] == 40
            out = adapted.generate(ids, max_new_tokens=2, do_sample=False)
        with qm.reduce(model, qm.Uniform(keep=0.5), layer=2, min_tokens=0):
            assert torch.equal(model(ids).logits[:, -1], reduced)
        assert out.shape == (1, 82) and not torch.allclose(reduced, plain)
        with qm.multipole(adapted, budget=8):
            assert generate(adapted, ids, 2).sequences.shape == (1, 82)
        assert torch.equal(adapted(ids).logits[:, -1], plain)
