"""The real ``transformers serve`` on packaged folders, asked by the real openai client."""

from __future__ import annotations

import base64
import io
import json
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import transformers as hf
import vlm_samples
from gumiho_samples import heads
from PIL import Image
from stock_server import Stock, by_itself, free_port, run, said, serving, talker, text

import quickmerge as qm
from quickmerge.serve.package import package

RECIPE = qm.Recipe(merge=qm.QuickMerge(keep=0.4), decoding=qm.PromptLookup())
NEW = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talker(tmp_path_factory.mktemp("models") / "talker")


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return package(model, RECIPE, tmp_path_factory.mktemp("packaged") / "out", progress=False).folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stock]:
    with serving(tmp_path_factory.mktemp("server") / "log", folder, "--trust-remote-code") as stock:
        yield stock


def chat(server: Stock, folder: Path, messages: Any, **more: Any) -> str:
    fixed: dict[str, Any] = {"temperature": 0, "max_tokens": NEW}
    answer = server.client.chat.completions.create(model=str(folder), messages=messages, **{**fixed, **more})
    return answer.choices[0].message.content or ""


def config(**settings: Any) -> dict[str, str]:
    return {"generation_config": json.dumps(settings)}


def test_a_chat_is_answered_as_the_recipe_does_and_logged(server: Stock, folder: Path, model: Path) -> None:
    before = len(server.lines())
    found = chat(server, folder, said(text(500)))
    assert found == by_itself(model, said(text(500)), RECIPE) != by_itself(model, said(text(500)))
    line = server.after(before)
    assert "read 503 tokens, kept 201 (40 %) from block 2 on, cache 60 %, " in line and "tokens per pass, wrote" in line


def test_two_turns(server: Stock, folder: Path, model: Path) -> None:
    talk = said(text(400, 1))
    talk.append({"role": "assistant", "content": chat(server, folder, talk)})
    talk.append({"role": "user", "content": text(60, 2)})
    assert chat(server, folder, talk) == by_itself(model, talk, RECIPE)


def test_streaming_gives_the_same_text_token_by_token(server: Stock, folder: Path, model: Path) -> None:
    stream = server.client.chat.completions.create(
        model=str(folder), messages=said(text(500, 3)), temperature=0, max_tokens=NEW, stream=True
    )  # type: ignore[call-overload]
    chunks = [chunk.choices[0] for chunk in stream]
    pieces = [choice.delta.content for choice in chunks if choice.delta.content]
    assert "".join(pieces) == by_itself(model, said(text(500, 3)), RECIPE)
    assert len(pieces) == NEW and chunks[-1].finish_reason == "length"


def test_completions_and_responses(server: Stock, folder: Path, model: Path) -> None:
    done = server.client.completions.create(model=str(folder), prompt=text(500, 4), temperature=0, max_tokens=NEW)
    assert done.choices[0].text == by_itself(model, text(500, 4), RECIPE)
    answer = server.client.responses.create(
        model=str(folder), input=text(500, 4), temperature=0, max_output_tokens=NEW, stream=False
    )
    assert answer.output_text == by_itself(model, said(text(500, 4)), RECIPE)


