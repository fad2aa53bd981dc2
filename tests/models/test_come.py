"""Models as people bring them: adapted, quantised, offloaded, compiled, in half precision, with caches of other kinds.

Each works in every capability, or is refused by a sentence that names the trait; nothing is silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import past
from hosts_zoo import build, generate, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import quickmerge as qm
from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.models.identity import model_hash
from quickmerge.models.vlm import unwrapped
from quickmerge.speculative.proof import check_target

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",  # PEFT asks models for what transformers deprecates
    "ignore:.*torch.ao.quantization is deprecated.*:DeprecationWarning",
    "ignore:.*torch.quantize_per.*:UserWarning",
    "ignore:.*prepare_inputs_for_generation.*:UserWarning",
)
TARGETS = ["q_proj", "v_proj", "down_proj"]
PREFIX: dict[str, Any] = {"layer": [2, 3], "sinks": 1, "recent": 3, "min_tokens": 0}


def quick(keep: float) -> qm.QuickMerge:
    return qm.QuickMerge(keep=keep, window=8, spans="none")


RUNS: dict[str, Callable[[Any], Any]] = {
    "prefix": lambda model: qm.reduce(model, quick(0.5), **PREFIX),
    "block_causal": lambda model: qm.reduce(model, quick(0.5), mode="block_causal", chunk=16, window=8),
    "cache": lambda model: qm.reduce(model, qm.SnapKV(keep=0.5, min_tokens=0)),
    "reread": lambda model: qm.reduce(model, qm.GemFilter(keep=0.5), min_tokens=0),
    "multipole": lambda model: qm.multipole(model, budget=8, sink=2, interval=4, block=16),
}


# How they come -------------------------------------------------------------------------------------------------------


def lora(*names: str, **more: Any) -> Any:
    """A model with adapters of random weights, of which the last is active."""
    peft = pytest.importorskip("peft")
    model = build("llama")
    names = names or ("default",)
    for i, name in enumerate(names):
        torch.manual_seed(1 + i)
        config = peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights=False, **more
        )
        if i:
            model.add_adapter(name, config)
        else:
            model = peft.get_peft_model(model, config, adapter_name=name)
    model.set_adapter(names[-1])
    return model.eval()


def integrated() -> Any:
    """The same adapter inside of the model itself, as transformers' ``add_adapter`` puts it there."""
    peft = pytest.importorskip("peft")
    model = build("llama")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False)
    try:
        model.add_adapter(config)
    except ValueError:  # transformers wants a newer PEFT than there is; this is what it would call
        peft.inject_adapter_in_model(config, model)
    return model.eval()


def int8() -> Any:
    from torch.ao.quantization import quantize_dynamic

    return quantize_dynamic(build("llama"), {nn.Linear}, dtype=torch.qint8)


def weights_only() -> Any:
    ao = pytest.importorskip("torchao.quantization")
    model = build("llama")
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    return model


def offloaded(tmp: Path, whole: bool = False) -> Any:
    """A model whose upper blocks, or all of whose weights, lie on the disk between forwards."""
    if whole:
        from accelerate import disk_offload

        return disk_offload(build("llama"), str(tmp / "weights"), execution_device=torch.device("cpu"))
    build("llama").save_pretrained(tmp / "model")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk", "lm_head": "disk"}
    places |= {f"model.layers.{i}": "disk" if i > 1 else "cpu" for i in range(4)}
    model = AutoModelForCausalLM.from_pretrained(tmp / "model", device_map=places, offload_folder=str(tmp / "weights"))
    assert any(p.is_meta for p in model.parameters())
    return model.eval()


def compiled(what: str) -> Any:
    model = build("llama")
    if what == "wrapped":
        return torch.compile(model, backend="eager")
    for block in model.model.layers:
        block.compile(backend="eager")
    return model


def gguf(tmp: Path) -> Any:
    """A model out of a GGUF file of eight bits, which transformers reads into floating point weights."""
    import gguf as writing

    model = build("llama", intermediate_size=64)
    config, file = model.config, writing.GGUFWriter(tmp / "model.gguf", "llama")
    file.add_vocab_size(config.vocab_size)
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_rope_dimension_count(config.head_dim)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    names = writing.get_tensor_name_map(writing.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    eight = writing.GGMLQuantizationType.Q8_0
    for name, values in model.state_dict().items():
        numbers, kind = values.numpy(), None
        if values.ndim == 2:
            numbers, kind = writing.quants.quantize(numbers, eight), eight
        file.add_tensor(names.get_name(name, try_suffixes=(".weight",)), numbers, raw_dtype=kind)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return AutoModelForCausalLM.from_pretrained(tmp, gguf_file="model.gguf").eval()


WAYS: dict[str, Callable[[Path], Any]] = {
    "bfloat16": lambda tmp: build("llama").bfloat16(),
    "float16": lambda tmp: build("llama").half(),
    "lora": lambda tmp: lora(),
    "several adapters": lambda tmp: lora("one", "two"),
    "merged adapter": lambda tmp: lora().merge_and_unload(),
    "integrated adapter": lambda tmp: integrated(),
    "dynamic int8": lambda tmp: int8(),
    "int8 weights": lambda tmp: weights_only(),
    "gguf": gguf,
    "partly on disk": offloaded,
    "wholly on disk": lambda tmp: offloaded(tmp, whole=True),
    "compiled": lambda tmp: compiled("wrapped"),
    "compiled blocks": lambda tmp: compiled("blocks"),
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Any]]:
    yield request.param, WAYS[request.param](tmp_path)
    torch.compiler.reset()


