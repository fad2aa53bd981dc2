import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop, seeds

from quickmerge.errors import QuickmergeError
from quickmerge.merge.bench.vision_cost import Accuracy, LinearProbe, choose_probe, probe_features, wilson


def problem(seed: int, n: int = 30, width: int = 4, classes: int = 3) -> tuple[torch.Tensor, list[str]]:
    """Noisy features whose first numbers say something about the label; every class occurs."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
    x = rng.standard_normal((n, width)) * rng.uniform(0.1, 50, width) + rng.uniform(-20, 20, width)
    x[:, 0] += x[:, 0].std() * labels
    return torch.tensor(x), [f"class {label}" for label in labels]


def objective(probe: LinearProbe, x: torch.Tensor, labels: list[str], W: np.ndarray, b: np.ndarray) -> float:
    """The definition, one row and one class at a time; also checks what standardised means."""
    rows = x.double().numpy()
    total = 0.0
    for row, label in zip(rows, labels, strict=True):
        z = [(value - column.mean()) / column.std() for value, column in zip(row, rows.T, strict=True)]
        logits = [sum(w * v for w, v in zip(W[c], z, strict=True)) + b[c] for c in range(len(b))]
        total += math.log(sum(math.exp(logit) for logit in logits)) - logits[probe.classes.index(label)]
    return total / len(labels) + probe.l2 / 2 * sum(float(w) ** 2 for w in W.ravel())


@prop(12)
@given(seed=seeds, l2=st.sampled_from([1e-3, 1e-2, 1.0]), classes=st.integers(2, 4))
def test_no_other_weights_do_better(seed: int, l2: float, classes: int) -> None:
    x, labels = problem(seed, classes=classes)
    probe = LinearProbe.fit(x, labels, l2=l2)
    W, b = probe.weight.numpy(), probe.bias.numpy()
    best = objective(probe, x, labels, W, b)
    rng = np.random.default_rng(seed)
    for size in (1e-3, 1e-2, 1e-1):  # the objective is convex: a minimum nearby is the minimum
        step_w, step_b = rng.standard_normal(W.shape) * size, rng.standard_normal(b.shape) * size
        assert objective(probe, x, labels, W + step_w, b + step_b) > best - 1e-12
    for c in range(len(b)):  # and along every axis
        for d in range(W.shape[1]):
            for sign in (-1e-3, 1e-3):
                moved = W.copy()
                moved[c, d] += sign
                assert objective(probe, x, labels, moved, b) > best
        bent = b.copy()
        bent[c] += 1e-3
        assert objective(probe, x, labels, W, bent) > best


@prop(10)
@given(seed=seeds)
def test_gradient_descent_ends_at_the_same_weights(seed: int) -> None:
    x, labels = problem(seed)
    probe = LinearProbe.fit(x, labels, l2=0.1)
    rows = x.numpy()
    z = (rows - rows.mean(0)) / rows.std(0)
    y = np.array([[label == one for one in probe.classes] for label in labels], dtype=float)
    W, b = np.zeros((3, 4)), np.zeros(3)
    for _ in range(3000):
        p = np.exp(z @ W.T + b)
        p /= p.sum(1, keepdims=True)
        W -= 0.5 * ((p - y).T @ z / len(y) + 0.1 * W)
        b -= 0.5 * (p - y).mean(0)
    assert np.allclose(probe.weight, W, atol=1e-5)
    assert np.allclose(probe.bias, b, atol=1e-5)


@prop(20)
@given(seed=seeds, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_units_and_order_of_the_features_do_not_matter(seed: int, dtype: torch.dtype) -> None:
    x, labels = problem(seed)
    x = x.to(dtype)
    rng = np.random.default_rng(seed)
    order = torch.from_numpy(rng.permutation(len(labels)))
    scale, shift = torch.from_numpy(rng.uniform(0.5, 2, 4)), torch.from_numpy(rng.uniform(-3, 3, 4))
    first = LinearProbe.fit(x, labels)
    again = LinearProbe.fit(x[order].double() * scale + shift, [labels[i] for i in order.tolist()])
    assert torch.allclose(first.weight, again.weight, atol=1e-4)
    assert first.predict(x) == again.predict(x.double() * scale + shift)


def test_the_same_fit_twice_is_the_same_bits() -> None:
    x, labels = problem(0)
    first, again = LinearProbe.fit(x, labels), LinearProbe.fit(x, labels)
    assert torch.equal(first.weight, again.weight) and torch.equal(first.bias, again.bias)


def test_prediction_is_the_largest_score() -> None:
    x, labels = problem(3)
    probe = LinearProbe.fit(x, labels)
    new = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)).double() * 20
    for row, predicted in zip(new, probe.predict(new), strict=True):
        scores = {
            name: sum(float(w * (v - m) / s) for w, v, m, s in zip(weight, row, probe.mean, probe.scale, strict=True))
            + float(bias)
            for name, weight, bias in zip(probe.classes, probe.weight, probe.bias, strict=True)
        }
        assert predicted == max(scores, key=lambda name: scores[name])


def test_accuracy_counts_what_is_right() -> None:
    x = torch.tensor([[-1.0], [-2.0], [1.0], [2.0]])
    probe = LinearProbe.fit(x, ["no", "no", "yes", "yes"])
    new = torch.tensor([[-3.0], [-1.0], [4.0], [0.5], [9.0]])
    assert probe.predict(new) == ["no", "no", "yes", "yes", "yes"]
    found = probe.accuracy(new, ["no", "yes", "yes", "yes", "no"])
    assert found == Accuracy(3 / 5, *wilson(3, 5), 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_features_of_inference_mode_can_be_fitted(dtype: torch.dtype) -> None:
    x, labels = problem(0)
    with torch.inference_mode():
        frozen = x.to(dtype) * 1
        inside = LinearProbe.fit(frozen, labels)
    assert torch.equal(LinearProbe.fit(frozen, labels).weight, inside.weight)
    assert not inside.weight.requires_grad


def test_a_constant_feature_is_left_alone() -> None:
    x, labels = problem(0, n=37)
    values = torch.tensor([0.0, 0.1, 1.1, 3.3, -7.7, 1e3 / 3], dtype=torch.float64).repeat(len(x), 1)
    values[::2] *= 1 + 2**-52  # constant but for rounding, which must not be taken for a signal
    assert (values[:, 1:].std(0, correction=0) > 0).all()
    probe = LinearProbe.fit(torch.cat([x, values], dim=1), labels)
    assert (probe.scale[4:] == 1).all()
    assert torch.allclose(probe.weight[:, :4], LinearProbe.fit(x, labels).weight, atol=1e-5)
    assert probe.weight[:, 4:].abs().max() < 1e-5


def test_the_penalty_is_chosen_on_other_data() -> None:
    x, labels = problem(1, n=40, width=30)
    val, val_labels = problem(2, n=60, width=30)
    choices = [1e-4, 1e-2, 1.0, 100.0]
    scores = {l2: LinearProbe.fit(x, labels, l2=l2).accuracy(val, val_labels).value for l2 in choices}
    chosen = choose_probe((x, labels), (val, val_labels), choices)
    assert scores[chosen.l2] == max(scores.values())
    assert len(set(scores.values())) > 1  # or the choice means nothing
    easy = (torch.tensor([[-1.0], [1.0]]), ["a", "b"])
    assert choose_probe(easy, easy, [0.01, 0.1, 0.001]).l2 == 0.1  # all are right: the strongest


@prop(100)
@given(total=st.integers(1, 3000), share=st.floats(0, 1))
def test_wilson_is_where_the_score_test_turns(total: int, share: float) -> None:
    right = round(share * total)
    low, high = wilson(right, total)
    assert 0 <= low <= right / total <= high <= 1
    for end, inner in ((low, 1), (high, -1)):
        if 0 < end < 1:  # |observed - p| is exactly 1.96 standard errors of p there
            assert abs(right / total - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / total), abs=1e-7)
            inside = end + inner * 1e-4 * (high - low)
            assert abs(right / total - inside) < 1.959964 * math.sqrt(inside * (1 - inside) / total)
    assert wilson(total - right, total) == pytest.approx((1 - high, 1 - low))


def test_wilson_as_printed_in_textbooks() -> None:
    assert wilson(0, 10) == pytest.approx((0, 0.27753), abs=1e-5)
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)


@prop(20)
@given(seed=seeds, batch=st.integers(1, 3), tokens=st.integers(3, 9), prefix=st.integers(1, 2))
def test_features_are_the_class_token_beside_the_mean_patch(seed: int, batch: int, tokens: int, prefix: int) -> None:
    hidden = torch.randn(batch, tokens, 5, generator=torch.Generator().manual_seed(seed)).bfloat16()
    found = probe_features(hidden, prefix)
    assert found.shape == (batch, 10) and found.dtype == torch.float32
    for b in range(batch):
        for d in range(5):
            assert float(found[b, d]) == float(hidden[b, 0, d])
            mean = sum(float(hidden[b, n, d]) for n in range(prefix, tokens)) / (tokens - prefix)
            assert float(found[b, 5 + d]) == pytest.approx(mean, abs=1e-6)


def test_wrong_arguments_are_told_in_one_sentence() -> None:
    x, labels = problem(0)
    probe = LinearProbe.fit(x, labels)
    for call, said in (
        (lambda: LinearProbe.fit(x, labels, l2=0), "l2 must be a number above 0, got 0"),
        (lambda: LinearProbe.fit(x, labels, l2=math.nan), "l2 must be a number above 0, got nan"),
        (lambda: LinearProbe.fit(x, labels[1:]), "as many as the 30 rows of features, got 29"),
        (lambda: LinearProbe.fit(x, ["a"] * 30), "at least 2 classes, got 1"),
        (lambda: LinearProbe.fit(x[0], labels), r"must be \(n, D\) with at least one row, got \(4,\)"),
        (lambda: LinearProbe.fit(x[:0], []), r"at least one row, got \(0, 4\)"),
        (lambda: LinearProbe.fit(x * math.inf, labels), "finite numbers, got NaN or infinity"),
        (lambda: probe.predict(x[:, :3]), "must be 4 wide as those that were fitted, got 3"),
        (lambda: probe.predict(x * math.nan), "finite numbers"),
        (lambda: probe.accuracy(x, ["other"] * 30), "among the 3 that were fitted, got 'other'"),
        (lambda: probe.accuracy(x, labels[1:]), "as many as the 30 rows"),
        (lambda: choose_probe((x, labels), (x, labels), []), "at least one value, got none"),
        (lambda: wilson(3, 2), "got 3 and 2"),
        (lambda: wilson(0, 0), "got 0 and 0"),
        (lambda: probe_features(torch.zeros(2, 1, 3)), r"N > prefix >= 1, got \(2, 1, 3\) and prefix 1"),
        (lambda: probe_features(torch.zeros(2, 3)), r"got \(2, 3\)"),
        (lambda: probe_features(torch.zeros(2, 4, 3), 0), "prefix 0"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_fit_that_does_not_converge_is_not_passed_off_as_one() -> None:
    x, labels = problem(0)
    with pytest.raises(QuickmergeError, match=r"did not converge in 2 steps \(slope .*give a larger l2 than 0\.001"):
        LinearProbe.fit(x, labels, l2=1e-3, steps=2)
