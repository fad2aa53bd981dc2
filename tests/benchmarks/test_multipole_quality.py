"""The benchmark of what multipole attention loses: its texts, its arms, its scores, and going on where it was."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import multipole_arms as arms
import multipole_quality as script
import multipole_steps as steps
import multipole_tables as tables
import multipole_texts as texts
import pytest
import torch
from caches import past
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import quickmerge as qm
from quickmerge.bench.harness import Arm
from quickmerge.errors import QuickmergeError

WORDS = 60


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.25, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    rng = torch.Generator().manual_seed(1)
    for kind in ("code", "prose", "technical"):
        (folder / "test" / kind).mkdir(parents=True)
        for number, length in enumerate((700, 150, 500, 650, 800)):
            ids = torch.randint(2, WORDS, (length,), generator=rng).tolist()
            (folder / "test" / kind / f"{number}.txt").write_text(" ".join(f"w{i}" for i in ids))
    return folder


@pytest.fixture
def start(documents, model, tokenizer, tmp_path, monkeypatch) -> Callable[..., int]:
    monkeypatch.setattr(script.qm, "load", lambda name: (model, tokenizer))

    def start(*parts: object, more: tuple[object, ...] = ()) -> int:
        usual = ["--documents", documents, "--out", tmp_path, "--budgets", 0, 16, "--tokens", 420, "--count", 3]
        usual += ["--target", 24, "--filler", 200, "--copies", 2, "--span", 12, "--texts", 1, "--prompt", 2]
        usual += ["--written", 160, "--few", 16]
        monkeypatch.setattr(sys, "argv", ["multipole_quality.py", *map(str, [*parts, *usual, *more])])
        return script.main()

    return start


def read(model: Any, cache: qm.MultipoleCache, inputs: Tensor, arm: Arm) -> Tensor:
    logits = script.read(model, cache, inputs, arm)[0]
    cache.crop(-inputs.shape[1])
    return logits


# The texts ---------------------------------------------------------------------------------------------------------


def test_pieces_begin_with_a_document_and_share_nothing(tokenizer, documents) -> None:
    found = texts.pieces(tokenizer, documents / "test", 600, 7)
    assert [sum(p.kind == kind for p in found) for kind in ("code", "prose", "technical")] == [3, 2, 2]
    used: list[str] = []
    for piece in found:
        names = piece.name.split(" + ")
        whole = " ".join((documents / "test" / piece.kind / f"{name}.txt").read_text() for name in names)
        assert piece.ids.tolist() == [tokenizer(whole, add_special_tokens=False)["input_ids"][:600]]
        used += [f"{piece.kind} {name}" for name in names]
    assert len(used) == len(set(used))
    with pytest.raises(QuickmergeError, match="must hold 2 texts of 2000 tokens, got 1"):
        texts.pieces(tokenizer, documents / "test", 2000, 6)
    with pytest.raises(QuickmergeError, match="holds no documents"):
        texts.pieces(tokenizer, documents / "nowhere", 10, 1)


def test_a_span_comes_once_and_the_other_never(tokenizer, documents) -> None:
    for copy in texts.copied(tokenizer, documents / "test", 200, 12, 3):
        held = copy.context[0].unfold(0, 12, 1)
        assert copy.context.shape == (1, texts.HEAD + 12 + 200)
        assert (held == copy.span).all(-1).nonzero().tolist() == [[texts.HEAD]]
        assert not (held == copy.other).all(-1).any()
        assert not set(copy.span[0].tolist()) & {0, 1}


def test_what_the_model_writes_depends_on_the_seed_alone(model) -> None:
    prompt = torch.arange(2, 30)[None]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, same, other = (texts.written(model, prompt, 20, temperature=1, top_p=0.9, seed=seed) for seed in (3, 3, 4))
    assert one.shape == (1, 20) and torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


# The arms ----------------------------------------------------------------------------------------------------------


def test_arms_meet_where_they_must(model) -> None:
    """Everything read is dense attention; nothing read, and no centroids, is sink and buffer for all of them."""
    ids = torch.randint(2, WORDS, (1, 700), generator=torch.Generator().manual_seed(2))
    cache, _ = script.filled(model, ids[:, :670])
    inputs, usual = ids[:, 670:], qm.Multipole()
    own = read(model, cache, inputs, arms.dense())
    assert torch.allclose(own, model(ids).logits[0, 670:].detach(), atol=1e-4)
    first, last = arms.clustered(670, usual)
    assert (first, last) == (10, 10 + 4 * 128)
    every = [
        arms.clusters("", replace(usual, budget=arms.ALL)),
        arms.clusters("", replace(usual, budget=arms.ALL, space="windowed", replacement=False)),
        arms.labelled("", replace(usual, budget=arms.ALL)),
        arms.window("", last - first, usual),
        arms.best("", last - first, usual),
    ]
    for arm in every:
        assert torch.allclose(read(model, cache, inputs, arm), own, atol=2e-4)
    none = replace(usual, budget=0, replacement=False)
    nothing = [
        read(model, cache, inputs, arms.window("", 0, usual)),
        read(model, cache, inputs, arms.best("", 0, usual)),
    ]
    nothing += [
        read(model, cache, inputs, arms.clusters("", none)),
        read(model, cache, inputs, arms.labelled("", none)),
    ]
    assert not torch.allclose(nothing[0], own, atol=0.1)
    for one in nothing[1:]:
        assert torch.allclose(one, nothing[0], atol=2e-4)
    # and the cache is as it was
    assert cache.get_seq_length() == 670
    assert torch.equal(read(model, cache, inputs, arms.dense()), own)


def test_a_window_reads_as_many_bytes(model) -> None:
    usual = qm.Multipole(budget=16)
    cache, _ = script.filled(model, torch.randint(2, WORDS, (1, 400)))
    key = torch.zeros(1, 2, 404, 8)
    first, last = arms.clustered(400, usual)
    seen = [
        arms.window("", 16, usual, centroids).attach(model, cache).seen(key, key, 1.0) for centroids in (False, True)
    ]
    clusters = usual.clusters(last - first)
    assert [int(s[first:last].sum()) for s in seen] == [16, 16 + clusters]
    assert all(s[:first].all() and s[last - 16 :].all() for s in seen)


def test_the_best_keys_are_those_of_a_literal_search(model) -> None:
    usual = replace(qm.Multipole(), sink=3, interval=8)
    cache, _ = script.filled(model, torch.randint(2, WORDS, (1, 60)))
    rng = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 4, 5, 8, generator=rng), torch.randn(1, 2, 65, 8, generator=rng)
    first, last = arms.clustered(60, usual)
    seen = arms.best("", 4, usual).attach(model, cache).seen(query, key, 0.7)
    for head in range(2):
        for q in range(5):
            share = torch.zeros(65, dtype=torch.float64)
            for own in (2 * head, 2 * head + 1):
                z = [0.7 * float(query[0, own, q].double() @ key[0, head, n].double()) for n in range(60 + q + 1)]
                top = max(z)
                weights = torch.tensor([z_ - top for z_ in z], dtype=torch.float64).exp()
                share[: len(z)] += weights / weights.sum()
            best = set(share[first:last].topk(4).indices.add(first).tolist())
            for own in (2 * head, 2 * head + 1):
                assert set(seen[0, own, q, first:last].nonzero()[:, 0].add(first).tolist()) == best


def test_runs_of_keys_are_runs(model) -> None:
    usual = qm.Multipole(budget=16)
    cache, _ = script.filled(model, torch.randint(2, WORDS, (1, 400)))
    arms.labelled("", usual).attach(model, cache)
    clusters = cache.layers[1].clusters
    labels = clusters.labels[0, 0]
    assert (labels.diff() >= 0).all() and set(clusters.members.flatten().tolist()) == {16}
    first = int(clusters.start[0])
    assert torch.allclose(clusters.key[0, 1, 2], cache.layers[1].keys[0, 1, first + 32 : first + 48].mean(0), atol=1e-5)


# The scores --------------------------------------------------------------------------------------------------------


def test_scores_equal_their_definitions() -> None:
    rng = torch.Generator().manual_seed(3)
    logits, own, wanted = torch.randn(7, 11, generator=rng), torch.randn(7, 11, generator=rng), torch.arange(7)
    p, q = own.double().softmax(-1), logits.double().softmax(-1)
    found = script.scores(logits, own, wanted)
    assert found["kl"] == pytest.approx(float((p * (p / q).log()).sum() / 7), abs=1e-6)
    assert found["nll"] == pytest.approx(-sum(float(q[i, i].log()) for i in range(7)) / 7, abs=1e-6)
    assert found["agreement"] == pytest.approx(sum(int(p[i].argmax() == q[i].argmax()) for i in range(7)) / 7)
    assert found["right"] == pytest.approx(sum(int(q[i].argmax() == i) for i in range(7)) / 7)


def test_rows_are_means_over_documents() -> None:
    about = {"name": "multipole", "budget": 64, "settings": {}, "length": 5}
    rows = script.rows_of(
        [{**about, "nll": 1.0, "kept": 3.0}, {**about, "nll": 2.0, "kept": None}, {**about, "budget": 0, "nll": 7.0}]
    )
    assert [(row["budget"], row["documents"], row["nll"]) for row in rows] == [(64, 2, 1.5), (0, 1, 7.0)]
    assert rows[0]["nll_sd"] == pytest.approx(0.5**0.5) and rows[0]["kept"] == 3 and rows[1]["nll_sd"] == 0


# Generation --------------------------------------------------------------------------------------------------------


def test_reading_in_steps_shows_each_token_what_generating_it_would(model) -> None:
    """The claim that the part on generation stands on, for updated clusters."""
    usual = qm.Multipole(budget=16)
    ids = torch.randint(2, WORDS, (1, usual.sink + 2 * 128 + 200), generator=torch.Generator().manual_seed(4))
    prompt, text = ids[:, : usual.sink + 2 * 128], ids[:, usual.sink + 2 * 128 :]
    cache, _ = script.filled(model, prompt)
    at_once = [script.read(model, cache, part, arms.clusters("", usual))[0] for part in text.split(128, 1)]
    cache, _ = script.filled(model, prompt)
    with torch.inference_mode(), qm.multipole(model, usual) as run:
        alone = [model(token, **past(cache), use_cache=True).logits[0] for token in text.split(1, 1)]
    assert run.summary().updates == pytest.approx(1)
    assert torch.allclose(torch.cat(at_once), torch.cat(alone), atol=2e-4)
    assert not torch.allclose(torch.cat(alone), model(ids).logits[0, -200:], atol=0.05)


def test_tokens_join_the_nearest_old_cluster(model) -> None:
    settings = qm.Multipole(budget=16, update=False)
    ids = torch.randint(2, WORDS, (1, 10 + 4 * 128), generator=torch.Generator().manual_seed(6))
    cache, _ = script.filled(model, ids[:, : 10 + 2 * 128])
    script.read(model, cache, ids[:, 10 + 2 * 128 :][:, :128], arms.clusters("", settings))
    old = [layer.clusters for layer in cache.layers]
    steps.join_old(cache, settings)
    for layer, before in zip(cache.layers, old, strict=True):
        now = layer.clusters
        assert int(before.end[0]) == 10 + 128 and int(now.end[0]) == 10 + 2 * 128 and len(now) == len(before)
        assert torch.equal(now.labels[..., :128], before.labels)
        for head in range(2):
            for j in range(128):
                far = (before.key[0, head].double() - layer.keys[0, head, 138 + j].double()).square().sum(-1)
                assert far[now.labels[0, head, 128 + j]] <= far.min() + 1e-6
    again = cache.layers[0].clusters
    steps.join_old(cache, settings)
    assert cache.layers[0].clusters is again


def test_generation_compares_what_it_says(model, tokenizer, documents) -> None:
    piece = texts.pieces(tokenizer, documents / "test", 10 + 2 * 128, 1)[0]
    records = script.generation_records(model, piece, Namespace(prompt=2, written=320, few=[16]))
    names = ["dense", "updated", "clustered anew", "joined to old clusters", "never clustered"]
    assert [r["name"] for r in records] == [name for name in names for _ in range(4)]
    assert [r["quarter"] for r in records] == [1, 2, 3, 4] * 5
    assert all(r["kl"] == pytest.approx(0, abs=1e-5) and r["extra"] == 0 for r in records[:4])
    by_name = {name: [r for r in records if r["name"] == name] for name in names}
    # the first 128 tokens see the same clusters of the prompt
    assert len({round(by_name[name][0]["kl"], 5) for name in names[1:]}) == 1
    assert len({round(by_name[name][3]["kl"], 7) for name in names[1:]}) == 4
    assert [by_name[name][0]["buffer"] for name in names[1:4]] == [2 * 128] * 3
    # nothing joins: all that was written, but the last token, and the 128 tokens in front of it
    assert by_name["never clustered"][0]["buffer"] == 128 + 319


# The script --------------------------------------------------------------------------------------------------------


def test_a_run_that_was_broken_off_goes_on(start, tmp_path, monkeypatch) -> None:
    real, done = script.context_records, []

    def counted(model: Any, piece: Any, *rest: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(piece.kind)
        return real(model, piece, *rest)

    monkeypatch.setattr(script, "context_records", counted)
    with pytest.raises(KeyboardInterrupt):
        start("context")
    assert not (tmp_path / "multipole_context.json").exists()
    done.clear()
    assert start("context") == 0 and done == ["technical"]
    broken = json.loads((tmp_path / "multipole_context.json").read_text())
    monkeypatch.setattr(script, "context_records", real)
    assert start("context") == 0
    unbroken = json.loads((tmp_path / "multipole_context.json").read_text())
    assert broken["rows"] == unbroken["rows"] and not list(tmp_path.glob("*.partial.jsonl"))
    assert {row["documents"] for row in unbroken["rows"]} == {3} and unbroken["environment"]["torch"]
    rows = {(row["name"], row["budget"], str(row["settings"])): row for row in unbroken["rows"]}
    assert len(rows) == len(unbroken["rows"]) == len(arms.context_arms((0, 16)))
    assert rows["multipole", None, "{}"]["kl"] == pytest.approx(0, abs=1e-5)
    assert 0 < rows["multipole", 16, "{}"]["kl"] < rows["sparse", 0, "{}"]["kl"]
    assert 0 < rows["multipole", 16, "{}"]["kept"] <= 16
    # the tables are made of just these
    for make in (tables.context, tables.variants):
        table = make(unbroken["rows"])
        assert table.body
    assert [row[0] for row in tables.context(unbroken["rows"]).body[:3]] == ["multipole"] * 3


def test_retrieval_and_generation_write_their_tables(start, tmp_path) -> None:
    assert start("retrieval", "generation") == 0
    found = json.loads((tmp_path / "multipole_retrieval.json").read_text())
    assert {row["name"] for row in found["rows"]} >= {
        "dense",
        "dense, another span",
        "multipole",
        "window",
        "best keys",
    }
    table = tables.retrieval(found["rows"])
    assert len(table.body) == len(found["rows"]) and len(table.headers) == 3
    found = json.loads((tmp_path / "multipole_generation.json").read_text())
    table = tables.generation(found["rows"])
    assert [row[0] for row in table.body] == ["updated", "clustered anew", "joined to old clusters", "never clustered"]


def test_what_is_wrong_is_told_in_one_sentence(start, tmp_path, capsys) -> None:
    assert start("context", more=("--split", "dev")) == 2
    assert "holds no documents" in capsys.readouterr().err
    for part, more in (("speed", ()), ("context", ("--tokens", 500, 600))):
        with pytest.raises(SystemExit):
            start(part, more=more)
        assert "must be" in capsys.readouterr().err
