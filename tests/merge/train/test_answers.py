"""Training a vision-language model to answer questions: each is read as if it were alone."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
import vision_samples
import vlm_samples
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from strategies import generator, prop
from torch import Tensor
from training_samples import lines, same

from quickmerge.datasets.annotated import Annotated, read_annotated
from quickmerge.datasets.labelled import PixelFormat
from quickmerge.datasets.questions import AskedImages, AskedTokens, Row, pack
from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.merge.train.answers import Answer, answer_logits, evaluate_answers, exact, scaled_inputs, train_vlm
from quickmerge.merge.train.new_vlm import new_vlm
from quickmerge.models import ask_inputs, load_vlm
from quickmerge.training import TrainingConfig

IMAGE, PATCHES, WORDS = 24, 16, 20


@cache
def tiny(attn: str = "sdpa", language: type[Any] = hf.LlamaConfig) -> Any:
    """A LLaVA in float64, but for the norms and rotations that transformers computes in float32."""
    text = language(
        vocab_size=25, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.3, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    tower = hf.Dinov2Config(**vision_samples.SIZE, **vision_samples.IMAGE, mlp_ratio=2, initializer_range=0.2)
    config = hf.LlavaConfig(vision_config=tower, text_config=text, image_token_index=IMAGE, vision_feature_layer=[2, 4])
    torch.manual_seed(0)
    return hf.LlavaForConditionalGeneration._from_config(config, attn_implementation=attn).double().eval()


def rows(seed: int, shape: list[list[tuple[int, int]]]) -> list[Row]:
    """Images; ``shape`` has for each the lengths of its questions and answers."""
    noise = generator(seed)

    def words(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, WORDS, (count,), generator=noise).tolist())

    return [
        Row(
            torch.randn(3, 32, 32, generator=noise, dtype=torch.float64),
            (*words(2 + seed % 3), *(IMAGE,) * PATCHES),
            tuple(AskedTokens(words(asked), words(answer)) for asked, answer in questions),
        )
        for questions in shape
    ]


def alone(model: Any, row: Row, question: AskedTokens) -> Tensor:
    """The logits that predict the answer, of the model's own forward over one question and its answer."""
    ids = torch.tensor([[*row.prefix, *question.asked, *question.answer]])
    logits = model(input_ids=ids, pixel_values=row.pixels[None].to(model.dtype)).logits[0]
    return logits[-len(question.answer) - 1 : -1]


SHAPES = st.lists(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3)), min_size=1, max_size=4), min_size=1, max_size=3
)


@given(SHAPES, st.integers(0, 100), st.sampled_from(["sdpa", "eager"]))
@prop(20)
def test_packed_questions_are_read_as_if_each_were_alone(shape: list[Any], seed: int, attn: str) -> None:
    model, given_rows = tiny(attn), rows(seed, shape)
    with torch.inference_mode():
        got = answer_logits(model, pack(given_rows))
        want = torch.cat([alone(model, row, question) for row in given_rows for question in row.questions])
    assert got.shape == want.shape and want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_it_holds_for_windows_and_for_bf16() -> None:
    given_rows = rows(3, [[(4, 2), (2, 3)], [(3, 1)]])
    for model, close in ((tiny(language=hf.Gemma3TextConfig), 1e-5), (deepcopy(tiny()).to(torch.bfloat16), 0.15)):
        with torch.inference_mode():
            got = answer_logits(model, pack([Row(r.pixels.to(model.dtype), r.prefix, r.questions) for r in given_rows]))
            want = torch.cat([alone(model, row, question) for row in given_rows for question in row.questions])
        torch.testing.assert_close(got, want, rtol=close, atol=close)


@given(st.integers(0, 100))
@prop(10)
def test_loss_and_exactness_are_those_of_single_questions(seed: int) -> None:
    model, given_rows = tiny(), rows(seed, [[(3, 2), (1, 1)], [(2, 3)]])
    with torch.no_grad():
        got = Answer(deepcopy(model))(pack(given_rows), 0.5)
        losses, right = [], []
        for row in given_rows:
            for question in row.questions:
                logits = alone(model, row, question)
                losses += F.cross_entropy(logits, torch.tensor(question.answer), reduction="none").tolist()
                right.append(float(logits.argmax(-1).tolist() == list(question.answer)))
    assert float(got["loss"]) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert float(got["exact"]) == pytest.approx(sum(right) / len(right))


def test_an_answer_is_exact_only_if_every_token_is() -> None:
    batch = pack(rows(0, [[(2, 2), (1, 1)], [(1, 3)]]))
    logits = F.one_hot(batch.target, 25).double()
    assert exact(logits, batch).tolist() == [1, 1, 1]
    logits[1] = logits[1].roll(1)  # the second token of the first answer
    assert exact(logits, batch).tolist() == [0, 1, 1]
    logits[5] = logits[5].roll(1)  # the last token of the last answer
    assert exact(logits, batch).tolist() == [0, 1, 0]


