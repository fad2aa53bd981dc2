"""Our functions against stored outputs of the public reference implementations, one test a method; see SOURCES.md."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import quickmerge as qm
from quickmerge.calm.brier import brier_terms
from quickmerge.calm.heads.energy import energy_score
from quickmerge.merge.reducers.dynamicvit import Predictor
from quickmerge.merge.reducers.tome import match_down
from quickmerge.merge.tokens import Evidence
from quickmerge.merge.tokens.removal import masked_softmax
from quickmerge.merge.tokens.selection import cover
from quickmerge.merge.train.dynamicvit import feature_loss, logit_loss, ratio_loss
from quickmerge.multipole import Multipole
from quickmerge.multipole.attend import attend
from quickmerge.multipole.clusters import Clusters
from quickmerge.multipole.weighted_kmeans import kmeans
from quickmerge.speculative.gumiho.network import ParallelHeads
from quickmerge.speculative.tree import Tree, pack
from quickmerge.training.packing import packed_mask
from quickmerge.transplant.matching_pursuit import omp

HERE = Path(__file__).parent


def stored(name: str) -> dict[str, Any]:
    """Arrays of a file as tensors, scalars as numbers."""
    with np.load(HERE / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) if file[key].ndim else file[key].item() for key in file.files}


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference."""
    assert a.shape == b.shape
    return float((a.double() - b.double()).abs().max())


def test_every_file_has_its_source() -> None:
    told = (HERE / "SOURCES.md").read_text()
    assert all(f"`{path.name}`" in told for path in HERE.glob("*.npz"))


@pytest.mark.parametrize("cls", [0, 1])
@pytest.mark.parametrize("removed", [1, 8, 24])
def test_tome(cls: int, removed: int) -> None:
    golden = stored("tome")
    x = golden["x"]
    view = qm.TokenView(x, prefix=cls, size=golden["size"])
    plan = match_down(view, golden["metric"], x.shape[1] - removed)
    # Every token looks at the slot that it went to, so the order of slots is of no account.
    assert gap(plan.unmerge(plan.merge(x)), golden[f"x_{cls}_{removed}"]) <= 2e-5
    assert torch.equal(plan.size.gather(1, plan.slot).double(), golden[f"size_{cls}_{removed}"].double())


def test_dynamicvit_predictor() -> None:
    golden = stored("dynamicvit_predictor")
    made = Predictor(golden["x"].shape[-1]).eval()
    weights = {key.replace("__", "."): value for key, value in golden.items() if key not in ("x", "mask", "out")}
    made.load_state_dict(weights)
    with torch.no_grad():
        assert gap(made(golden["x"], golden["mask"]), golden["out"]) <= 2e-5


def test_dynamicvit_attention_under_a_policy() -> None:
    golden = stored("dynamicvit_softmax")
    assert gap(masked_softmax(golden["scores"], golden["policy"]), golden["out"]) <= 1e-6


def test_dynamicvit_losses() -> None:
    golden = stored("dynamicvit_losses")
    assert float(ratio_loss(list(golden["masks"]), golden["keep"])) == pytest.approx(golden["ratio"], abs=1e-6)
    assert float(logit_loss(golden["student"], golden["teacher"])) == pytest.approx(golden["kl"], abs=1e-5)
    error = feature_loss(golden["features"], golden["wanted"], golden["masks"][-1])
    assert float(error) == pytest.approx(golden["mse"], abs=1e-5)


@pytest.mark.parametrize("lazy", [False, True])
def test_scope(lazy: bool) -> None:
    golden = stored("scope")
    found = cover(golden["x"], golden["order"].shape[1], golden["saliency"], golden["alpha"], lazy=lazy)
    assert found.order.tolist() == golden["order"].tolist()


@pytest.mark.parametrize("k", [1, 4, 16, 32])
def test_omp(k: int) -> None:
    golden = stored("omp")
    found = omp(golden["targets"], golden["atoms"], k)
    assert found.indices.tolist() == golden[f"i{k}"].tolist()
    assert gap(found.weights, golden[f"c{k}"]) <= 1e-4


def test_calm_energy_score() -> None:
    golden = stored("calm_energy")
    assert gap(energy_score(golden["samples"], golden["targets"], golden["alpha"]), golden["score"]) <= 1e-5


def test_calm_brier_terms() -> None:
    golden = stored("calm_brier")
    assert gap(brier_terms(golden["samples"].long(), golden["target"].long()).mean(0), golden["terms"]) <= 1e-6


def test_gumiho_tree_mask() -> None:
    golden = stored("gumiho_mask")
    parent = golden["parent"].tolist()
    packed = pack([Tree([0] * len(parent), parent, [1.0] * len(parent))])
    assert packed.see[0].long().tolist() == golden["see"].long().tolist()
    assert packed.depth[0].tolist() == golden["depth"].tolist()


def test_gumiho_parallel_heads() -> None:
    golden = stored("gumiho_heads")
    heads, wide, features = golden["first"].shape[0], golden["first"].shape[1] // 2, golden["first"].shape[2]
    assert wide == features
    made = ParallelHeads(
        SimpleNamespace(  # type: ignore[arg-type]
            features=features, mlp_width=features, heads=heads, activation="silu", mlp_depth=len(golden["weight"]) + 1
        )
    )
    made.load_state_dict({key: value for key, value in golden.items() if key not in ("u", "out")})
    with torch.no_grad():
        assert gap(made(golden["u"]), golden["out"]) <= 1e-4


def test_multipole_clusters() -> None:
    golden = stored("multipole_kmeans")
    label, _ = kmeans(golden["keys"], golden["init"].shape[1], 10, init=golden["init"])
    assert torch.equal(label.long(), golden["labels"].long())


def test_multipole_attention() -> None:
    golden = stored("multipole_attend")
    keys, values, labels = golden["keys"].float(), golden["values"].float(), golden["labels"].long()
    clusters = Clusters.from_labels(keys, values, labels, golden["start"], int(labels.max()) + 1)
    settings = Multipole(budget=golden["budget"], interval=golden["interval"])
    out = attend(golden["query"].float(), keys, values, None, clusters, settings)[0, 0]
    assert gap(out, golden["out"]) <= 5e-6


def test_recognition_training_mask() -> None:
    golden = stored("nxtp_mask")
    see = packed_mask(golden["group"], golden["image"], golden["valid"])
    # The last token of a label predicts nothing there, and padding asks nothing.
    see = see & ~golden["last"][:, None, None, :] & golden["valid"][:, None, :, None]
    assert torch.equal(see, golden["see"].to(see.dtype))


def test_trimtokenator() -> None:
    golden = stored("trimtokenator")
    method = qm.TrimTokenator(keep=qm.Count(golden["count"]), aligned=golden["aligned"])
    plan = method.plan(qm.TokenView(golden["x"], evidence=Evidence(text=golden["text"])))
    assert (plan.slot[0] >= 0).nonzero().flatten().tolist() == golden["keep"].tolist()
