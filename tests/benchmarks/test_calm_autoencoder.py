"""The benchmark of autoencoders counts tokens and chunks as one would by hand, and its tables are made of its file."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import calm_autoencoder as script
import calm_autoencoder_smollm2 as recipe
import calm_tables
import pytest
import torch
from calm_bench_samples import save, texts, words
from documents import MANIFEST

from quickmerge.calm import CalmAutoencoder, CalmAutoencoderConfig
from quickmerge.calm.evaluate import autoencoder_scores
from quickmerge.calm.texts import document_chunks

CHUNKS = 5


def tiny(patch: int, seed: int = 0) -> CalmAutoencoder:
    torch.manual_seed(seed)
    model = CalmAutoencoder(CalmAutoencoderConfig(vocab_size=25, patch=patch, latent=12, width=16, eos_token_id=0))
    recipe.mirror(model)  # so that some tokens are found again
    return model.eval()


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    made = {name: save(tiny(patch), tmp_path / name) for name, patch in (("k4", 4), ("k2", 2))}
    for folder in made.values():
        lines = [{"step": 1, "items": 4, "seconds": 0.5}, {"step": 9, "items": 36, "seconds": 4.0}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return made


@pytest.fixture
def documents(tmp_path: Path) -> dict[str, str]:
    folder, entries, found = tmp_path / "documents", [], {}
    for number, (kind, length) in enumerate((("prose", 40), ("code", 9), ("code", 30))):
        text, split = texts(1, length)[0], "test"
        file = f"{split}/{kind}/{number}.txt"
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
        entries.append({"file": file, "split": split, "sha256": hashlib.sha256(text.encode()).hexdigest()})
        found[file] = text
    (folder / MANIFEST).write_text(json.dumps({"complete": True, "documents": entries}))
    return found


@pytest.fixture
def start(tmp_path: Path, folders: dict[str, Path], documents: dict[str, str], monkeypatch) -> Callable[..., int]:
    def start(*more: object) -> int:
        named = ",".join(f"{name}={folder}" for name, folder in folders.items())
        given = ["--models", named, "--documents", tmp_path / "documents", "--chunks", CHUNKS, "--out", tmp_path / "r"]
        monkeypatch.setattr(sys, "argv", ["calm_autoencoder.py", *map(str, given), *map(str, more)])
        return script.main()

    return start


def test_rows_are_what_counting_gives(start, documents, tmp_path: Path) -> None:
    assert start() == 0
    told = json.loads((tmp_path / "r").read_text())
    rows = {r["method"]: r for r in told["rows"]}
    assert list(rows) == ["k4", "k2"] and told["meta"]["chunks"] == CHUNKS
    for name, patch in (("k4", 4), ("k2", 2)):
        row, model = rows[name], tiny(patch)
        right = tokens = whole = chunks = 0
        with torch.no_grad():
            for text in documents.values():
                part = document_chunks(words(), [text], patch)[:CHUNKS]
                got = model.decode(model.encode(part)[0]).argmax(-1)
                there = part != 24
                hits = ((got == part) & there).sum().item()
                right, tokens = right + hits, tokens + there.sum().item()
                whole, chunks = whole + ((got == part) | ~there).all(-1).sum().item(), chunks + len(part)
        assert (row["tokens"], row["chunks"]) == (tokens, chunks)
        assert row["accuracy_0"] == pytest.approx(right / tokens) and 0.1 < row["accuracy_0"] < 1
        assert row["chunk_accuracy_0"] == pytest.approx(whole / chunks)
        assert row["accuracy_0_low"] <= row["accuracy_0"] <= row["accuracy_0_high"]
        every = torch.cat([document_chunks(words(), [text], patch)[:CHUNKS] for text in documents.values()])
        scores = autoencoder_scores(model, every, sigmas=())
        assert (row["active"], row["kl"]) == (scores.active, pytest.approx(scores.kl))
        assert row["train_tokens"] == 36 * 16 * patch and row["vocabulary"] == 24
        assert row["parameters"] - row["parameters_inside"] == 25 * 16


def test_what_was_measured_is_not_measured_again(start, folders, documents, tmp_path: Path, monkeypatch) -> None:
    assert start() == 0
    first = json.loads((tmp_path / "r").read_text())["rows"]
    asked: list[int] = []
    real = script.autoencoder_scores

    def counted(model: CalmAutoencoder, *rest: object, **more: object) -> object:
        asked.append(model.config.patch)
        return real(model, *rest, **more)

    monkeypatch.setattr(script, "autoencoder_scores", counted)
    save(tiny(2, seed=1), folders["k2"])
    assert start() == 0
    again = json.loads((tmp_path / "r").read_text())["rows"]
    assert set(asked) == {2} and again[0] == first[0] and again[1]["kl"] != first[1]["kl"]
    asked.clear()
    assert start("--chunks", CHUNKS - 1) == 0
    assert set(asked) == {2, 4}, "other chunks of the documents"


def test_tables_and_what_is_missing(start, folders, tmp_path: Path, capsys) -> None:
    assert start() == 0
    rows = json.loads((tmp_path / "r").read_text())["rows"]
    for name in ("calm_autoencoder", "calm_autoencoder_noise"):
        result, make, key = calm_tables.CALM[name]
        table = make(rows)
        assert (result, key) == ("calm_autoencoder", "rows") and table.body
    assert len(calm_tables.autoencoder_noise(rows).headers) == 3 + 2 * 3, "tokens and chunks for each noise"
    assert calm_tables.autoencoders([{**rows[0], "posterior_accuracy": 0.99999}]).body[0][-1] == "99.99 %"
    (tmp_path / "r").unlink()
    for wrong, message in (
        (("--chunks", 0), "--chunks must be a whole number of at least 1"),
        (("--documents", tmp_path / "none"), "run benchmarks/documents.py first"),
        (("--models", f"a={tmp_path}/none"), "there is no autoencoder in"),
    ):
        assert start(*wrong) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    (folders["k2"] / "metrics.jsonl").unlink()
    assert start() == 2
    assert "must say how much an autoencoder was trained" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "r").exists()


def test_the_recipe_of_a_large_vocabulary_shows_any_token_and_no_pad() -> None:
    documents = texts(3, 50)
    plain = recipe.MixedTexts(words(), documents, 4, 4, phase=1)
    mixed = recipe.MixedTexts(words(), documents, 4, 4, phase=1)
    mixed.share = 0.5
    assert plain.fingerprint() != mixed.fingerprint()
    torch.manual_seed(0)
    before, after = (torch.stack([data[i] for i in range(len(data))]) for data in (plain, mixed))
    pads = before == plain.pad
    assert bool(pads.any()) and bool((after[pads] == plain.pad).all()) and bool((after[~pads] < plain.pad).all())
    changed = (after != before)[~pads].double().mean()
    assert 0.35 < float(changed) < 0.6, "half of them, less those that are drawn as what they were"


def test_the_recipe_begins_as_a_code_and_its_mirror_image() -> None:
    torch.manual_seed(0)
    model = CalmAutoencoder(CalmAutoencoderConfig(vocab_size=200, patch=2, latent=48, width=64)).eval()
    chunks = torch.randint(199, (300, 2))

    def found() -> float:
        with torch.no_grad():
            return float((model.decode(model.encode(chunks)[0]).argmax(-1) == chunks).double().mean())

    assert found() < 0.05
    recipe.mirror(model)
    assert found() > 0.5
    squeeze, expand = model.encoder.squeeze.weight, model.decoder.expand.weight
    torch.testing.assert_close(squeeze @ expand, torch.eye(64), atol=1e-5, rtol=0)
    assert bool((model.encode(chunks)[1] == recipe.LOG_STD).all())
