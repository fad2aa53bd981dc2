from __future__ import annotations

import pytest
import torch
from vision_zoo import build, pixels

import quickmerge as qm
from quickmerge.merge.reducers.pooling import GridMerge
from quickmerge.merge.tokens.removal import Removal
from quickmerge.merge.tokens.selection import disperse
from quickmerge.merge.vision.vit import encode_frames


def videos(rows: int = 2, frames: int = 3) -> torch.Tensor:
    return torch.randn(rows, frames, 3, 48, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", ["dinov2-registers", "siglip"])
def test_keeping_all_is_every_frame_on_its_own(name: str) -> None:
    model, x = build(name, dtype=torch.float64), videos()
    prefix = 5 if name == "dinov2-registers" else 0
    with torch.no_grad():
        out = encode_frames(model, x, GridMerge(keep=1.0))
        alone = model(x[1, 2][None]).last_hidden_state[0]
    assert out.grid == (3, 6, 6) and out.frame_tokens == 36 and out.hidden.shape == (2, 108, 32)
    torch.testing.assert_close(out.hidden[1, 72:], alone[prefix:])
    torch.testing.assert_close(out.special[1, 2], alone[:prefix])
    torch.testing.assert_close(out.unmerge(), out.hidden)


@pytest.mark.parametrize("across", [GridMerge(keep=0.25), qm.ToMe(keep=0.25), qm.Random(keep=0.25)])
@pytest.mark.parametrize("inside", [None, Removal(4)])
def test_patches_are_followed_to_their_slots(across: qm.Reducer, inside: Removal | None) -> None:
    model, x = build("vit", dtype=torch.float64), videos()
    with torch.no_grad():
        out = encode_frames(model, x, across, reducer=None if inside is None else qm.ToMe(), layer=inside)
    assert out.frame_tokens == (36 if inside is None else 36 - 16)
    assert out.hidden.shape == (2, 27, 32)
    counts = torch.zeros(2, 27, dtype=torch.long)
    for row in range(2):
        for slot in out.slot[row].tolist():
            if slot >= 0:
                counts[row, slot] += 1
    assert torch.equal(counts, out.size)
    if across.name != "random":
        assert bool((out.slot >= 0).all())
    far = out.unmerge()
    for row in range(2):
        torch.testing.assert_close(far[row, out.position[row]], out.hidden[row])


def test_what_stands_still_merges_across_time() -> None:
    """Most patches that do not change share their slot with the next frame; of those that do, fewer."""
    model = build("vit", dtype=torch.float64)

    def shared(x: torch.Tensor) -> float:
        with torch.no_grad():
            slot = encode_frames(model, x, GridMerge(keep=0.25)).slot.reshape(4, 36)
        return float((slot[1:] == slot[:-1]).double().mean())

    still, moving = shared(videos(1, 1).expand(-1, 4, -1, -1, -1)), shared(videos(1, 4))
    assert still > 0.5 and still > 1.5 * moving


@pytest.mark.parametrize("across", [qm.SCOPE(keep=0.25), qm.TrimTokenator(keep=0.25, aligned=1)])
def test_what_is_kept_of_a_video_is_the_choice_among_all_its_patches(across: qm.Reducer) -> None:
    model, x = build("dinov2", dtype=torch.float64), videos()
    with torch.no_grad():
        out = encode_frames(model, x, across)
        features = encode_frames(model, x, GridMerge(keep=1.0)).hidden
    assert out.hidden.shape == (2, 27, 32) and bool((out.size == 1).all())
    for row in range(2):
        torch.testing.assert_close(out.hidden[row], features[row, out.position[row]])
    if isinstance(across, qm.TrimTokenator):
        assert torch.equal(out.position, disperse(features, 27).index)


@pytest.mark.parametrize("reducer", [qm.SCOPE(keep=0.5), qm.TrimTokenator(keep=0.5, aligned=1)])
def test_choosing_inside_a_plain_vision_transformer(reducer: qm.Reducer) -> None:
    model, x = build("dinov2", dtype=torch.float64), videos()[:, 0]
    with qm.reduce(model, reducer, layer=2) as run, torch.no_grad():
        model(x)
    assert run.call.last.slot.shape == (2, 37) and bool((run.call.last.size == 1).all())
    assert (run.call.last.slot[:, 0] == 0).all() and len(run.call.last.size[0]) < 24
    if isinstance(reducer, qm.TrimTokenator):
        with qm.reduce(model, qm.TrimTokenator(keep=0.5), layer=2), pytest.raises(ValueError, match="aligned=1"):
            model(x)


def test_bad_input_is_told() -> None:
    with pytest.raises(ValueError, match=r"videos \(B, T, C, H, W\)"):
        encode_frames(build("vit"), pixels("vit"), qm.ToMe())
    with pytest.raises(ValueError, match="VivitModel reads videos"):
        encode_frames(build("vivit"), pixels("vivit"), qm.ToMe())
