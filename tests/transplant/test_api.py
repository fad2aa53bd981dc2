"""The whole of it, on tiny models of several families."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizer_samples import SENTENCES, byte_level, sentencepiece_bpe, wordpiece
from transformers import AutoTokenizer
from transplant_samples import FAMILIES, config_of, model_folder, same_bits, tensors, tokenizer_folder

from quickmerge.errors import QuickmergeError
from quickmerge.models import load
from quickmerge.transplant.api import transplant
from quickmerge.transplant.choose_by_text import spread
from quickmerge.transplant.matching import match
from quickmerge.transplant.matching_pursuit import omp
from quickmerge.transplant.quality import score_texts
from quickmerge.transplant.rows import KINDS
from quickmerge.transplant.tokens import read_vocabulary

module = sys.modules["quickmerge.transplant.api"]
ENDS = {"neox": "embed_out.weight", "llama": "lm_head.weight", "phi": "lm_head.weight"}
STARTS = {"neox": "gpt_neox.embed_in.weight", "gpt2": "transformer.wte.weight"}


@pytest.fixture(autouse=True)
def few_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole report on digits, on fewer of them: it has tests of its own."""
    monkeypatch.setattr(module, "digit_report", partial(module.digit_report, numbers=[7, 12, 345, 2024]))


@pytest.fixture
def llama2(tmp_path: Path) -> Path:
    return tokenizer_folder(tmp_path / "llama2")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_own_tokenizer_changes_nothing_and_the_way_back_is_exact(
    family: str, tmp_path: Path, llama2: Path
) -> None:
    # more rows than tokens, as in many released models
    base = model_folder(tmp_path / "base", family, rows=448, dtype=torch.bfloat16, shard="20KB")
    report = transplant(base, None, base, tmp_path / "same", method="mean")
    old = tensors(base)
    assert report.identical and report.rows == 448 and config_of(tmp_path / "same") == config_of(base)
    assert tensors(tmp_path / "same").keys() == old.keys()
    assert all(same_bits(value, old[name]) for name, value in tensors(tmp_path / "same").items())

    report = transplant(base, None, llama2, tmp_path / "there", method="subword-mean", vocab_size=600)
    assert not report.identical and report.counts["rebuilt"] > 50 and report.counts["padding"] == 600 - 520
    assert config_of(tmp_path / "there")["vocab_size"] == 600
    report = transplant(tmp_path / "there", None, base, tmp_path / "back", method="mean")
    assert report.way_back and report.rows == 448 and not report.counts["rebuilt"]
    assert config_of(tmp_path / "back") == config_of(base)
    assert config_of(tmp_path / "back", "generation_config.json") == config_of(base, "generation_config.json")
    new = tensors(tmp_path / "back")
    assert new.keys() == old.keys() and all(same_bits(new[name], old[name]) for name in old)


@pytest.mark.parametrize("family", ["llama", "neox", "gpt2", "phi"])
def test_rows_are_copied_by_bytes_and_the_result_runs(family: str, tmp_path: Path, llama2: Path) -> None:
    base = model_folder(tmp_path / "base", family)
    out = tmp_path / "out"
    report = transplant(base, None, llama2, out, method="auto")
    old, new = tensors(base), tensors(out)
    theirs, ours = read_vocabulary(sentencepiece_bpe(520)), read_vocabulary(byte_level(420))
    matching = match(theirs, ours)
    names = [
        STARTS.get(family, "model.embed_tokens.weight"),
        ENDS.get(family),
        "lm_head.bias" if family == "phi" else None,
    ]
    kinds = np.array([KINDS[kind] for kind in report.kinds])
    for name in filter(None, names):
        for own, base_id in matching.shared.tolist():
            if kinds[own] == "copied":
                assert same_bits(new[name][own], old[name][base_id])
        used = new[name][np.isin(kinds, ["copied", "special", "rebuilt"])]
        idle = new[name][np.isin(kinds, ["alias", "unmapped"])]
        torch.testing.assert_close(idle, used.mean(0).expand(len(idle), *used.shape[1:]))
        assert torch.isfinite(new[name]).all()
    assert all(same_bits(new[name], old[name]) for name in old if name not in names)
    # the end of a text is still the end
    assert config_of(out)["eos_token_id"] == theirs.roles["eos"] and config_of(out)["vocab_size"] == 520
    assert report.special["</s>"] == ("<|endoftext|>",) and "<s>" in report.unmapped
    assert set(report.matrices) == ({"input", "output"} if family in ENDS else {"input"})
    model, tokenizer = load(out, progress=False)
    text = SENTENCES[0]
    assert tokenizer(text)["input_ids"] == sentencepiece_bpe(520)(text)["input_ids"]
    answer = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert not set(answer[0, -5:].tolist()) & set(np.flatnonzero(np.isin(kinds, ["alias", "padding", "unmapped"])))


