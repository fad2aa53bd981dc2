"""Which patches a visual token is made of, against arrangements that are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from quickmerge.merge.visual.made_of import Making, made_of

SIDE, WIDTH = 6, 8


class Eyes(nn.Module):
    """Two blocks, and a way from what they give to visual tokens."""

    def __init__(self, arrange: Callable[[Tensor], list[Tensor]], read: int = -1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.arrange, self.read = arrange, read

    def forward(self, patches: Tensor) -> list[Tensor]:
        states = []
        for block in self.blocks:
            patches = block(patches)
            states.append(patches)
        return self.arrange(states[self.read])


def asked(arrange: Callable[[Tensor], list[Tensor]], images: int = 2, read: int = -1) -> Making:
    torch.manual_seed(0)
    eyes, patches = Eyes(arrange, read), torch.randn(images, SIDE * SIDE + 1, WIDTH)
    with torch.no_grad():
        plain = eyes(patches)
        making = made_of(list(eyes.blocks), lambda: eyes(patches))
        assert all(torch.equal(a, b) for a, b in zip(eyes(patches), plain, strict=True))
    assert not any(block._forward_hooks for block in eyes.blocks)
    return making


def columns(x: Tensor) -> list[Tensor]:
    """Squares of 2 x 2 patches behind a class token, column by column, with a newline behind each column."""
    grid = x[:, 1:].view(len(x), SIDE // 2, 2, SIDE // 2, 2, WIDTH).transpose(1, 3)
    square = grid.permute(0, 1, 3, 4, 2, 5).flatten(3)
    newline = torch.ones(len(x), SIDE // 2, 1, square.shape[-1])
    return list(torch.cat([square, newline], 2).flatten(1, 2))


def test_squares_in_an_order_of_their_own_with_newlines() -> None:
    making = asked(columns)
    per, side = SIDE // 2 * (SIDE // 2 + 1), SIDE // 2
    assert making.why == "" and making.count == 2 * per and making.block == 1
    token = making.token.view(2, SIDE * SIDE + 1)
    assert token[:, 0].tolist() == [-1, -1]
    for image in range(2):
        for y in range(SIDE):
            for x in range(SIDE):
                assert token[image, 1 + y * SIDE + x] == image * per + (x // 2) * (side + 1) + y // 2
    assert making.apart.view(-1, side + 1).tolist() == [[False] * side + [True]] * (2 * side)
    # What is told of patches is told of tokens: sums and means, and nothing of newlines.
    told = torch.arange(len(making.token), dtype=torch.bfloat16)
    sums = torch.stack([told[making.token == t].float().sum() for t in range(making.count)])
    assert torch.equal(making.sums(told), sums) and making.sums(told).dtype == torch.float32
    count = torch.where(making.apart, 1, 4)
    assert torch.equal(making.means(told), sums / count)


def test_the_block_that_is_read_is_the_one_that_is_told() -> None:
    making = asked(lambda x: [x[:, 1:].mean(1)], read=0)
    assert making.block == 0 and making.count == 2
    assert making.token.view(2, -1)[:, 1:].unique(dim=1).tolist() == [[0], [1]]


@pytest.mark.parametrize(
    ("arrange", "why"),
    [
        (lambda x: [x.softmax(1) @ torch.ones(WIDTH, 3) + x.sum(1, keepdim=True)[..., :3]], "several"),
        (lambda x: [nn.functional.avg_pool1d(x.mT, 3, 2).mT], "several"),
        (lambda x: [torch.ones(4, WIDTH)[(x[..., 0] > 0).long()]], "codes"),
        (lambda x: [(torch.ones(4, 3, requires_grad=True) * 2)], "not made of"),
    ],
    ids=["mixed", "overlapping", "codes", "elsewhere"],
)  # fmt: skip
def test_what_cannot_be_told_says_why(arrange: Callable[[Tensor], list[Tensor]], why: str) -> None:
    making = asked(arrange)
    assert why in making.why and making.block == -1


def test_a_single_token_and_inference_mode() -> None:
    with torch.inference_mode():
        making = made_of([block := nn.Linear(WIDTH, WIDTH)], lambda: [block(torch.zeros(1, 5, WIDTH)).sum(1)])
    assert making.why == "" and making.token.tolist() == [0] * 5