def test_no_question_learns_from_another() -> None:
    model = tiny()
    first = rows(5, [[(3, 2), (2, 2)]])[0]
    changed = Row(first.pixels, first.prefix, (AskedTokens((2, 3, 4), (5, 6)), first.questions[1]))
    with torch.inference_mode():
        one, two = (answer_logits(model, pack([row])) for row in (first, changed))
    assert torch.equal(one[2:], two[2:]) and not torch.equal(one[:2], two[:2])


def test_what_is_trained_and_how_fast() -> None:
    model = deepcopy(tiny())
    objective = Answer(model, warmup_language=0.25, language_rate=0.5)
    names = dict(objective.named_parameters())
    assert {objective.group_of(name) for name in names} == {"projector", "language"}
    assert not any(
        id(value) in {id(each) for each in names.values()} for value in model.model.vision_tower.parameters()
    )
    assert not any(value.requires_grad for value in model.model.vision_tower.parameters())
    assert objective.rate_of("projector", 0.0) == objective.rate_of("projector", 0.9) == 1
    assert [objective.rate_of("language", share) for share in (0.0, 0.2499, 0.25, 1.0)] == [0, 0, 0.5, 0.5]
    frozen = Answer(model, language_rate=0.0)
    assert all(name.startswith("projector.") for name, value in frozen.named_parameters() if value.requires_grad)
    for setting in ("warmup_language", "language_rate"):
        with pytest.raises(ValueError, match=f"{setting} must be a number in"):
            Answer(model, **{setting: 1.5})
    with pytest.raises(UnsupportedModelError, match="must be a LlavaForConditionalGeneration"):
        Answer(model.model.language_model)


# A whole training -----------------------------------------------------------------------------------------------------


def vlm() -> tuple[Any, Any]:
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tower = hf.Dinov2Config(**vision_samples.SIZE, **vision_samples.IMAGE, mlp_ratio=2)
    shown = hf.BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    torch.manual_seed(4)
    language = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=40, tie_word_embeddings=True, **text))
    return new_vlm(hf.Dinov2Model(tower), language, vlm_samples.tokenizer(), shown, layers=(2, 3))


def asked(folder: Path, model: Any, processor: Any, questions: int | None = 2, count: int = 6) -> AskedImages:
    if not folder.exists():
        vlm_samples.annotated(folder, count)
    return AskedImages(
        read_annotated(folder), processor.tokenizer, PixelFormat.of(processor.image_processor), questions=questions,
        image_tokens=model.config.image_seq_length, image_token=model.config.image_token_id,
    )  # fmt: skip


def config(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**{"steps": 4, "batch": 2, "learning_rate": 3e-3, "log_every": 1, "save_every": 2, **changes})