def test_texts_of_shared_tokens_read_as_before(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base")
    grown = byte_level(440)  # the same merges, and some more
    transplant(base, None, tokenizer_folder(tmp_path / "t", grown), tmp_path / "out", method="mean")
    (before, old), (after, new) = load(base, progress=False), load(tmp_path / "out", progress=False)
    one, other = old("(so) the cat", return_tensors="pt"), new("(so) the cat", return_tensors="pt")
    assert torch.equal(one["input_ids"], other["input_ids"])
    with torch.inference_mode():
        assert torch.equal(before.model(**one).last_hidden_state, after.model(**other).last_hidden_state)


def vectors_for(rows: int, width: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("untied", [True, False])
def test_each_matrix_has_coefficients_of_its_own(untied: bool, tmp_path: Path, llama2: Path) -> None:
    base = model_folder(tmp_path / "base", "llama")
    donor = model_folder(
        tmp_path / "donor", "llama" if untied else "llama tied", tokenizer=sentencepiece_bpe(520), seed=5
    )
    report = transplant(base, donor, None, tmp_path / "out", method="omp-raw", k=4)
    assert report.matrices["input"]["rule"] == "omp k=4 inner uncentred uncorrected"
    old, new, lent = tensors(base), tensors(tmp_path / "out"), tensors(donor)
    kinds = np.array([KINDS[kind] for kind in report.kinds])
    with safe_open(tmp_path / "out" / "transplant" / "rows.safetensors", framework="np") as file:
        origin = file.get_tensor("origin")
    shared = np.flatnonzero(kinds == "copied")
    fresh = np.flatnonzero(kinds == "rebuilt")
    for name, source in (
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("lm_head.weight", "lm_head.weight" if untied else "model.embed_tokens.weight"),
    ):
        sparse = omp(lent[source][fresh], lent[source][shared], 4)
        expected = torch.einsum("tk,tkd->td", sparse.weights, old[name][origin[shared]][sparse.indices])
        torch.testing.assert_close(new[name][fresh], expected, rtol=1e-4, atol=1e-5)


def test_auto_finds_what_carries_over(tmp_path: Path, llama2: Path) -> None:
    """A donor whose vectors are a rotation of the rows that the base would have: rules from vectors win by far."""
    base = model_folder(tmp_path / "base", "llama tied", rows=420)
    matching = match(read_vocabulary(sentencepiece_bpe(520)), read_vocabulary(byte_level(420)))
    torch.manual_seed(3)
    truth = torch.randn(520, 32) * 0.05
    rows = tensors(base)["model.embed_tokens.weight"]
    truth[matching.shared[:, 0]] = rows[matching.shared[:, 1]]
    rotation = torch.linalg.qr(torch.randn(32, 32))[0]
    save_file({"vectors": truth @ rotation}, tmp_path / "vectors.safetensors")
    report = transplant(base, tmp_path / "vectors.safetensors", llama2, tmp_path / "out", choose_by="held-out")
    assert report.matrices["input"]["decision"] is None
    table = {row["rule"]: row for row in report.matrices["input"]["table"]}
    assert table[report.matrices["input"]["rule"]]["best"] and sum(row["best"] for row in table.values()) == 1
    assert table[report.matrices["input"]["rule"]]["centred_cosine"] > 0.9 > table["subword mean"]["centred_cosine"]
    made = np.flatnonzero([KINDS[kind] == "rebuilt" for kind in report.kinds])
    new = tensors(tmp_path / "out")["model.embed_tokens.weight"]
    assert torch.cosine_similarity(new[made], truth[made], dim=-1).mean() > 0.9
    again = transplant(base, tmp_path / "vectors.safetensors", llama2, tmp_path / "again", choose_by="held-out")
    assert again.as_dict() == {**report.as_dict(), "out": str(tmp_path / "again")}
    assert same_bits(tensors(tmp_path / "again")["model.embed_tokens.weight"], new)


@pytest.mark.parametrize("family", ["llama tied", "llama", "phi"])
def test_a_text_decides_kind_by_kind(family: str, tmp_path: Path, llama2: Path) -> None:
    base = model_folder(tmp_path / "base", family)
    old = tensors(base)
    texts = [" ".join(SENTENCES)] * 4
    report = transplant(base, None, llama2, tmp_path / "out", choose_on=texts)
    for made in report.matrices.values():
        decision = made["decision"]
        alone = [one["bits_per_byte"] for one in decision["tried"] if one["kind"] is None]
        assert len(alone) == 6 and decision["bytes"] > 1000  # no vectors: pieces in five ways, and the mean
        assert set(decision["rules"].values()) <= set(decision["candidates"].values())
        assert sum(decision["new_tokens"].values()) > 20
        assert decision["bits_per_byte"] == pytest.approx(
            min(o["bits_per_byte"] for o in decision["tried"] if o["kept"])
        )
    # what was written costs what the decision says: each passage read alone
    model, tokenizer = load(tmp_path / "out", progress=False)
    found = [score_texts(model, tokenizer, [part]) for part in spread(texts)]
    per_byte = sum(one.bits for one in found) / sum(one.bytes for one in found)
    assert per_byte == pytest.approx(decision["bits_per_byte"], rel=1e-4)
    assert json.loads((tmp_path / "out" / "transplant.json").read_text())["matrices"]["input"]["decision"] == decision
    again = transplant(base, None, llama2, tmp_path / "again", choose_on=texts)
    assert again.as_dict() == {**report.as_dict(), "out": str(tmp_path / "again")}
    assert all(same_bits(value, old[name]) for name, value in tensors(base).items())


def test_what_lacks_a_vector_is_counted_of_the_rules_that_were_taken(tmp_path: Path, llama2: Path) -> None:
    """Hidden tokens choose vectors for all, and the text for some kinds at most."""
    base = model_folder(tmp_path / "base", "llama tied", rows=420)
    matching = match(read_vocabulary(sentencepiece_bpe(520)), read_vocabulary(byte_level(420)))
    vectors = torch.zeros(520, 32)
    vectors[matching.shared[:, 0]] = tensors(base)["model.embed_tokens.weight"][matching.shared[:, 1]]
    save_file({"v": vectors}, tmp_path / "v.safetensors")  # no new token has one
    reports = [
        transplant(base, tmp_path / "v.safetensors", llama2, tmp_path / choose_by, choose_by=choose_by)
        for choose_by in ("held-out", "text")
    ]
    hidden, text = (report.matrices["input"] for report in reports)
    assert hidden["without_vector"] == reports[0].counts["rebuilt"] > 50
    fresh = np.flatnonzero([KINDS[kind] == "rebuilt" for kind in reports[1].kinds])
    by_vectors = {kind for kind, name in text["decision"]["chosen"].items() if name == "vectors"}
    assert text["without_vector"] == sum(matching.kinds[int(one)] in by_vectors for one in fresh)
    assert text["without_vector"] < hidden["without_vector"] and text["mean_row"] == 0


def test_vectors_can_be_made_from_text(tmp_path: Path, llama2: Path) -> None:
    base = model_folder(tmp_path / "base")
    report = transplant(base, None, llama2, tmp_path / "out", method="nearest", k=8, text=[" ".join(SENTENCES)] * 3)
    made = report.matrices["input"]
    assert made["rule"].startswith("nearest") and made["without_vector"] > 0
    assert len({json.dumps(row["rule"]) for row in made["table"]}) == len(made["table"]) > 2


def test_tokens_without_a_vector_are_made_of_their_pieces(tmp_path: Path, llama2: Path) -> None:
    base = model_folder(tmp_path / "base", "llama tied")
    vectors = vectors_for(520)
    vocabulary = read_vocabulary(sentencepiece_bpe(520))
    plain = transplant(base, None, llama2, tmp_path / "plain", method="subword-mean")
    fresh = np.flatnonzero([KINDS[kind] == "rebuilt" for kind in plain.kinds])
    vectors[fresh[::2]] = 0
    save_file({"v": vectors}, tmp_path / "v.safetensors")
    report = transplant(base, tmp_path / "v.safetensors", llama2, tmp_path / "out", method="omp", k=4)
    assert report.matrices["input"]["without_vector"] == len(fresh[::2]) and vocabulary.size == 520
    name = "model.embed_tokens.weight"
    mean, mixed = tensors(tmp_path / "plain")[name], tensors(tmp_path / "out")[name]
    assert torch.equal(mean[fresh[::2]], mixed[fresh[::2]]) and not torch.equal(mean[fresh[1::2]], mixed[fresh[1::2]])


def test_long_rows_can_be_cut(tmp_path: Path, llama2: Path) -> None:
    base = model_folder(tmp_path / "base", "llama tied")
    vectors = vectors_for(520)
    fresh = match(read_vocabulary(sentencepiece_bpe(520)), read_vocabulary(byte_level(420))).new
    vectors[fresh] *= 50  # loud in the base
    save_file({"v": vectors}, tmp_path / "v.safetensors")
    settings: dict[str, Any] = {"method": "omp-raw", "k": 4}
    loud = transplant(base, tmp_path / "v.safetensors", llama2, tmp_path / "loud", **settings)
    norms = loud.matrices["input"]["norms"]
    assert norms["long"] > len(fresh) / 2 and len(norms["longest_tokens"]) == 10
    cut = transplant(base, tmp_path / "v.safetensors", llama2, tmp_path / "cut", clip=0.99, **settings)
    assert cut.matrices["input"]["clipped"] == norms["long"]
    assert cut.matrices["input"]["norms"]["longest"] < 3 < norms["longest"]


def test_the_manifest_says_what_was_done(tmp_path: Path, llama2: Path) -> None:
    base = model_folder(tmp_path / "base")
    out = tmp_path / "out"
    report = transplant(
        base, None, llama2, out, special={"<s>": "<|endoftext|>", "<unk>": "the cat"}, pad_to_multiple_of=64
    )
    data = json.loads((out / "transplant.json").read_text())
    assert data["rows"] == 576 and data["counts"] == report.counts and data["method"]["name"] == "auto"
    assert sum(data["counts"].values()) == 576 and data["base"]["rows"] == 420
    assert set(data["files"]) == {
        "model.safetensors",
        "transplant/rows.safetensors",
        "transplant/dropped_rows.safetensors",
    }
    assert len(data["special"]["0"]) > 1 and data["unmapped"] == {} and report.special["<s>"] == ("<|endoftext|>",)
    assert data["matrices"]["input"]["table"] and data["dropped"] > 0
    with safe_open(out / "transplant" / "rows.safetensors", framework="np") as file:
        assert np.array_equal(file.get_tensor("kind"), report.kinds)
    # several base tokens: their mean is read, the first is predicted
    ids = data["special"]["0"]
    old, new = tensors(base), tensors(out)
    assert torch.equal(new["lm_head.weight"][0], old["lm_head.weight"][ids[0]])
    rows = old["model.embed_tokens.weight"][ids]
    direction = torch.nn.functional.normalize(rows.mean(0), dim=0)
    torch.testing.assert_close(new["model.embed_tokens.weight"][0], direction * rows.norm(dim=-1).mean())
    transplant(base, None, llama2, tmp_path / "short", method="mean", keep_dropped=False)
    assert not (tmp_path / "short" / "transplant" / "dropped_rows.safetensors").exists()


def test_a_dry_run_writes_nothing(tmp_path: Path, llama2: Path) -> None:
    base = model_folder(tmp_path / "base")
    before = sorted(path.name for path in tmp_path.iterdir())
    report = transplant(base, None, llama2, tmp_path / "new" / "out", dry_run=True)
    assert report.out is None and report.matrices["output"]["table"]
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_tokenizer_is_opened_as_what_it_is_whatever_the_model(tmp_path: Path, llama2: Path) -> None:
    """For Qwen2 transformers insists on a class that would cut a SentencePiece vocabulary as if it was its own."""
    base = model_folder(tmp_path / "base", "qwen2")
    transplant(base, None, llama2, tmp_path / "out", method="mean")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (*SENTENCES, "  12  ", "猫🦊"):
        assert again(text)["input_ids"] == sentencepiece_bpe(520)(text)["input_ids"]


def test_templates_follow_their_markers(tmp_path: Path) -> None:
    import copy

    ours = copy.deepcopy(byte_level(420, ("<|endoftext|>", "<|im_start|>", "<|im_end|>")))
    ours.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    base = model_folder(tmp_path / "base", tokenizer=ours)
    theirs = copy.deepcopy(byte_level(400, ("<|endoftext|>",)))
    theirs.chat_template = "{{ messages[0].content }}"
    report = transplant(base, None, tokenizer_folder(tmp_path / "t", theirs), tmp_path / "out", method="mean")
    assert report.template[0] == "tokenizer"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == theirs.chat_template
    kin = copy.deepcopy(byte_level(400, ("<|im_end|>", "<|im_start|>", "<|endoftext|>")))
    report = transplant(base, None, tokenizer_folder(tmp_path / "k", kin), tmp_path / "kept", method="mean")
    assert report.template[0] == "base"
    assert AutoTokenizer.from_pretrained(tmp_path / "kept").chat_template == ours.chat_template


def test_what_can_not_be_done_is_told(tmp_path: Path, llama2: Path) -> None:
    base, out = model_folder(tmp_path / "base"), tmp_path / "out"
    save_file({"v": vectors_for(300)}, tmp_path / "few.safetensors")
    save_file({"v": vectors_for(520)}, tmp_path / "v.safetensors")
    few, fit = tmp_path / "few.safetensors", tmp_path / "v.safetensors"
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        (
            (base, few, llama2, out),
            {},
            r"a vector for each token of the tokenizer, got 300 vectors .* tokens beyond them",
        ),
        (
            (base, None, llama2, out),
            {"choose_by": "held-in"},
            r"choose_by must be one of text, held-out, got 'held-in' \(did",
        ),
        ((base, None, llama2, out), {"choose_on": []}, "choose_on must hold a text, got none"),
        ((base, None, llama2, out), {"method": "mean", "choose_on": ["a"]}, "choose_on belongs to method auto with"),
        ((base, fit, llama2, out), {"method": "omp", "k": 400}, r"k must be at most \d+, the shared tokens .* got 400"),
        ((base, None, llama2, out), {"method": "omp"}, "method omp needs vectors of the new tokens"),
        ((base, None, llama2, out), {"method": "ompp"}, r"method is 'ompp' \(did you mean 'omp'\?\)"),
        ((base, None, llama2, out), {"method": "mean", "k": 3}, "k belongs to auto, omp"),
        ((base, None, None, out), {}, "give tokenizer, or a donor that has one"),
        ((base, None, llama2, base), {}, "out must be another folder"),
        ((base, None, llama2, llama2), {}, "out must be another folder"),
        ((base, None, llama2, out), {"clip": 1.5}, "clip must be a quantile of at least 0.5 and below 1, got 1.5"),
        ((base, None, llama2, out), {"vocab_size": 10}, "vocab_size must be at least 520"),
        ((base, None, llama2, out), {"special": {"<x>": "a"}}, "special names '<x>'"),
        ((base, None, tmp_path / "nowhere", out), {}, "nowhere"),
        ((base, None, base, out), {"special": {"<|endoftext|>": "a"}}, "special has no meaning where the tokenizer is"),
    ]
    for arguments, settings, message in cases:
        with pytest.raises(QuickmergeError, match=message) as caught:
            transplant(*arguments, **settings)
        assert "\n" not in str(caught.value)
        assert not out.exists()


def test_a_wordpiece_vocabulary_can_be_taken_too(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", "llama tied")
    report = transplant(base, None, tokenizer_folder(tmp_path / "bert", wordpiece()), tmp_path / "out")
    model, tokenizer = load(tmp_path / "out", progress=False)
    assert report.counts["copied"] > 30 and tokenizer("the cat")["input_ids"] == wordpiece()("the cat")["input_ids"]
    assert model.config.vocab_size == len(wordpiece()) and torch.isfinite(model.get_input_embeddings().weight).all()
