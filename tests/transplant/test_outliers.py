"""Rows that stand out: found, counted and cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, prop, seeds
from torch import Tensor

from quickmerge.errors import QuickmergeError
from quickmerge.transplant import rebuild as module
from quickmerge.transplant.rebuild import clip_norms, logit_report, norm_report
from quickmerge.transplant.rules import Omp


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


@prop(20)
@given(seed=seeds, quantile=st.sampled_from((0.5, 0.9, 0.99)), half=st.booleans())
def test_clipping(seed: int, quantile: float, half: bool) -> None:
    new, shared = drawn(seed, 30, 6) * drawn(seed + 1, 30, 1).exp(), drawn(seed + 2, 100, 6)
    new = new.bfloat16() if half else new
    got = clip_norms(new, shared, quantile=quantile)
    high = float(shared.norm(dim=1).quantile(quantile))
    assert got.dtype == new.dtype
    for before, after in zip(new, got, strict=True):
        if float(before.float().norm()) <= high:
            assert torch.equal(before, after)
        else:
            assert float(after.float().norm()) == pytest.approx(high, rel=1e-2 if half else 1e-5)
            cosine = torch.cosine_similarity(before.float(), after.float(), dim=0)
            assert float(cosine) == pytest.approx(1, abs=1e-3 if half else 1e-6)
    again = clip_norms(got, shared, quantile=quantile)
    torch.testing.assert_close(again, got)


def test_lengths() -> None:
    shared = torch.arange(1.0, 102)[:, None] * torch.tensor([[0.6, 0.8]])
    new = torch.tensor([[50.0, 0.0], [0.0, 500.0], [0.5, 0.0], [0.0, 102.0], [0.0, 0.0]])
    report = norm_report(new, shared, quantile=0.99)
    assert (report.low, report.median, report.high) == pytest.approx((2, 51, 100), rel=1e-5)
    assert report.long.tolist() == [1, 3]
    assert report.short.tolist() == [4, 2]
    assert report.new_median == 50
    assert report.longest == pytest.approx(500 / 51)


@prop(15)
@given(seed=seeds, chunk=st.sampled_from((7, 1000)))
def test_logits(seed: int, chunk: int) -> None:
    hidden, new, shared = drawn(seed, 12, 5), drawn(seed + 1, 20, 5) + 1, drawn(seed + 2, 60, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        report = logit_report(hidden, new, shared, quantile=0.9)
    own, theirs = hidden.double() @ new.double().T, hidden.double() @ shared.double().T
    assert report.new_mean == pytest.approx(float(own.mean()), abs=1e-5)
    assert report.new_spread == pytest.approx(float(own.std(correction=0)), abs=1e-5)
    assert report.shared_mean == pytest.approx(float(theirs.mean()), abs=1e-5)
    assert report.shared_spread == pytest.approx(float(theirs.std(correction=0)), abs=1e-5)
    assert report.high == pytest.approx(float(theirs.amax(0).quantile(0.9)), abs=1e-5)
    loud = [i for i in own.amax(0).argsort(descending=True).tolist() if float(own[:, i].amax()) > report.high]
    assert report.loud.tolist() == loud
    assert report.loudest == pytest.approx(float(own.amax()), abs=1e-5)
    assert report.share_won == pytest.approx(float((own.amax(1) > theirs.amax(1)).double().mean()))


def test_a_breaker_is_found_and_cut() -> None:
    # Eight shared tokens that have nothing to do with one another in the donor and one direction in the base. Their sum
    # is a vector of usual length in the donor, and eight times too long in the base.
    anchors, rows = drawn(0, 500, 256), drawn(1, 500, 48)
    anchors[:8] = torch.eye(256)[:8]
    rows[:8] = rows[0] + 0.1 * drawn(2, 8, 48)
    honest = anchors[8:48] + 0.3 * drawn(3, 40, 256)
    breaker = anchors[:8].sum(0, keepdim=True) * 5
    assert float(breaker.norm()) < float(anchors.norm(dim=1).quantile(0.1))  # nothing to see in the donor
    rule = Omp(8, centre=False, correct_mean=False)
    new = rule.rebuild(torch.cat([honest, breaker]), anchors, rows)
    report = norm_report(new, rows)
    assert int(report.long[0]) == 40
    assert report.longest > 3
    hidden = drawn(5, 200, 48)
    assert int(logit_report(hidden, new, rows).loud[0]) == 40
    cut = clip_norms(new, rows)
    assert not len(norm_report(cut, rows, quantile=0.9901).long)
    assert logit_report(hidden, cut, rows).loudest < logit_report(hidden, new, rows).loudest / 2


@pytest.mark.parametrize("quantile", [0.0, 0.4, 1.0, 2.0])
def test_quantiles_out_of_range(quantile: float) -> None:
    with pytest.raises(QuickmergeError, match="quantile must be"):
        clip_norms(torch.ones(2, 3), torch.ones(4, 3), quantile=quantile)


def test_what_it_refuses() -> None:
    with pytest.raises(QuickmergeError, match="new and shared"):
        norm_report(torch.ones(2, 3), torch.ones(4, 2))
    with pytest.raises(QuickmergeError, match="finite"):
        norm_report(torch.full((2, 3), torch.nan), torch.ones(4, 3))
    with pytest.raises(QuickmergeError, match="hidden must be"):
        logit_report(torch.ones(0, 3), torch.ones(2, 3), torch.ones(4, 3))
