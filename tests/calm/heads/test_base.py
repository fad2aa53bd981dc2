"""What holds for every head."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from heads_cases import DENSITIES, NAMES, batch, normals, slope, small
from hypothesis import given
from strategies import FLOATS, generator, prop, seeds

from quickmerge.calm.heads import HEADS, VectorHead, make_head
from quickmerge.errors import QuickmergeError

every = pytest.mark.parametrize("name", NAMES)


def seeded_loss(head: VectorHead, context: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    return head.loss(context, target)


@every
@prop(30)
@given(seed=seeds)
def test_shapes_and_dtypes(name: str, seed: int) -> None:
    rng = Random(seed)
    shape, c, d = rng.choice(((), (0,), (2, 0), batch(rng))), rng.choice((1, 3, 7)), rng.choice((1, 2, 5))
    given_dtype, target_dtype, inside = (rng.choice(FLOATS) for _ in range(3))
    head = small(name, c, d, seed).to(inside)
    context, target = normals((*shape, c), seed, given_dtype), normals((*shape, d), seed, target_dtype)
    want = torch.float64 if torch.float64 in (given_dtype, target_dtype) else torch.float32
    loss = head.loss(context, target)
    assert loss.shape == shape and loss.dtype == want
    assert loss.isfinite().all()
    want = torch.float64 if given_dtype == torch.float64 else torch.float32
    for vector in (head.mean(context), head.sample(context)):
        assert vector.shape == (*shape, d) and vector.dtype == want
        assert vector.isfinite().all()


@every
@prop(20)
@given(seed=seeds)
def test_gradients_are_the_slopes(name: str, seed: int) -> None:
    rng = Random(seed)
    shape = batch(rng)
    head = small(name, 3, 2, seed).double()
    context, target = normals((*shape, 3), seed).requires_grad_(), normals((*shape, 2), seed + 1).requires_grad_()

    def total() -> torch.Tensor:
        return seeded_loss(head, context, target).sum()

    total().backward()
    for x in (context, target, *head.parameters()):
        assert x.grad is not None and x.grad.isfinite().all()
        at = rng.randrange(x.numel())
        assert float(x.grad.view(-1)[at]) == pytest.approx(slope(total, x, at), rel=2e-4, abs=1e-5)


@every
def test_a_bfloat16_input_is_the_same_number_in_float32(name: str) -> None:
    head = small(name)
    context, target = normals((5, 4), 1, torch.bfloat16), normals((5, 3), 2, torch.bfloat16)
    assert torch.equal(seeded_loss(head, context, target), seeded_loss(head, context.float(), target.float()))


@every
def test_a_bfloat16_head_is_near_the_float64_one(name: str) -> None:
    # Weights that bfloat16 holds exactly; what differs is the arithmetic inside.
    head = small(name).bfloat16()
    context, target = normals((40, 4), 1, torch.bfloat16), normals((40, 3), 2, torch.bfloat16)
    got = [seeded_loss(head, context, target).double().detach(), head.mean(context).double().detach()]
    head = head.double()
    want = [seeded_loss(head, context, target).detach(), head.mean(context).detach()]
    for part in range(2 if name in DENSITIES else 1):
        assert float((got[part] - want[part]).abs().mean()) < 0.05 * (1 + float(want[part].abs().mean()))


@every
def test_a_fresh_head_gives_every_parameter_a_gradient_in_time(name: str) -> None:
    torch.manual_seed(0)
    head = make_head(name, 4, 3)
    optimiser = torch.optim.SGD(head.parameters(), lr=0.1)
    context, target = normals((64, 4), 1, torch.float32), normals((64, 3), 2, torch.float32)
    for _ in range(3):
        optimiser.zero_grad()
        head(context, target).mean().backward()
        optimiser.step()
    for key, weight in head.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, key
        assert weight.isfinite().all(), key


@every
def test_calling_a_head_is_its_loss(name: str) -> None:
    head, context, target = small(name), normals((5, 4), 1), normals((5, 3), 2)
    torch.manual_seed(0)
    assert torch.equal(head(context, target), seeded_loss(head, context, target))


@every
@prop(15)
@given(seed=seeds)
def test_positions_do_not_touch(name: str, seed: int) -> None:
    """The loss of a position is differentiable in its own context and target only."""
    head = small(name, 4, 3, seed).double()
    context, target = normals((2, 5, 4), seed).requires_grad_(), normals((2, 5, 3), seed + 1).requires_grad_()
    by_context, by_target = torch.autograd.grad(head.loss(context, target)[1, 2], (context, target))
    for grad in (by_context, by_target):
        assert grad[1, 2].abs().sum() > 0
        grad[1, 2] = 0
        assert not grad.any()


@every
def test_the_same_seed_is_the_same_sample(name: str) -> None:
    head, context = small(name), normals((2, 7, 4), 1)
    first, again, other = (head.sample(context, generator=generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0, 0], head.sample(context[:, :1].expand(2, 7, 4), generator=generator(3))[0, 1])


@every
def test_a_generator_leaves_the_global_one_alone(name: str) -> None:
    head, context = small(name), normals((7, 4), 1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    head.sample(context, generator=generator(3))
    assert torch.equal(before, torch.get_rng_state())
    head.sample(context)
    assert not torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", DENSITIES)
@prop(15)
@given(seed=seeds)
def test_samples_score_better_at_home(name: str, seed: int) -> None:
    """Gibbs: on average nobody predicts a head's samples better than the head."""
    truth, other = small(name, 2, 2, seed), small(name, 2, 2, seed + 1)
    context = normals((2,), seed).expand(4000, 2)
    target = truth.sample(context, generator=generator(seed))
    gap = (other.loss(context, target) - truth.loss(context, target)).detach()
    assert float(gap.mean()) > -4 * float(gap.std()) / len(gap) ** 0.5