def test_stop_strings_and_sampling(server: Stock, folder: Path, model: Path) -> None:
    words = by_itself(model, said(text(500)), RECIPE).split()
    stopped = chat(server, folder, said(text(500)), stop=[words[4]]).split()
    assert stopped == words[: words.index(words[4]) + 1]
    drawn = [
        chat(server, folder, said(text(500)), temperature=2, seed=seed, extra_body=config(do_sample=True))
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_prompt_too_short_to_gain_passes_unreduced_and_says_so(server: Stock, folder: Path, model: Path) -> None:
    before = len(server.lines())
    assert chat(server, folder, said(text(60))) == by_itself(model, said(text(60)))
    assert "read 63 tokens, passed unreduced: fewer than min_tokens=256, " in server.after(before)


def test_a_request_has_a_share_of_its_own_and_1_is_the_plain_model(server: Stock, folder: Path, model: Path) -> None:
    before, long = len(server.lines()), said(text(500))
    body = config(keep=1.0, do_sample=False)
    assert chat(server, folder, long, extra_body=body) == by_itself(model, long)
    assert "kept all: keep=1" in server.after(before)
    other = qm.Recipe(merge=qm.QuickMerge(keep=0.2))
    assert chat(server, folder, long, extra_body=config(keep=0.2)) == by_itself(model, long, other)
    assert chat(server, folder, long) == by_itself(model, long, RECIPE)
    with pytest.raises(openai.BadRequestError) as refused:
        chat(server, folder, long, extra_body=config(keep=7))
    assert refused.value.response.json() == {"detail": "keep must be a number in (0, 1], got 7"}
    with pytest.raises(openai.BadRequestError) as refused:
        chat(server, folder, long, extra_body=config(num_beams=3))
    assert "leave num_beams" in refused.value.response.json()["detail"]


@pytest.mark.parametrize("count", [16, pytest.param(200, marks=pytest.mark.slow)])
def test_parallel_clients_get_what_each_gets_alone(count: int, server: Stock, folder: Path, model: Path) -> None:
    lengths = [60, 300, 420, 500, 640, 700]
    alone = [by_itself(model, said(text(n, n)), RECIPE) for n in lengths]
    plain = by_itself(model, said(text(500, 500)))
    assert len({*alone, plain}) == len(lengths) + 1  # a text that went astray would be seen

    def ask(number: int) -> str:
        length = lengths[number % len(lengths)]
        if number % 5 == 4:
            return chat(server, folder, said(text(500, 500)), extra_body=config(keep=1.0, do_sample=False))
        return chat(server, folder, said(text(length, length)))

    with ThreadPoolExecutor(4) as clients:
        found = list(clients.map(ask, range(count)))
    assert found == [plain if n % 5 == 4 else alone[n % len(lengths)] for n in range(count)]


def test_a_client_that_leaves_takes_nothing_along(server: Stock, folder: Path, model: Path) -> None:
    stream = server.client.chat.completions.create(
        model=str(folder), messages=said(text(500)), temperature=0, max_tokens=1000, stream=True
    )  # type: ignore[call-overload]
    next(iter(stream))
    stream.close()
    assert chat(server, folder, said(text(500))) == by_itself(model, said(text(500)), RECIPE)


def test_continuous_batching_is_refused_at_the_start(folder: Path) -> None:
    done = run([folder, "--trust-remote-code", "--continuous-batching"], free_port())
    assert done.returncode != 0
    assert "leave --continuous-batching out, or serve the plain model" in done.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_port_in_use_is_told_and_ends_the_server(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run([folder, "--trust-remote-code"], taken.getsockname()[1])
    assert done.returncode != 0 and "address already in use" in done.stderr


# One server, which loads whatever folder a request names --------------------------------------------------------------


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stock]:
    with serving(tmp_path_factory.mktemp("server") / "log", "--trust-remote-code") as stock:
        yield stock


@pytest.mark.slow
@pytest.mark.parametrize("name", ["merge and cache", "multipole", "heads", "block causal"])
def test_every_ingredient_is_served(name: str, loader: Stock, model: Path, tmp_path: Path) -> None:
    made = heads(hf.AutoModelForCausalLM.from_pretrained(model), seed=1)
    made.network.float()
    recipe = {
        "merge and cache": qm.Recipe(merge=qm.QuickMerge(keep=0.4), cache=qm.SnapKV(keep=0.5)),
        "multipole": qm.Recipe(attention=qm.Multipole(budget=32, interval=32)),
        "heads": qm.Recipe(merge=qm.QuickMerge(keep=0.4), decoding=made),
        "block causal": qm.Recipe(merge=qm.Merge(qm.QuickMerge(0.5, pool=1), 1, qm.BlockCausal(chunk=32))),
    }[name]
    folder = package(model, recipe, tmp_path / "out", progress=False).folder
    assert chat(loader, folder, said(text(500))) == by_itself(model, said(text(500)), recipe)
    assert chat(loader, model, said(text(500))) == by_itself(model, said(text(500)))


def image(seed: int) -> tuple[Image.Image, str]:
    made = Image.effect_noise((40, 32), 80 + seed).convert("RGB")
    file = io.BytesIO()
    made.save(file, "PNG")
    return made, "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@pytest.mark.slow
def test_images_are_served_with_fewer_visual_tokens(loader: Stock, tmp_path: Path) -> None:
    model = vlm_samples.save(tmp_path / "vlm")
    recipe = qm.Recipe(visual=qm.SCOPE(keep=0.5))
    folder = package(model, recipe, tmp_path / "out", progress=False).folder
    seen, url = image(0)
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "red or blue ?"}]
    before = len(loader.lines())
    found = chat(loader, folder, [{"role": "user", "content": content}], max_tokens=6)
    lm, processor = qm.load_vlm(model)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": seen}, {"type": "text", "text": "red or blue ?"}]}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    with qm.apply(lm, recipe):
        out = lm.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert found == processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "read 25 tokens, kept 17 (68 %) from block 0 on" in loader.after(before)


@pytest.mark.slow
def test_a_killed_server_leaves_a_folder_that_is_served_again(folder: Path, model: Path, tmp_path: Path) -> None:
    port = free_port()
    with serving(tmp_path / "first", folder, "--trust-remote-code", port=port) as stock:
        stream = stock.client.chat.completions.create(
            model=str(folder), messages=said(text(500)), temperature=0, max_tokens=1000, stream=True
        )  # type: ignore[call-overload]
        pieces = iter(stream)
        next(pieces)
        stock.process.send_signal(signal.SIGKILL)
        stock.process.wait(20)
        with pytest.raises(Exception, match=r"peer closed|[Cc]onnection|incomplete"):
            list(pieces)
        with pytest.raises(openai.APIConnectionError):
            chat(stock, folder, said("w1"))
    with serving(tmp_path / "second", folder, "--trust-remote-code", port=port) as stock:
        assert chat(stock, folder, said(text(500))) == by_itself(model, said(text(500)), RECIPE)


@pytest.mark.slow
def test_smollm2_is_served_with_fewer_tokens(smollm2: Any, tmp_path: Path) -> None:
    lm, tokenizer = smollm2
    recipe = qm.Recipe(merge=qm.QuickMerge(keep=0.4))
    folder = package("smollm2-135m", recipe, tmp_path / "out", progress=False).folder
    document = "The harbour master of Sellay counts the boats each evening. The code of the gate is 4711. " * 20
    messages = said(document + "What is the code of the gate?")
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with qm.apply(lm, recipe):
        out = lm.generate(**inputs, max_new_tokens=10, do_sample=False)
    expected = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    with serving(tmp_path / "log", folder, "--trust-remote-code") as stock:
        assert chat(stock, folder, messages, max_tokens=10) == expected
        assert "kept " in stock.after(0)
