"""Each capability once, on tiny random models; what they compute is held elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import calm_samples
import pytest
import scene_samples
import torch
import vision_samples
import vlm_samples
from caches import held, past
from decoding_samples import greedy, prompts, tiny
from hosts_zoo import BOS, EOS, ZOO, build, generate, pad, stored, tokens
from PIL import Image

import quickmerge as qm
from quickmerge.models.compat import causal_lm_names, changes
from quickmerge.models.decoder import FAMILIES
from quickmerge.models.families import rows
from quickmerge.training import TrainingConfig

LONG, SHORT = 60, 41


def test_nothing_that_quickmerge_leans_on_has_changed() -> None:
    assert changes(FAMILIES) == []


def test_every_family_of_language_models_has_a_row() -> None:
    """A new release adds families: `tests/merge/test_families.py` says how they get their rows."""
    assert sorted(set(causal_lm_names()) - set(rows())) == []


@pytest.mark.parametrize("family", sorted(ZOO))
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_prefix(family: str, attn: str) -> None:
    model = build(family, attn)
    ids, mask, position = pad([tokens(1, LONG, 1)[0], tokens(1, SHORT, 2)[0]], "left")
    inputs = {"attention_mask": mask, "position_ids": position}
    with torch.no_grad():
        plain = model(ids, **inputs).logits
        with qm.reduce(model, qm.QuickMerge(keep=1.0), layer=2, recent=4, min_tokens=0):
            assert torch.equal(model(ids, **inputs).logits, plain)
        with qm.reduce(model, qm.QuickMerge(keep=0.5), layer=2, recent=4, min_tokens=0) as run:
            out = model(ids, **inputs)
            assert stored(held(out))[-1] < LONG == stored(held(out))[0]
            written = generate(model, ids, attention_mask=mask)
            assert written.sequences.shape == (2, LONG + 4)
            step = model(tokens(2, 1), **past(held(out)), attention_mask=torch.cat([mask, mask[:, -1:]], 1))
            assert step.logits.shape[1] == 1 and run.summary().decode_steps > 0
        assert torch.equal(model(ids, **inputs).logits, plain)


@pytest.mark.parametrize("more", [{"num_beams": 2}, {"do_sample": True}], ids=["beams", "sampling"])
def test_prefix_in_the_ways_of_generate(more: dict[str, Any]) -> None:
    model = build("llama")
    with torch.no_grad(), qm.reduce(model, qm.ToMe(keep=0.5), layer=2, recent=4, min_tokens=0) as run:
        assert generate(model, tokens(2, LONG), **more).sequences.shape == (2, LONG + 4)
    assert run.summary().tokens_per_layer[-1] < LONG


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_block_causal(family: str) -> None:
    model = build(family)
    ids = tokens(2, LONG)
    with torch.no_grad(), qm.reduce(
        model, qm.QuickMerge(keep=0.5), layer=1, mode="block_causal", chunk=16, window=8
    ) as run:  # fmt: skip
        out = generate(model, ids)
    layers = held(out).layers
    assert min(layer.keys.shape[2] for layer in layers) < LONG and run.summary().tokens_per_layer[-1] < LONG


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3"])
def test_multipole(family: str) -> None:
    model = build(family)
    ids = tokens(2, LONG)
    with torch.no_grad():
        plain = generate(model, ids)
        with qm.multipole(model, budget=1000, sink=2, interval=4):
            exact = generate(model, ids)
        with qm.multipole(model, budget=8, sink=2, interval=4, ratio=0.25) as run:
            generate(model, ids)
    # With room for every key it is the model's own attention.
    assert torch.equal(exact.sequences, plain.sequences)
    assert run.summary().decode_steps > 0


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_speculation_writes_what_the_model_writes(family: str) -> None:
    model, inputs = tiny(family), prompts([9, 6])
    wanted = greedy(model, inputs, 12)
    decoding = qm.SpeculativeDecoding(qm.PromptLookup(), tree=6)
    assert torch.equal(greedy(model, inputs, 12, custom_generate=decoding), wanted)
    assert decoding.stats.tokens > 0


@pytest.mark.parametrize("family", ["vit", "dinov2", "clip", "siglip-pooled"])
def test_vision(family: str) -> None:
    model, _ = vision_samples.make(family)
    images = vision_samples.pictures(family)
    with torch.no_grad():
        plain = vision_samples.answer(model(images))
        with qm.reduce(model, qm.ToMe(), qm.Removal(0)):
            assert torch.allclose(vision_samples.answer(model(images)), plain, atol=1e-5)
        with qm.reduce(model, qm.ToMe(), qm.Removal(2)) as run:
            assert vision_samples.answer(model(images)).shape == plain.shape
        blocks = run.summary().tokens_per_block
        assert blocks[-1] < blocks[0]


def test_a_vision_language_model(tmp_path: Path) -> None:
    model, processor = qm.load_vlm(vlm_samples.save(tmp_path))
    inputs = processor(
        images=Image.new("RGB", (40, 40), "teal"), text="user : <image> what is it ?", return_tensors="pt"
    )
    with torch.no_grad(), qm.reduce(model, qm.SCOPE(keep=qm.Count(4))) as run:
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    assert run.summary().visual_in == vlm_samples.TOKENS and run.summary().cache_bytes > 0


def test_a_recogniser() -> None:
    recognizer = scene_samples.small_recognizer()
    assert len(recognizer.recognize(recognizer.prepare(torch.rand(2, 3, 40, 48)), top=2)) == 2


def test_calm_reads_learns_and_writes(tmp_path: Path) -> None:
    model = calm_samples.small_calm()
    ids = calm_samples.some_ids(2, 4 * model.config.patch)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.backbone.parameters())
    with torch.no_grad():
        first, cache = model.hidden(ids[:, : 2 * model.config.patch], use_cache=True)
        rest = model(ids[:, 2 * model.config.patch :], torch.ones_like(ids), **past(cache)).last_hidden_state
        torch.testing.assert_close(torch.cat([first, rest], 1), model.hidden(ids)[0], atol=1e-5, rtol=1e-4)
        out = model(ids, use_cache=True)
        assert out.cache is out.past_key_values is out["cache"] and out.cache.get_seq_length() == 4
        written = model.generate(ids, max_new_tokens=6, seed=0)
    assert written.shape[1] > ids.shape[1]
    model.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again.generate(ids, max_new_tokens=6, seed=0), written)


def test_a_step_of_training(tmp_path: Path) -> None:
    from quickmerge.merge.train.dynamicvit import train_dynamicvit

    class Pictures:
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(index)), index % 3

        def fingerprint(self) -> str:
            return "drawn"

    model, _ = vision_samples.make("vit")
    told = TrainingConfig(steps=2, batch=4, learning_rate=1e-3, log_every=1, save_every=2)
    train_dynamicvit(model, None, Pictures(), told, tmp_path / "run", name="tiny", keep=0.6, layers=(1, 3))
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_loading_a_folder(tiny_folder: Path) -> None:
    model, tokenizer = qm.load(tiny_folder)
    ids = tokenizer("the sea the sea " * 12, return_tensors="pt").input_ids
    with torch.no_grad(), qm.reduce(model, qm.QuickMerge(keep=0.5), layer=1, recent=4, min_tokens=0) as run:
        assert model.generate(ids, max_new_tokens=3, min_new_tokens=3).shape[1] == ids.shape[1] + 3
    assert run.summary().tokens_per_layer[-1] < ids.shape[1]


def test_the_zoo_covers_what_is_promised() -> None:
    assert set(ZOO) == set(FAMILIES) and BOS != EOS