@every
@pytest.mark.parametrize(
    ("context", "target", "words"),
    [
        (torch.zeros(2, 5), torch.zeros(2, 3), r"context must have shape \(..., 4\), got \(2, 5\)"),
        (torch.zeros(()), torch.zeros(3), r"context must have shape \(..., 4\), got \(\)"),
        (torch.zeros(2, 4).long(), torch.zeros(2, 3), r"context must be of floating point, got torch.int64"),
        (torch.zeros(2, 4), torch.zeros(2, 2), r"target must have shape \(2, 3\) for this context, got \(2, 2\)"),
        (torch.zeros(2, 4), torch.zeros(3), r"target must have shape \(2, 3\) for this context, got \(3,\)"),
        (torch.zeros(1, 4), torch.zeros(2, 3), r"target must have shape \(1, 3\) for this context, got \(2, 3\)"),
        (torch.zeros(2, 4), torch.zeros(2, 3).int(), r"target must be of floating point, got torch.int32"),
    ],
)
def test_wrong_inputs(name: str, context: torch.Tensor, target: torch.Tensor, words: str) -> None:
    head = small(name)
    with pytest.raises(ValueError, match=words):
        head.loss(context, target)
    if words.startswith("context"):
        for use in (head.mean, head.sample):
            with pytest.raises(ValueError, match=words):
                use(context)


@every
@pytest.mark.parametrize("temperature", [-1, -0.001, float("inf"), float("nan"), True, None, "1"])
def test_wrong_temperatures(name: str, temperature: Any) -> None:
    with pytest.raises(ValueError, match="temperature must be"):
        small(name).sample(torch.zeros(2, 4), temperature=temperature)


@every
@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "3"])
def test_wrong_sizes(name: str, bad: Any) -> None:
    with pytest.raises(ValueError, match="context must be a whole number of at least 1, got"):
        make_head(name, bad, 3)
    with pytest.raises(ValueError, match="width must be a whole number of at least 1, got"):
        make_head(name, 4, bad)


WRONG: list[tuple[str, str, list[Any]]] = [
    ("gaussian", "floor", [0, -1, float("inf"), float("nan"), True, "1"]),
    ("mixture", "floor", [0, float("nan")]),
    ("mixture", "components", [0, 2.0, True]),
    ("energy", "noise", [0, 1.0]),
    ("energy", "blocks", [0, None]),
    ("energy", "hidden", [0, 2, 4.5]),
    ("energy", "samples", [1, 0, 2.0]),
    ("energy", "alpha", [0, 2, -1, 3.0, float("nan"), True, "1"]),
    ("flow", "steps", [0, 10_001, 2.0, True]),
    ("flow", "blocks", [0, None]),
    ("diffusion", "steps", [0, 10_001, "9"]),
    ("diffusion", "hidden", [0, 2, 4.5]),
    ("diffusion", "samples", [0, 2.0]),
]


@pytest.mark.parametrize(("name", "key", "bad"), [(n, k, value) for n, k, values in WRONG for value in values])
def test_wrong_settings(name: str, key: str, bad: Any) -> None:
    with pytest.raises(ValueError, match=f"{key} must be a .*, got {bad!r}".replace("+", r"\+")):
        make_head(name, 4, 3, **{key: bad})


def test_make_head_makes_each_with_its_settings() -> None:
    for name, cls in HEADS.items():
        head = make_head(name, 4, 3)
        assert type(head) is cls and (head.context, head.width, cls.name) == (4, 3, name)
    assert make_head("mixture", 4, 3, components=5, floor=0.2).components == 5
    densities = {"gaussian": True, "mixture": True, "energy": False, "flow": False, "diffusion": False}
    assert {name: cls.is_density for name, cls in HEADS.items()} == densities


def test_make_head_says_what_there_is() -> None:
    with pytest.raises(QuickmergeError, match=r"energy, flow, diffusion, got 'gausian' \(did you mean 'gau"):
        make_head("gausian", 4, 3)
    with pytest.raises(QuickmergeError, match=r"got 'zebra'$"):
        make_head("zebra", 4, 3)
    with pytest.raises(QuickmergeError, match=r"mixture head must be of components, floor, got 'component' \(did you"):
        make_head("mixture", 4, 3, component=5)
