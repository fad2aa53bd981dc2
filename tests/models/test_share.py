"""Things go to the hub and come back as they were, by the hub's own client; what is wrong there is one sentence.

The hub is a stand-in on loopback that only stores files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_samples import MAKE, OPEN, push, same
from hub_server import Hub, hub_at

import quickmerge as qm
from quickmerge.calm import load_calm
from quickmerge.errors import DamagedWeightsError, FetchError, QuickmergeError, UnknownModelError
from quickmerge.models.kinds import KINDS, belongs, folder_files, kind_of


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_at(monkeypatch, str(tmp_path / "cache")) as hub:
        yield hub


def saved(kind: str, folder: Path) -> Any:
    thing = MAKE[kind]()
    thing.save_pretrained(folder)
    return thing


def meta(hub: Hub, name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card(hub, name).split("---\n")[1])
    return found


def card(hub: Hub, name: str) -> str:
    return hub.files(name)["README.md"].decode()


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_back_is_what_was_sent(kind: str, hub: Hub, tmp_path: Path) -> None:
    thing = MAKE[kind]()
    address = push(kind, thing, "ann/thing")
    assert address.startswith(f"{hub.url}/ann/thing/commit/")
    assert same(OPEN[kind]("ann/thing"), thing)
    folder = tmp_path / "saved"
    thing.save_pretrained(folder)
    sent = hub.files("ann/thing")
    for name in folder_files(folder, KINDS[kind]):
        assert sent[name] == (folder / name).read_bytes(), name
    assert kind_of(folder) == KINDS[kind]
    assert all(belongs(name, KINDS[kind].files) or name in ("README.md", ".gitattributes") for name in sent)
    assert meta(hub, "ann/thing")["library_name"] == "quickmerge"


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_opened_again_without_the_hub(kind: str, hub: Hub) -> None:
    thing = MAKE[kind]()
    push(kind, thing, "ann/thing")
    OPEN[kind]("ann/thing")
    asked = len(hub.asked)
    assert same(OPEN[kind]("ann/thing", local_files_only=True), thing)
    assert len(hub.asked) == asked
    hub.stop()
    assert same(OPEN[kind]("ann/thing"), thing)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_was_altered_on_the_way_is_refused(kind: str, hub: Hub) -> None:
    push(kind, MAKE[kind](), "ann/thing")
    files = hub.repositories["ann/thing"].files()
    for name in folder_names(hub, kind):
        hub.damaged = {name, files[name].sha256} if files[name].large else {name}
        with pytest.raises(DamagedWeightsError, match=r"is not the file that the hub has .*: delete .* and fetch it"):
            OPEN[kind]("ann/thing", force_download=True)
    hub.damaged = set()
    OPEN[kind]("ann/thing", force_download=True)


def folder_names(hub: Hub, kind: str) -> list[str]:
    """One file of settings and one of weights."""
    names = [name for name in hub.files("ann/thing") if belongs(name, KINDS[kind].files)]
    return [KINDS[kind].settings, next(name for name in names if name.endswith(".safetensors"))]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "recipe"])
def test_weights_of_another_training_are_refused(kind: str, hub: Hub) -> None:
    """Both files are what the hub says, but they do not belong together."""
    push(kind, MAKE[kind](), "ann/thing")
    files = hub.files("ann/thing")
    name = next(each for each in files if each.endswith(".safetensors"))
    data = bytearray(files[name])
    data[-3] ^= 1  # of a float's mantissa
    hub.add("ann/thing", {**files, name: bytes(data)})
    with pytest.raises(DamagedWeightsError, match="don't belong together"):
        OPEN[kind]("ann/thing")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_of_another_kind_is_told_before_its_weights_are_fetched(kind: str, hub: Hub) -> None:
    other = dict(zip(KINDS, [*list(KINDS)[1:], "recipe"], strict=True))[kind]
    settings = json.dumps(dict([KINDS[other].mark]))
    hub.add("ann/thing", {KINDS[other].settings: settings.encode(), "model.safetensors": b"x" * 999})
    with pytest.raises(QuickmergeError) as caught:
        OPEN[kind]("ann/thing")
    opener = KINDS[other].opener
    assert str(caught.value) == (
        f"ann/thing on the hub holds {KINDS[other].name}, where {KINDS[kind].name} must be: quickmerge.{opener} opens "
        "it"
    )
    assert not any("large" in path for _, path in hub.asked)


def test_the_table_of_kinds_is_true(tmp_path: Path) -> None:
    for name, kind in KINDS.items():
        thing = saved(name, tmp_path / name)
        assert kind_of(tmp_path / name) == kind == thing.hub_kind
        home: Any = qm
        for part in kind.opener.split("."):
            home = getattr(home, part)
        assert home is type(thing)


def test_a_model_of_somebody_is_none_of_ours(hub: Hub) -> None:
    hub.add("ann/llama", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x"})
    hub.add("ann/empty", {"notes.txt": b"x"})
    with pytest.raises(
        QuickmergeError, match=r"ann/llama on the hub must hold a prior .* config.json, got something else"
    ):
        qm.Prior.from_pretrained("ann/llama")
    with pytest.raises(
        QuickmergeError, match=r"ann/empty on the hub must hold a recipe .* recipe.json, got neither file"
    ):
        qm.Recipe.from_pretrained("ann/empty")


def test_nothing_but_its_files_is_fetched(hub: Hub, tmp_path: Path) -> None:
    push("recipe", MAKE["recipe"](), "ann/thing")
    files = hub.files("ann/thing")
    more = {
        "model.pkl": b"x", "merge-prior/evil.py": b"x", "modeling.py": b"x", "merge-prior/deep/config.json": b"{}",
        "merge-prior/pytorch_model.bin": b"x", "custom_generate/generate.py": b"x", "elsewhere/config.json": b"{}",
    }  # fmt: skip
    hub.add("ann/thing", {**files, **more})
    qm.Recipe.from_pretrained("ann/thing")
    fetched = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/**/*") if path.is_file()}
    assert fetched == {"recipe.json", "config.json", "model.safetensors"}
    got = [path for method, path in hub.asked if method == "GET" and "/resolve/" in path]
    assert not [path for path in got if any(name in path for name in more)]


def test_revisions(hub: Hub) -> None:
    first, second = MAKE["prior"](), MAKE["prior"]()
    second.mean += 1
    first.push_to_hub("ann/prior")
    at = hub.repositories["ann/prior"].branches["main"]
    second.push_to_hub("ann/prior", revision="better/one", commit_message="A better one")
    assert hub.repositories["ann/prior"].messages[-1] == "A better one"
    assert same(qm.Prior.from_pretrained("ann/prior"), first)
    assert same(qm.Prior.from_pretrained("ann/prior", revision="better/one"), second)
    second.push_to_hub("ann/prior")
    assert same(qm.Prior.from_pretrained("ann/prior"), second)
    assert same(qm.Prior.from_pretrained("ann/prior", revision=at), first)
    with pytest.raises(UnknownModelError, match="ann/prior on the hub has no revision 'never': name a branch"):
        qm.Prior.from_pretrained("ann/prior", revision="never")


def test_a_proposal_changes_nothing(hub: Hub) -> None:
    first, second = MAKE["prior"](), MAKE["prior"]()
    second.mean += 1
    first.push_to_hub("ann/prior")
    address = second.push_to_hub("ann/prior", create_pr=True, token="hf_ben")
    assert address == f"{hub.url}/ann/prior/discussions/1"
    assert same(qm.Prior.from_pretrained("ann/prior"), first)
    assert same(qm.Prior.from_pretrained("ann/prior", revision="refs/pr/1"), second)


def test_files_of_an_earlier_push_go_and_a_card_by_hand_stays(hub: Hub) -> None:
    MAKE["recipe"]().push_to_hub("ann/recipe")
    assert "decoding-network/config.json" in hub.files("ann/recipe")
    plain = qm.Recipe(merge=qm.QuickMerge(keep=0.3))
    plain.push_to_hub("ann/recipe", license="mit")
    assert set(hub.files("ann/recipe")) == {".gitattributes", "README.md", "recipe.json"}
    assert meta(hub, "ann/recipe")["license"] == "mit"
    hub.add("ann/recipe", {**hub.files("ann/recipe"), "README.md": b"---\nlicense: mit\n---\nMine.\n"})
    with pytest.warns(UserWarning, match="the card of ann/recipe was not made by quickmerge, and stays as it is"):
        plain.push_to_hub("ann/recipe")
    assert card(hub, "ann/recipe").endswith("Mine.\n")


def test_a_private_one_is_seen_by_its_owner_alone(hub: Hub, tmp_path: Path) -> None:
    thing = MAKE["prior"]()
    thing.push_to_hub("ann/secret", private=True)
    assert same(qm.Prior.from_pretrained("ann/secret"), thing)
    for token, known in (
        (False, r"without a token \(hf auth login, HF_TOKEN or token=\)"),
        ("hf_ben", "with this token"),
    ):
        with pytest.raises(
            UnknownModelError, match=f"the hub has no ann/secret that can be seen {known}: check the id"
        ):
            qm.Prior.from_pretrained("ann/secret", token=token, cache_dir=tmp_path / "another")


# What is wrong is one sentence --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_id_that_does_not_exist(kind: str, hub: Hub) -> None:
    with pytest.raises(UnknownModelError) as caught:
        OPEN[kind]("ann/never")
    assert str(caught.value) == (
        "there is no folder ann/never, and the hub has no ann/never that can be seen with this token: check the id, "
        f"which must name {KINDS[kind].name}"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_no_network(kind: str, hub: Hub) -> None:
    hub.stop()
    with pytest.raises(
        FetchError, match=r"no folder ann/thing, and the hub at http://127.* can't be reached .*: check the"
    ):
        OPEN[kind]("ann/thing")


def test_no_network_to_send_to(hub: Hub) -> None:
    hub.stop()
    with pytest.raises(FetchError, match=r"^the hub at http://127.* can't be reached .*: check the connection"):
        MAKE["prior"]().push_to_hub("ann/thing")


def test_gated(hub: Hub) -> None:
    MAKE["prior"]().push_to_hub("ann/thing")
    hub.repositories["ann/thing"].gated = True
    with pytest.raises(
        UnknownModelError, match=r"ann/thing on the hub is gated.*with this token: ask for access at http"
    ):
        qm.Prior.from_pretrained("ann/thing", token="hf_ben")


def test_offline_without_what_was_fetched(hub: Hub) -> None:
    with pytest.raises(UnknownModelError, match="was not fetched before, which local_files_only asks for"):
        qm.Prior.from_pretrained("ann/thing", local_files_only=True)


def test_no_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        QuickmergeError, match=r"ann/thing can't be written without a token .*: run hf auth login, set HF_T"
    ):
        MAKE["prior"]().push_to_hub("ann/thing")
    assert not hub.repositories


@pytest.mark.parametrize("token", ["hf_ben", "hf_nobody"])
def test_a_token_that_may_not_write_there(token: str, hub: Hub) -> None:
    with pytest.raises(UnknownModelError, match=r"ann/thing can't be written with this token \(.*\): use one that may"):
        MAKE["prior"]().push_to_hub("ann/thing", token=token)
    assert not hub.repositories


def test_a_commit_that_is_refused_leaves_what_was_there(hub: Hub) -> None:
    MAKE["prior"]().push_to_hub("ann/thing")
    before, hub.full = hub.files("ann/thing"), True
    other = MAKE["prior"]()
    other.mean += 1
    with pytest.raises(UnknownModelError, match="storage limit reached"):
        other.push_to_hub("ann/thing")
    assert hub.files("ann/thing") == before


@pytest.mark.parametrize("name", ["thing", "", "a/b/c", "ann/th ing", "../thing"])
def test_no_id(name: str, hub: Hub) -> None:
    with pytest.raises(QuickmergeError):
        MAKE["prior"]().push_to_hub(name)
    assert not hub.repositories


def test_options_that_mean_nothing(hub: Hub, tmp_path: Path) -> None:
    saved("prior", tmp_path / "prior")
    with pytest.raises(QuickmergeError, match="revision is for ids of the hub"):
        qm.Prior.from_pretrained(tmp_path / "prior", revision="main")
    with pytest.raises(QuickmergeError, match="revision must be left out with create_pr"):
        MAKE["prior"]().push_to_hub("ann/thing", create_pr=True, revision="main")
    with pytest.raises(TypeError, match="revison"):
        qm.Prior.from_pretrained(tmp_path / "prior", revison="main")  # type: ignore[call-arg]


def test_a_folder_goes_before_an_id(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    thing = saved("prior", tmp_path / "runs" / "prior")
    assert same(qm.Prior.from_pretrained("runs/prior"), thing)
    assert not hub.asked


# CALMs and transformers ---------------------------------------------------------------------------------------------


def test_transformers_opens_a_calm_by_its_id(hub: Hub) -> None:
    model = MAKE["calm"]()
    push("calm", model, "ann/calm")
    model.autoencoder.push_to_hub("ann/coder")
    code = (
        "import quickmerge\n"
        "from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained('ann/calm')\n"
        "assert type(model).__name__ == 'CalmForCausalLM', type(model)\n"
        "coder = AutoModel.from_pretrained('ann/coder', revision='main')\n"
        "assert type(coder).__name__ == 'CalmAutoencoder', type(coder)\n"
        "tokenizer = AutoTokenizer.from_pretrained('ann/calm')\n"
        "print(sum(float(v.double().abs().sum()) for v in model.state_dict().values()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    total = sum(float(v.double().abs().sum()) for v in model.state_dict().values())
    assert float(done.stdout) == total


def test_load_calm_brings_the_tokenizer(hub: Hub) -> None:
    model = MAKE["calm"]()
    push("calm", model, "ann/calm")
    found, tokenizer = load_calm("ann/calm", revision="main")
    assert same(found, model) and tokenizer.padding_side == "left"


def test_transformers_own_way_to_push_is_refused(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(QuickmergeError, match="push_to_hub must be left out of save_pretrained"):
        MAKE["calm"]().save_pretrained(tmp_path, push_to_hub=True, repo_id="ann/calm")
    assert not hub.repositories and not os.listdir(tmp_path)


# Cards --------------------------------------------------------------------------------------------------------------

ROWS = [
    {"method": "quickmerge", "keep": 0.4, "recovery": 0.93412, "recovery_low": 0.912, "recovery_high": 0.951},
    {"method": "truncate", "keep": 0.4, "recovery": 0.61, "recovery_low": 0.55, "recovery_high": 0.66},
]


def test_the_card_says_what_it_was_made_for_and_what_was_measured(hub: Hub) -> None:
    from quickmerge.data import shipped_prior

    folder = shipped_prior("smollm2-135m")
    assert folder is not None
    thing = qm.Prior.from_pretrained(folder)
    command = "quickmerge train prior --data texts/ --out runs/prior"
    results = {"rows": ROWS, "meta": {"model": "smollm2-135m", "environment": {"torch": "9"}}}
    thing.push_to_hub("ann/prior", results=results, command=command, license="apache-2.0")
    assert meta(hub, "ann/prior") == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "library_name": "quickmerge", "license": "apache-2.0",
        "tags": ["quickmerge", "prior"],
    }  # fmt: skip
    text = card(hub, "ann/prior")
    told = thing.config.trained_for
    for part in ("- model: smollm2-135m", told["hash"], "- layers: `" + "\\[8, 25\\]`", command,
                 "| quickmerge | 0.4 | 0.9341 (0.912 to 0.951) |", "| truncate | 0.4 | 0.61 (0.55 to 0.66) |",
                 "interval of 95 %", 'qm.Prior.from_pretrained("ann/prior")', "torch 9"):  # fmt: skip
        assert part in text, part


def test_the_card_says_what_nobody_said(hub: Hub) -> None:
    MAKE["gumiho"]().push_to_hub("ann/heads")
    text = card(hub, "ann/heads")
    assert "None were given with this card: how well it does was not measured here." in text
    assert "The command was not given." in text and "## Licence\n\nIt was not said." in text
    assert "license" not in meta(hub, "ann/heads") and "base_model" not in meta(hub, "ann/heads")


def test_a_number_without_an_interval_says_so(hub: Hub) -> None:
    MAKE["gumiho"]().push_to_hub("ann/heads", results=[{"tokens_per_pass": 2.5, "seconds": None, "recipe": {"a": 1}}])
    text = card(hub, "ann/heads")
    assert "| tokens per pass |\n| --- |\n| 2.5 |" in text and "No intervals were measured." in text


@pytest.mark.parametrize("results", ["nothing.json", 3, [], [1], {"rows": []}, "text"])
def test_results_that_are_none_are_refused_before_anything_is_sent(results: Any, hub: Hub) -> None:
    with pytest.raises(QuickmergeError, match="results must be"):
        MAKE["prior"]().push_to_hub("ann/prior", results=results)
    assert not hub.repositories


def test_a_strangers_words_are_no_markup(hub: Hub) -> None:
    thing = MAKE["prior"]()
    evil = "a|b\n# Title <script>alert(1)</script> [x](http://y) `z`"
    thing.config.trained_for["model"] = evil
    thing.push_to_hub("ann/prior")
    text = card(hub, "ann/prior")
    assert "<script>" not in text and "\n# Title" not in text and "](http" not in text.replace("\\](", "")


def test_a_base_model_is_named_if_the_hub_has_it(hub: Hub) -> None:
    thing = MAKE["prior"]()
    thing.config.trained_for["model"] = "runs/mine"
    thing.push_to_hub("ann/prior")
    assert "base_model" not in meta(hub, "ann/prior")
    hub.add("big/model", {"config.json": b"{}"})
    thing.config.trained_for["model"] = "big/model"
    thing.push_to_hub("ann/prior")
    assert meta(hub, "ann/prior")["base_model"] == "big/model"