def padded() -> dict[str, Tensor]:
    """A batch of a long and a short row, padded on the left."""
    ids = tokens(2, 48)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def write(model: Any, **more: Any) -> Tensor:
    """Greedy tokens of a padded batch that repeats itself, by what the user holds."""
    given = padded()
    out: Tensor = model.generate(
        input_ids=given["input_ids"].repeat(1, 2),
        attention_mask=torch.cat([given["attention_mask"], torch.ones_like(given["attention_mask"])], 1),
        max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, **more,
    )  # fmt: skip
    return out


# What must hold for all of them --------------------------------------------------------------------------------------


@torch.no_grad()
def test_keep_one_is_the_model_and_leaving_restores_it(way: tuple[str, Any]) -> None:
    _, model = way
    plain = model(**padded()).logits
    with qm.reduce(model, quick(1.0), **PREFIX):
        assert torch.equal(model(**padded()).logits, plain)
    for run in RUNS.values():
        with run(model):
            model(input_ids=tokens(2, 64))
    assert torch.equal(model(**padded()).logits, plain)


@torch.no_grad()
def test_every_capability_reads_fewer_tokens_and_generates(way: tuple[str, Any]) -> None:
    _, model = way
    long = tokens(2, 64)
    for name, made in RUNS.items():
        with made(model) as run:
            out = model.generate(input_ids=long, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
            told = run.summary()
        assert out.shape == (2, 67)
        if name in ("prefix", "reread", "block_causal"):
            assert told.tokens_per_layer[-1] < 64, name
        if name == "cache":
            assert told.prompt_cache_bytes == told.prompt_cache_bytes_full / 2
        if name == "multipole":
            assert told.decode_steps == 2, name


SAME = {"partly on disk": 0.0, "wholly on disk": 0.0, "compiled": 1e-5,
        "compiled blocks": 1e-5}  # fmt: skip
"""Ways in which the model is the very same, and how far its logits may be off."""


@torch.no_grad()
def test_it_does_what_the_plain_model_does_inside(way: tuple[str, Any]) -> None:
    name, model = way
    if name in SAME:
        plain, off = build("llama"), SAME[name]
    elif name == "gguf":
        plain, off = build("llama", intermediate_size=64), 0.0
        assert not torch.equal(plain.lm_head.weight, model.lm_head.weight)
        plain.load_state_dict(model.state_dict())
        assert model_hash(plain) == model_hash(model)
    elif name in ("lora", "integrated adapter"):
        plain, off = lora().merge_and_unload(), 1e-3
    else:
        pytest.skip("no other form of the same weights")
    for made in RUNS.values():
        with made(plain):
            wanted = generate(plain, tokens(2, 64), 3)
        with made(model):
            found = generate(unwrapped(model), tokens(2, 64), 3)
        assert torch.equal(found.sequences, wanted.sequences)
        for a, b in zip(found.logits, wanted.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=off)


@torch.no_grad()
def test_speculation_writes_what_the_model_writes(way: tuple[str, Any]) -> None:
    name, model = way
    told = qm.SpeculativeDecoding(qm.PromptLookup(), tree=4)
    if name == "dynamic int8":
        with pytest.raises(UnsupportedModelError, match=r"one range for the activations of all tokens.*read in a call"):
            write(model, custom_generate=told)
        return
    assert torch.equal(write(model, custom_generate=told), write(model))
    assert told.stats.rows == 2
    with qm.reduce(model, quick(0.5), **PREFIX):
        assert torch.equal(write(model, custom_generate=told), write(model))
    with qm.apply(model, qm.Recipe(decoding=qm.Speculation(qm.PromptLookup(), tree=4))) as run:
        written = write(model)
    assert torch.equal(written, write(model)) and run.summary()["decoding"].tokens == 12


# Adapters ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_active_adapter_is_the_one_that_is_read_with() -> None:
    model = lora("one", "two")
    ids = tokens(1, 48)
    with RUNS["prefix"](model):
        by_two = model(input_ids=ids).logits
        model.set_adapter("one")
        by_one = model(input_ids=ids).logits
        with model.disable_adapter():
            bare = model(input_ids=ids).logits
    other = build("llama")
    with RUNS["prefix"](other):
        assert torch.equal(other(input_ids=ids).logits, bare)
    assert not torch.allclose(by_one, by_two, atol=1e-2) and not torch.allclose(by_one, bare, atol=1e-2)


@torch.no_grad()
def test_rows_with_adapters_of_their_own_are_what_each_is_alone() -> None:
    model = lora("one", "two")
    ids = tokens(2, 48)
    with RUNS["prefix"](model):
        both = model(input_ids=ids, adapter_names=["one", "two"]).logits
        for i, name in enumerate(["one", "two"]):
            model.set_adapter(name)
            torch.testing.assert_close(model(input_ids=ids[i : i + 1]).logits[0], both[i], rtol=0, atol=2e-4)
    with pytest.raises(UnsupportedModelError, match="adapter_names must be left out for speculative decoding"):
        write(model, adapter_names=["one", "two"], custom_generate=qm.SpeculativeDecoding(qm.PromptLookup(), tree=4))


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "aLoRA"])
@torch.no_grad()
def test_adapters_that_act_on_places_are_refused(kind: str) -> None:
    peft = pytest.importorskip("peft")
    if kind == "aLoRA":
        model, why = lora(alora_invocation_tokens=[5, 6]), "counts from the end of the text"
    else:
        config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model, why = peft.get_peft_model(build("llama"), config), "puts virtual tokens in front of every prompt"
    for run in RUNS.values():
        with pytest.raises(UnsupportedModelError, match=rf"has the active adapter 'default' \(.*{why}"):
            run(model)
    with pytest.raises(UnsupportedModelError, match=why):
        model.generate(
            input_ids=tokens(1, 24), max_new_tokens=2,
            custom_generate=qm.SpeculativeDecoding(qm.PromptLookup(), tree=4),
        )  # fmt: skip
    if kind != "aLoRA":  # the model inside is as it was
        check_target(model.base_model)


