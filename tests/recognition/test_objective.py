"""The loss against separate forwards; that labels do not see one another; that training lowers it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recognition_samples import NAMES, alone, build, label_log_p, prefixes, ragged, seen
from safetensors.torch import load_file
from strategies import prop, seeds
from torch import Tensor

from quickmerge.errors import QuickmergeError
from quickmerge.recognition import LabelLoss, Recognizer
from quickmerge.recognition.language import read
from quickmerge.training import TrainingConfig, train
from quickmerge.training.packing import packed_mask, packed_positions

FAMILIES = ("llama", "qwen2", "gemma3_text", "gpt_neox", "mistral")
LABELS = [["red car", "cat", "traffic lights"], ["dog"], ["cat", "red traffic car lights"]]


@pytest.fixture(scope="module")
def llama() -> Recognizer:
    return build()


def batch(recognizer: Recognizer, labels: list[list[str]], seed: int = 0, tokens: int = 5) -> dict[str, Any]:
    rows = len(labels)
    return {"features": seen(recognizer, rows, tokens, seed), "valid": ragged(rows, tokens, seed), "labels": labels}


def packed_logits(recognizer: Recognizer, labels: list[list[str]]) -> tuple[Tensor, Any]:
    """Logits of every label token, packed behind its prefix."""
    packed, prefix = recognizer.labels.encode(labels), prefixes(recognizer, len(labels))
    group = torch.cat([torch.zeros_like(prefix.valid, dtype=torch.long), packed.group], 1)
    valid = torch.cat([prefix.valid, packed.valid], 1)
    image = torch.cat([prefix.image, torch.zeros_like(packed.valid)], 1)
    embeds = torch.cat([prefix.embeds, recognizer.language.get_input_embeddings()(packed.ids)], 1)
    see, position = packed_mask(group, image, valid), packed_positions(group, valid)
    with torch.no_grad():
        return read(recognizer.language, embeds, see, position)[:, prefix.valid.shape[1] :], packed


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_packed_labels_are_read_as_if_each_stood_alone_behind_the_prompt(family: str, attn: str) -> None:
    recognizer = build(family)
    recognizer.language.set_attn_implementation(attn)
    logits, packed = packed_logits(recognizer, LABELS)
    prefix = prefixes(recognizer, len(LABELS))
    for row in range(len(LABELS)):
        for k in range(1, int(packed.count[row]) + 1):
            own = packed.group[row] == k
            with torch.no_grad():
                wanted = alone(recognizer, prefix, row, packed.ids[row][own].tolist())[1:]
            # eager attention takes its softmax in single precision
            assert float((logits[row][own] - wanted).abs().max()) < (1e-10 if attn == "sdpa" else 1e-5)


def test_single_precision_reads_them_alike_to_a_millionth() -> None:
    recognizer = build(dtype=torch.float32)
    logits, packed = packed_logits(recognizer, LABELS)
    prefix = prefixes(recognizer, len(LABELS))
    own = packed.group[0] == 3
    with torch.no_grad():
        wanted = alone(recognizer, prefix, 0, packed.ids[0][own].tolist())[1:]
    assert float((logits[0][own].softmax(-1) - wanted.softmax(-1)).abs().max()) <= 1e-6


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_another_label_changes_nothing_at_all(precision: str, attn: str) -> None:
    recognizer = build(dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32)
    recognizer.language.set_attn_implementation(attn)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        before, packed = packed_logits(recognizer, [["cat", "red car", "dog"]])
        after, _ = packed_logits(recognizer, [["sky", "red car", "dog"]])
    others = packed.group[0] != 1
    assert torch.equal(before[0][others], after[0][others])
    assert not torch.equal(before[0][~others], after[0][~others])


@given(
    labels=st.lists(
        st.lists(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map(" ".join), min_size=1, max_size=4),
        min_size=1, max_size=3,
    ),
    seed=seeds,
)  # fmt: skip
@prop(15)
def test_the_papers_loss_is_eq_6_by_separate_forwards(llama: Recognizer, labels: list[list[str]], seed: int) -> None:
    given_batch = batch(llama, labels, seed)
    with torch.no_grad():
        prefix = llama.prefix(given_batch["features"], given_batch["valid"])
        nats, first, image = LabelLoss(llama).nats(given_batch)
        out = LabelLoss(llama)(given_batch, 0.0)
        for row, names in enumerate(labels):
            wanted = -sum(label_log_p(llama, prefix, row, name) for name in dict.fromkeys(names))
            assert float(nats[image == row].sum()) == pytest.approx(wanted, abs=1e-9)
    count = sum(len(name.split()) + 1 for names in labels for name in dict.fromkeys(names))
    assert len(nats) == count and float(out["loss"]) == pytest.approx(float(nats.sum()) / count)
    assert int(first.sum()) == sum(len(set(names)) for names in labels)
    assert float(out["first"]) == pytest.approx(float(nats[first].mean()))
    assert float(out["rest"]) == pytest.approx(float(nats[~first].mean()))


@pytest.mark.parametrize("mask", ["independent", "prefix", "causal"])
def test_the_reference_predicts_the_next_label_from_the_separator(mask: str) -> None:
    recognizer, labels = build(mask=mask), [["red car", "cat", "dog sky"], ["dog"]]
    given_batch = batch(recognizer, labels)
    with torch.no_grad():
        prefix = recognizer.prefix(given_batch["features"], given_batch["valid"])
        nats, first, image = LabelLoss(recognizer, "reference").nats(given_batch)
        for row, names in enumerate(labels):
            ids = [i for name in names for i in (*recognizer.labels.ids(name), recognizer.labels.sep)][:-1]
            if mask == "independent":
                wanted = public_code(recognizer, prefix, row, names)
            else:
                log_p = alone(recognizer, prefix, row, ids, both_ways=mask == "prefix").log_softmax(-1)
                wanted = [-float(log_p[t, token]) for t, token in enumerate(ids)]
            assert nats[image == row].tolist() == pytest.approx(wanted, abs=1e-9)
    assert first.tolist() == [True, False, False, True, False, True, False, True]


def public_code(recognizer: Recognizer, prefix: Any, row: int, names: list[str]) -> list[float]:
    """The loss of the packed sequence in which the tokens of the last label, which nothing closes, are hidden."""
    keep = prefix.valid[row]
    ids, group = [], []
    for k, name in enumerate(names, 1):
        own = [*recognizer.labels.ids(name), recognizer.labels.sep]
        ids, group = ids + own, group + [k] * len(own)
    ids, group = ids[:-1], group[:-1]
    embeds = torch.cat([prefix.embeds[row][keep], recognizer.language.get_input_embeddings()(torch.tensor(ids))])
    image, p = prefix.image[row][keep].tolist() + [False] * len(ids), int(keep.sum())
    group = [0] * p + group
    mask = torch.full((len(embeds), len(embeds)), torch.finfo(embeds.dtype).min, dtype=embeds.dtype)
    for i in range(len(embeds)):
        for j in range(len(embeds)):
            label = 0 < group[j] == group[i] < len(names)
            if (j <= i and (group[j] == 0 or label)) or (image[i] and image[j]):
                mask[i, j] = 0
    logits = recognizer.language(inputs_embeds=embeds[None], attention_mask=mask[None, None], use_cache=False).logits[0]
    log_p = logits.log_softmax(-1)
    return [-float(log_p[p - 1 + t, token]) for t, token in enumerate(ids)]


def test_a_batch_is_its_rows_and_padding_changes_nothing(llama: Recognizer) -> None:
    both, loss = batch(llama, LABELS), LabelLoss(llama)
    with torch.no_grad():
        nats, _, image = loss.nats(both)
        for row in range(len(LABELS)):
            keep = both["valid"][row]
            one = {"features": both["features"][row][keep][None], "labels": LABELS[row : row + 1]}
            assert float((loss.nats(one)[0] - nats[image == row]).abs().max()) < 1e-10


def test_all_but_the_encoder_and_the_input_matrix_gets_a_gradient() -> None:
    recognizer = build(dtype=torch.float32, language={"tie_word_embeddings": False})
    LabelLoss(recognizer)(batch(recognizer, LABELS), 0.0)["loss"].backward()
    still = {name for name, p in recognizer.named_parameters() if p.grad is None or not bool(p.grad.any())}
    frozen = {name for name, p in recognizer.named_parameters() if not p.requires_grad}
    assert still == frozen
    assert {name for name in frozen if not name.startswith("vision.")} == {"language.model.embed_tokens.weight"}


@pytest.mark.parametrize("objective", ["paper", "reference"])
def test_half_precision_and_autocast_give_nearly_the_same_loss(objective: str) -> None:
    exact = build(seed=3)
    wanted = LabelLoss(exact, objective)(batch(exact, LABELS), 0.0)["loss"].item()
    single, half = build(dtype=torch.float32, seed=3), build(dtype=torch.bfloat16, seed=3)
    assert LabelLoss(single, objective)(batch(single, LABELS), 0.0)["loss"].item() == pytest.approx(wanted, rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert LabelLoss(single, objective)(batch(single, LABELS), 0.0)["loss"].item() == pytest.approx(wanted, rel=0.1)
    assert LabelLoss(half, objective)(batch(half, LABELS), 0.0)["loss"].item() == pytest.approx(wanted, rel=0.1)


class Scenes:
    """Random features, each of which stands for one set of labels."""

    def __init__(self, recognizer: Recognizer) -> None:
        self.features = seen(recognizer, 6, 4)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, list[str]]:
        return self.features[index], [NAMES[index], "red " + NAMES[index - 1]]


@pytest.mark.parametrize("objective", ["paper", "reference"])
def test_some_steps_of_training_lower_the_loss(objective: str, tmp_path: Path) -> None:
    recognizer = build(dtype=torch.float32)
    before = {name: value.clone() for name, value in recognizer.vision.state_dict().items()}
    losses = []
    train(
        LabelLoss(recognizer, objective), Scenes(recognizer),
        TrainingConfig(steps=20, batch=3, learning_rate=3e-3, warmup=0), tmp_path,
        collate=lambda items: {"features": torch.stack([f for f, _ in items]), "labels": [n for _, n in items]},
        on_step=lambda step, metrics: losses.append(metrics["loss"]),
    )  # fmt: skip
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])
    assert all(torch.equal(value, before[name]) for name, value in recognizer.vision.state_dict().items())
    saved = load_file(next(tmp_path.glob("checkpoints/*/model.safetensors")))
    assert not any(".vision." in name for name in saved) and any("projector" in name for name in saved)


def test_what_cannot_be_trained_is_told(llama: Recognizer) -> None:
    with pytest.raises(ValueError, match=r"objective must be one of paper, reference, got 'papper'.*did you mean"):
        LabelLoss(llama, "papper")
    with pytest.raises(ValueError, match="objective must be 'reference' for a recognizer with mask='causal'"):
        LabelLoss(build(mask="causal"))
    with pytest.raises(QuickmergeError, match="labels must be given for each of the 2 images, got 1"):
        LabelLoss(llama)({"features": seen(llama), "labels": [["cat"]]}, 0.0)
    with pytest.raises(QuickmergeError, match="batch must hold pixels or features, got labels"):
        LabelLoss(llama)({"labels": [["cat"]]}, 0.0)


def test_pixels_are_looked_at() -> None:
    recognizer = build()
    pixels = torch.rand(2, 3, 48, 48, dtype=torch.float64)
    labels = [["cat"], ["dog", "sky"]]
    loss = LabelLoss(recognizer)
    with torch.no_grad():
        wanted = loss({"features": recognizer.features(pixels), "labels": labels}, 0.0)["loss"]
        assert torch.equal(loss({"pixels": pixels, "labels": labels}, 0.0)["loss"], wanted)
