from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from strategies import prop, views

from quickmerge.merge.tokens import TokenView


def test_defaults_are_every_token_once_in_order() -> None:
    view = TokenView(torch.randn(2, 3, 5))
    assert view.valid.all() and not view.protected.any()
    assert view.position.tolist() == [[0, 1, 2]] * 2
    assert view.size.tolist() == [[1, 1, 1]] * 2
    assert view.length.tolist() == [3, 3]
    assert view.evidence.attention == () and view.grid is None and view.evidence.text is None


def test_defaults_count_positions_over_valid_tokens_only() -> None:
    valid = torch.tensor([[False, False, True, True], [True, True, True, False]])
    view = TokenView(torch.randn(2, 4, 1), valid=valid)
    assert view.position[valid].tolist() == [0, 1, 0, 1, 2]
    assert view.size[valid].tolist() == [1] * 5
    assert view.length.tolist() == [2, 3]
    assert view.position.min() >= 0


def test_length_defaults_to_the_tokens_stood_for_and_leaves_padding_out() -> None:
    valid = torch.tensor([[False, True, True]])
    assert TokenView(torch.randn(1, 3, 2), valid=valid, size=torch.tensor([[7, 2, 3]])).length.tolist() == [5]


def test_given_fields_are_kept() -> None:
    size, position = torch.tensor([[2, 4]]), torch.tensor([[1, 9]])
    view = TokenView(torch.randn(1, 2, 2), size=size, position=position, length=torch.tensor([11]), grid=(1, 1, 2))
    assert view.size is size and view.position is position
    assert view.length.tolist() == [11] and view.grid == (1, 1, 2)


@prop(40)
@given(views())
def test_free_is_valid_and_unprotected(view: TokenView) -> None:
    for valid, protected, free in zip(
        view.valid.flatten().tolist(), view.protected.flatten().tolist(), view.free.flatten().tolist(), strict=True
    ):
        assert free is (valid and not protected)


@pytest.mark.parametrize(
    ("valid", "answer"),
    [
        ([[1, 1], [1, 1]], True),
        ([[0, 1], [1, 1]], True),
        ([[1, 0], [1, 1]], False),
        ([[1, 0], [0, 1]], False),
    ],
)
def test_pads_left(valid: list[list[int]], answer: bool) -> None:
    assert TokenView(torch.zeros(2, 2, 1), valid=torch.tensor(valid).bool()).pads_left is answer


def test_hidden_of_the_wrong_rank_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hidden must be \(batch, tokens, features\), got shape \(3, 4\)"):
        TokenView(torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("valid", torch.bool), ("protected", torch.bool), ("position", torch.long), ("size", torch.long)],
)
@pytest.mark.parametrize("shape", [(2, 5), (1, 4), (2, 4, 1)])
def test_a_field_of_the_wrong_shape_is_named(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    field: dict[str, Any] = {name: torch.ones(shape, dtype=dtype)}
    with pytest.raises(ValueError) as error:
        TokenView(torch.zeros(2, 4, 3), **field)
    assert str(error.value) == f"{name} must have shape (2, 4), got {shape}"


def test_a_length_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="length must have shape"):
        TokenView(torch.zeros(2, 4, 3), length=torch.ones(3, dtype=torch.long))


def test_a_row_of_padding_is_refused() -> None:
    with pytest.raises(ValueError, match="valid must mark at least one token in every row"):
        TokenView(torch.zeros(2, 2, 1), valid=torch.tensor([[True, False], [False, False]]))


def test_no_tokens_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="valid must mark at least one token"):
        TokenView(torch.zeros(2, 0, 1))


def test_a_view_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        TokenView(torch.zeros(1, 1, 1)).grid = (1, 1, 1)


def test_a_prefix_says_what_the_masks_would() -> None:
    view = TokenView(torch.randn(2, 5, 3), prefix=2)
    assert view.valid.all() and view.protected.tolist() == [[True, True, False, False, False]] * 2
    assert view.position.tolist() == [[0, 1, 2, 3, 4]] * 2 and view.size.tolist() == [[1] * 5] * 2
    assert view.length.tolist() == [5, 5] and view.free.tolist() == [[False, False, True, True, True]] * 2
    assert not view.pads_left  # the prefix stays in front whatever a ragged plan leaves
    assert TokenView(torch.randn(1, 3, 1), prefix=0).free.all()
    place = torch.tensor([[0, 4, 9]])
    assert TokenView(torch.randn(1, 3, 1), prefix=1, position=place).position is place


def test_a_prefix_replaces_masks_and_is_a_whole_number() -> None:
    hidden, mask = torch.randn(1, 3, 1), torch.ones(1, 3, dtype=torch.bool)
    for masks in ({"valid": mask}, {"protected": mask}):
        with pytest.raises(ValueError, match="valid and protected must be left out where prefix is given"):
            TokenView(hidden, prefix=1, **masks)
    for bad in (-1, 1.0, True):
        with pytest.raises(ValueError, match="prefix must be a whole number of at least 0"):
            TokenView(hidden, prefix=bad)


@prop(40)
@given(views(exempt=True))
def test_what_budgets_count_is_all_but_the_exempt_tokens(view: TokenView) -> None:
    for row in range(len(view.valid)):
        there = view.valid[row].nonzero().flatten().tolist()
        exempt = [j for j in there if bool(view.exempt[row, j])]
        assert view.counted[row].nonzero().flatten().tolist() == [j for j in there if j not in exempt]
        assert int(view.counted_length[row]) == int(view.length[row]) - sum(int(view.size[row, j]) for j in exempt)


def test_exempt_tokens_must_be_protected() -> None:
    mask = torch.tensor([[True, False]])
    with pytest.raises(ValueError, match="exempt must be protected tokens alone, got others among them"):
        TokenView(torch.zeros(1, 2, 1), exempt=mask)
    with pytest.raises(ValueError, match=r"exempt must have shape \(1, 2\), got \(1, 1\)"):
        TokenView(torch.zeros(1, 2, 1), exempt=mask[:, :1])
    with pytest.raises(ValueError, match="exempt must be left out where there is a prefix, got both"):
        TokenView(torch.zeros(1, 2, 1), prefix=1, exempt=mask)


def test_a_token_stands_for_one_at_least() -> None:
    size = torch.tensor([[1, 0, 2]])
    with pytest.raises(ValueError, match="size must be at least 1 for every token, got less"):
        TokenView(torch.zeros(1, 3, 2), size=size)
    assert TokenView(torch.zeros(1, 3, 2), size=size, valid=torch.tensor([[True, False, False]])).length.tolist() == [1]