# Trained parts -------------------------------------------------------------------------------------------------------


def test_trained_parts_know_an_adapted_model_for_another_one() -> None:
    plain, adapted = build("llama"), lora()
    assert model_hash(unwrapped(adapted)) != model_hash(plain)
    assert model_hash(lora().merge_and_unload()) != model_hash(plain)
    assert model_hash(unwrapped(lora("one", "two"))) != model_hash(unwrapped(lora("one")))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("dynamic int8", r"got model\.layers\.0\.self_attn\.q_proj as Linear.*without quantisation"),
        ("int8 weights", r"got model\.layers\.0\.self_attn\.q_proj\.weight as .*Tensor.*without quantisation"),
    ],
)
def test_weights_that_cannot_be_told_from_others_are_refused(name: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(QuickmergeError, match=f"model must hold its weights .*{why}"):
        model_hash(WAYS[name](tmp_path))


@pytest.mark.parametrize("name", ["partly on disk", "wholly on disk"])
def test_weights_on_a_disk_are_known_for_what_they_are(name: str, tmp_path: Path) -> None:
    model = WAYS[name](tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert model_hash(model) == model_hash(build("llama"))
    assert any(parameter.is_meta for parameter in model.parameters())
    with torch.device("meta"):
        bare = type(model)(model.config)
    with pytest.raises(QuickmergeError, match="on the meta device"):
        model_hash(bare)


def test_weights_in_integer_buffers_are_not_looked_over() -> None:
    model: Any = build("llama")
    model.model.layers[1].mlp.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))
    with pytest.raises(QuickmergeError, match=r"got model\.layers\.1\.mlp as LlamaMLP"):
        model_hash(model)


# Compiled inside of a run, and left ----------------------------------------------------------------------------------


@torch.no_grad()
def test_compiled_inside_of_a_run_it_is_merged_there_and_plain_outside() -> None:
    model, ids = build("llama"), tokens(2, 64)
    plain = model(ids).logits
    with RUNS["prefix"](model) as run:
        wanted = model(ids).logits
        inside = torch.compile(model, backend="eager")
        assert torch.equal(inside(ids).logits, wanted) and run.summary().tokens_per_layer[-1] < 64
    torch.testing.assert_close(inside(ids).logits, plain, rtol=0, atol=1e-5)
    torch.compiler.reset()


# Caches --------------------------------------------------------------------------------------------------------------

CACHES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "offloaded": (lambda model: DynamicCache(offloading=True), "whose entries leave the device between blocks"),
    "static": (
        lambda model: StaticCache(config=model.config, max_cache_len=200), "whose size is fixed before a prompt is read"
    ),
}  # fmt: skip


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("run", [*RUNS, "speculation"])
@torch.no_grad()
def test_a_cache_of_another_kind_is_refused_by_its_trait(run: str, cache: str) -> None:
    model, (make, why) = build("llama"), CACHES[cache]
    sentence = rf"must be a DynamicCache.*{why}"
    if run == "speculation":
        with pytest.raises(QuickmergeError, match=sentence):
            write(model, custom_generate=qm.SpeculativeDecoding(qm.PromptLookup(), tree=4), **past(make(model)))
        return
    with RUNS[run](model), pytest.raises(QuickmergeError, match=sentence):
        model.generate(tokens(2, 64), max_new_tokens=2, pad_token_id=0, **past(make(model)))
    assert model(tokens(2, 64)).logits.isfinite().all()
