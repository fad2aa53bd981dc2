"""The recognizer as a whole: what it looks at, what its prefix is, what it says."""

from __future__ import annotations

from typing import Any

import hosts_zoo
import pytest
import torch
import torch.nn.functional as F
import vision_zoo
from recognition_samples import PROMPT, build, prefixes, ragged, seen, words
from transformers import AutoModelForImageClassification, CLIPConfig, CLIPModel

import quickmerge as qm
from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.recognition import Recognizer, closed_set, one_shot

EYES = ("beit", "clip", "dinov2", "dinov2-registers", "dinov3", "siglip", "vit")


def pixels(rows: int = 2, size: int = vision_zoo.IMAGE, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("eye", EYES)
def test_patches_are_seen_and_what_stands_in_front_of_them_is_not(eye: str) -> None:
    recognizer = build(vision=eye)
    model = vision_zoo.build(eye, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(pixel_values=pixels()).last_hidden_state[:, vision_zoo.VISION_ZOO[eye][3] :]
    features = recognizer.features(pixels())
    assert features.shape == (2, 36, 32)
    assert torch.allclose(features, F.layer_norm(wanted, (32,)))
    assert torch.allclose(features.mean(-1), torch.zeros(2, 36, dtype=torch.float64), atol=1e-9)


def test_layers_are_put_side_by_side() -> None:
    recognizer = build(layers=(-1, 1))
    model = vision_zoo.build("vit", dtype=torch.float64)
    with torch.no_grad():
        hidden = model(pixel_values=pixels(), output_hidden_states=True).hidden_states
    features = recognizer.features(pixels())
    assert recognizer.config.layers == (4, 1) and features.shape == (2, 36, 64)
    assert torch.allclose(features[..., :32], F.layer_norm(hidden[4], (32,))[:, 1:])
    assert torch.allclose(features[..., 32:], F.layer_norm(hidden[1], (32,))[:, 1:])
    assert recognizer.prefix(features).embeds.shape[-1] == 32


def test_the_encoder_inside_a_classifier_or_a_tower_is_taken() -> None:
    torch.manual_seed(0)
    config = vision_zoo.build("vit").config
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    clip = CLIPModel(CLIPConfig(vision_config={**sizes, "image_size": 48, "patch_size": 8}, text_config=sizes))
    for model in (AutoModelForImageClassification.from_config(config), clip):
        made = Recognizer.new(model, small(), words(), blocks=2, prompt=PROMPT, image_size=48)
        assert made.features(pixels()).shape == (2, 36, 32)
        # a copy, and frozen; the model itself is as it was
        assert all(p.requires_grad for p in model.parameters())
        assert not any(p.requires_grad for p in made.vision.parameters())
        assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in made.parameters()}


def small(**more: Any) -> Any:
    return hosts_zoo.build("llama", vocab_size=len(words()), **more)


def test_the_prefix_is_image_boundary_bos_prompt() -> None:
    recognizer = build()
    features, valid = seen(recognizer, 2, 5), ragged(2, 5, 1)
    prefix = recognizer.prefix(features, valid)
    embed = recognizer.language.get_input_embeddings()
    said = embed(torch.tensor([recognizer.labels.tokenizer.bos_token_id, *recognizer.labels.prompt_ids]))
    assert prefix.embeds.shape == (2, 5 + 1 + 1 + 3, 32)
    for row in range(2):
        wanted = torch.cat([features[row] @ recognizer.projector.weight.T, recognizer.boundary[None], said])
        assert torch.allclose(prefix.embeds[row], wanted)
    assert torch.equal(prefix.valid[:, :5], valid) and bool(prefix.valid[:, 5:].all())
    assert torch.equal(prefix.image[:, :5], valid) and not bool(prefix.image[:, 5:].any())
    assert prefix.length.tolist() == (valid.sum(-1) + 5).tolist()


def test_what_is_new_begins_at_the_scale_of_the_tokens() -> None:
    language = small(initializer_range=0.05)
    made = Recognizer.new(vision_zoo.build("vit"), language, words(), blocks=2, prompt=PROMPT, image_size=48)
    scale = float(language.get_input_embeddings().weight.detach().square().mean().sqrt())
    with torch.no_grad():
        prefix = made.prefix(made.features(pixels()))
        assert float(prefix.embeds[:, :36].square().mean().sqrt()) == pytest.approx(scale, rel=0.3)
        assert float(made.boundary.square().mean().sqrt()) == pytest.approx(scale, rel=0.5)


@pytest.mark.parametrize("reducer", [qm.ToMe(keep=0.5), qm.Random(keep=0.5), qm.Uniform(keep=0.4)])
def test_fewer_tokens_are_read_with_a_reducer(reducer: Any) -> None:
    recognizer = build(dtype=torch.float32)
    images = pixels().float()
    torch.manual_seed(1)
    features, valid = recognizer.look(images, reducer)
    assert features.shape[1] < 36 and (valid is None or valid.shape == features.shape[:2])
    # as inside a run that the user opened; and nothing is left of it
    torch.manual_seed(1)
    with qm.reduce(recognizer.vision, reducer):
        assert torch.equal(recognizer.features(images), features)
    assert recognizer.features(images).shape[1] == 36
    torch.manual_seed(1)
    found = recognizer.recognize(images, labels=["cat", "dog"], reducer=reducer)
    scores = closed_set(recognizer, recognizer.prefix(features, valid), ["cat", "dog"]).exp()
    for row, guesses in zip(scores.tolist(), found, strict=True):
        assert sorted(guess.score for guess in guesses) == pytest.approx(sorted(row))
    assert all(len(row) <= 4 for row in recognizer.recognize(images, top=4, reducer=reducer))


def test_layers_have_the_same_tokens_with_a_reducer() -> None:
    recognizer = build(layers=(3, 1))
    every = recognizer.features(pixels())
    fewer, valid = recognizer.look(pixels(), qm.TopNorm(keep=0.5))
    assert fewer.shape == (2, 18, 64) and valid is None
    # the reducer acts in block 2 and drops tokens; what came before it is left as it was
    for row in range(2):
        same = (fewer[row, :, None, 32:] - every[row, None, :, 32:]).abs().amax(-1) < 1e-9
        assert same.sum(-1).tolist() == [1] * 18 and same.any(0).sum() == 18


def test_padded_features_change_nothing() -> None:
    recognizer = build()
    features, valid = seen(recognizer, 3, 6), ragged(3, 6, 2)
    with torch.no_grad():
        together = closed_set(recognizer, recognizer.prefix(features, valid), ["cat", "red car"])
        for row in range(3):
            one = recognizer.prefix(features[row][valid[row]][None])
            assert torch.allclose(closed_set(recognizer, one, ["cat", "red car"])[0], together[row], atol=1e-9)


def test_recognize_is_look_prefix_decode() -> None:
    recognizer = build(dtype=torch.float32, language={"tie_word_embeddings": False, "initializer_range": 0.5})
    images = pixels(3).float()
    with torch.no_grad():
        prefix = recognizer.prefix(recognizer.features(images))
    assert recognizer.recognize(images, top=5) == one_shot(recognizer, prefix, 5)
    for method in ("one_shot", "best_first", "greedy", "beam"):
        found = recognizer.recognize(images, top=3, method=method, minimum=1e-3)
        assert len(found) == 3 and all(len(row) <= 3 for row in found)
        assert all(guess.score >= 1e-3 for row in found for guess in row)
    chosen = recognizer.recognize(images, top=1, labels=["cat", "red car"])
    assert [len(row) for row in chosen] == [1, 1, 1] and chosen[0][0].label in ("cat", "red car")


def test_the_name_is_public() -> None:
    assert qm.Recognizer is Recognizer and "Recognizer" in qm.__all__


def test_the_encoder_stays_as_for_inference() -> None:
    recognizer = build().train()
    assert recognizer.training and recognizer.language.training and not recognizer.vision.training
    assert recognizer.device == recognizer.boundary.device


def test_images_are_scaled_cut_and_standardised() -> None:
    recognizer = build(mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))
    image = torch.full((1, 3, 100, 60), 0.5)
    assert torch.allclose(recognizer.prepare(image)[0, :, 20, 20], torch.tensor([0.0, 0.25, 0.25]))
    assert recognizer.prepare(image).shape == (1, 3, 48, 48)
    striped = torch.zeros(1, 3, 48, 480)
    striped[..., 216:264] = 1.0
    assert torch.allclose(recognizer.prepare(striped)[:, 0], torch.ones(1, 48, 48))
    exact = torch.rand(2, 3, 48, 48)
    assert torch.allclose(recognizer.prepare(exact)[:, 2], exact[:, 2] / 2)