def test_questions_are_drawn_anew_and_packed_as_the_processor_puts_them(tmp_path: Path) -> None:
    model, processor = vlm()
    dataset = asked(tmp_path / "data", model, processor, questions=1)
    torch.manual_seed(0)
    drawn = {dataset[0].questions[0] for _ in range(20)}
    assert len(drawn) == 2
    every = asked(tmp_path / "data", model, processor, questions=None)
    row, picture = every[1], every.pictures[1]
    for made, question in zip(row.questions, picture.questions, strict=True):
        parts = [{"type": "image", "image": Image.open(picture.path)}, {"type": "text", "text": question.question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        assert [*row.prefix, *made.asked] == inputs["input_ids"][0].tolist()
        torch.testing.assert_close(row.pixels, inputs["pixel_values"][0])
        assert processor.tokenizer.decode(made.answer) == question.answer + " </s>"
    assert every.describe(1) == "1.png"
    assert every.fingerprint() != dataset.fingerprint() == asked(tmp_path / "data", model, processor, 1).fingerprint()


def test_images_without_questions_are_passed_over(tmp_path: Path) -> None:
    model, processor = vlm()
    found = read_annotated(vlm_samples.annotated(tmp_path / "data"))
    dumb = [Annotated(each.path, ("thing",), ()) for each in found]
    more = {"image_tokens": 16, "image_token": model.config.image_token_id}
    form = PixelFormat.of(processor.image_processor)
    assert len(AskedImages([*dumb, found[0]], processor.tokenizer, form, **more)) == 1
    with pytest.raises(QuickmergeError, match="images must hold at least one with a question, got none"):
        AskedImages(dumb, processor.tokenizer, form, **more)
    with pytest.raises(ValueError, match="questions must be a whole number of at least 1, got 0"):
        AskedImages(found, processor.tokenizer, form, questions=0, **more)


def test_the_projector_learns_on_features_of_one_size(tmp_path: Path) -> None:
    model, processor = vlm()
    dataset = asked(tmp_path / "data", model, processor)
    linear = model.model.multi_modal_projector.linear_1
    plain = {name: value.clone() for name, value in linear.state_dict().items()}
    seen = []
    hook = linear.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with scaled_inputs(model, dataset, fresh=True), torch.no_grad():
        for index in range(len(dataset)):
            model.get_image_features(pixel_values=dataset.pixels(index)[None])
        read, out = (torch.cat([each[k] for each in seen[len(dataset) :]]).flatten(0, 1).double() for k in (0, 1))
        scaled = (read - read.mean(0)) / read.std(0)
        torch.testing.assert_close(out, scaled @ plain["weight"].T.double() + plain["bias"], rtol=1e-3, atol=1e-4)
        inside = linear(read.float())
    hook.remove()
    # outside it is an ordinary layer that does the same
    assert set(linear.state_dict()) == {"weight", "bias"}
    torch.testing.assert_close(linear(read.float()), inside)
    # a trained one is not touched by going in and out, not even by an error
    with pytest.raises(RuntimeError, match="stop"), scaled_inputs(model, dataset):
        torch.testing.assert_close(linear(read.float()), inside)
        raise RuntimeError("stop")
    assert set(linear.state_dict()) == {"weight", "bias"}
    torch.testing.assert_close(linear(read.float()), inside)


def painted(folder: Path) -> Path:
    """Images of one colour, which is what is asked for: only who sees them can answer."""
    folder.mkdir()
    told = []
    for number, colour in enumerate(["red", "blue"] * 4):
        Image.new("RGB", (32, 32), colour).save(folder / f"{number}.png")
        questions = [{"kind": "colour", "question": "which colour is it ?", "answer": colour},
                     {"kind": "where", "question": "what is there ?", "answer": "left " + colour}]  # fmt: skip
        told.append(json.dumps({"image": f"{number}.png", "questions": questions}))
    (folder / "annotations.jsonl").write_text("\n".join(told))
    return folder


def test_training_makes_it_see_and_leaves_a_folder_that_loads(tmp_path: Path) -> None:
    model, processor = vlm()
    tower = {name: value.clone() for name, value in model.model.vision_tower.state_dict().items()}
    dataset = asked(painted(tmp_path / "data"), model, processor)
    train_vlm(
        model, processor, dataset, config(steps=90, batch=8, learning_rate=1e-2), tmp_path / "out",
        warmup_language=0.0, language_rate=1.0,
    )  # fmt: skip
    told = lines(tmp_path / "out")
    assert told[0]["loss"] > 3 and told[0]["exact"] < 0.5 and told[-1]["loss"] < 0.1 and told[-1]["exact"] == 1
    assert all(torch.equal(value, tower[name]) for name, value in model.model.vision_tower.state_dict().items())
    shares = evaluate_answers(model, asked(tmp_path / "data", model, processor, None))
    assert shares == {"all": 1.0, "colour": 1.0, "where": 1.0}
    again, read = load_vlm(tmp_path / "out", progress=False)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    assert read.chat_template == processor.chat_template == read.tokenizer.chat_template
    inputs = ask_inputs(read, [Image.new("RGB", (64, 64), "blue")], "what is there ?")
    out = again.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert read.decode(out, skip_special_tokens=True).strip() == "left blue"
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]


def test_the_language_model_waits(tmp_path: Path) -> None:
    model, processor = vlm()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_vlm(
        model, processor, asked(tmp_path / "data", model, processor), config(steps=2), tmp_path / "out",
        warmup_language=1.0,
    )  # fmt: skip
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("model.multi_modal_projector.") for name in changed)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path, precision: str) -> None:
    made = {}
    for name, stops in (("whole", [None]), ("parts", [1e-6, 1e-6, None])):
        for turn, stop in enumerate(stops):
            model, processor = vlm()
            dataset = asked(tmp_path / "data", model, processor, questions=1)
            changed = config(max_minutes=stop, precision=precision)
            train_vlm(model, processor, dataset, changed, tmp_path / name, resume=turn > 0, warmup_language=0.5)
        made[name] = model
    assert same(made["whole"], made["parts"]) and lines(tmp_path / "whole") == lines(tmp_path / "parts")
    model, processor = vlm()
    with pytest.raises(QuickmergeError, match=r"language_rate was 0\.3"):
        train_vlm(
            model, processor, asked(tmp_path / "data", model, processor, 1), config(precision=precision),
            tmp_path / "parts", resume=True, language_rate=0.2, warmup_language=0.5,
        )  # fmt: skip


def test_kinds_are_counted_apart(tmp_path: Path) -> None:
    model, processor = vlm()
    dataset = asked(tmp_path / "data", model, processor, None)
    red, end = dataset[0].questions[0].answer
    # it says "red" behind "assistant :" and ends after every word: only the questions about colours get their answer
    replies = {processor.tokenizer.convert_tokens_to_ids(":"): red, red: end}

    def say(module: Any, args: Any, out: Tensor) -> Tensor:
        ids = batches[-1].ids.flatten()[batches[-1].at].tolist()
        return F.one_hot(torch.tensor([replies.get(each, end) for each in ids]), out.shape[-1]).double()

    batches: list[Any] = []
    model.model.register_forward_pre_hook(
        lambda _, args, kw: batches.append(pack([dataset[len(batches)]])), with_kwargs=True
    )
    model.lm_head.register_forward_hook(say)
    assert evaluate_answers(model, dataset) == {"all": 0.5, "colour": 1.0, "where": 0.0}