def test_what_cannot_be_recognized_is_told() -> None:
    recognizer = build()
    images = pixels()
    for given, message in (
        (images[0], r"pixels must be \(images, 3, height, width\) of floats, got \(3, 48, 48\)"),
        (images[:, :1], r"pixels must be .* got \(2, 1, 48, 48\)"),
        (images[:0], r"pixels must be .* got \(0, 3, 48, 48\)"),
        (images.long(), "pixels must be .* of floats"),
    ):
        with pytest.raises(QuickmergeError, match=message):
            recognizer.recognize(given)
    for settings, message in (
        ({"top": 0}, "top must be a whole number of at least 1, got 0"),
        ({"method": "one-shot"}, r"method must be one of one_shot, .* got 'one-shot' \(did you mean 'one_shot'\?\)"),
        ({"minimum": 2}, r"minimum must be a number in \[0, 1\], got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            recognizer.recognize(images, **settings)
    with pytest.raises(QuickmergeError, match=r"features must be \(images, tokens, 32\), got \(2, 5, 31\)"):
        recognizer.prefix(seen(recognizer)[..., 1:])
    with pytest.raises(QuickmergeError, match=r"valid must have shape \(2, 5\), got \(2, 4\)"):
        recognizer.prefix(seen(recognizer), ragged(2, 4, 0))
    with pytest.raises(QuickmergeError, match="images must be"):
        recognizer.prepare(images[0])
    with pytest.raises(
        QuickmergeError, match="reducer must be None for a recognizer that looks at what enters the first"
    ):
        build(layers=0).look(images, qm.ToMe(keep=0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": 5}, "blocks must be at most 4"),
        ({"layers": 5}, r"layers must be different whole numbers in -5\.\.4, got 5"),
        ({"layers": (1, -4)}, "layers must be different whole numbers"),
        ({"layers": ()}, "layers must be different whole numbers"),
        ({"mask": "independant"}, r"mask must be one of .* \(did you mean 'independent'\?\)"),
        ({"mean": (0.5, 0.5)}, r"mean must be three numbers, one a channel, got \[0.5, 0.5\]"),
        ({"std": (0.5, 0.0, 1.0)}, "std must be three numbers"),
        ({"image_size": 0}, "image_size must be a whole number of at least 1, got 0"),
        ({"prompt": ""}, "prompt must be some text, got ''"),
        ({"separator": "and"}, "separator must be one token"),
    ],
)
def test_settings_out_of_range_are_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_models_of_another_kind_are_told() -> None:
    llama = small()
    for vision, message in (
        (torch.nn.Linear(2, 2), "vision must be a transformers PreTrainedModel, got Linear"),
        (llama, "holds 0 vision transformers"),
        (vision_zoo.build("videomae"), "vision must be a model of images, got one of videos"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            Recognizer.new(vision, llama, words(), blocks=1, prompt=PROMPT)
    siglip = vision_zoo.build("siglip")
    with pytest.raises(UnsupportedModelError, match="vision can't look at images of image_size=4 pixels"):
        Recognizer.new(siglip, llama, words(), blocks=1, prompt=PROMPT, image_size=4)


def test_a_tokenizer_without_bos_has_none_in_the_prefix() -> None:
    tokenizer = words()
    tokenizer.bos_token = None
    assert prefixes(build(tokenizer=tokenizer)).embeds.shape[1] == 5 + 1 + 3
