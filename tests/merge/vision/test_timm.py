from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm_bootstrap  # noqa: F401  (makes timm importable beside a torch without CUDA)
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from vision_zoo import match_slowly

import quickmerge as qm
from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.merge.tokens import MergePlan, TokenView
from quickmerge.merge.tokens.removal import Removal
from quickmerge.models.encoder import RUN, find_timm_encoder, holds_timm

timm = pytest.importorskip("timm", reason="timm is not installed (pip install quickmerge[vision])")

DEPTH, R, PATCHES = 3, 7, 36
SIZES: dict[str, Any] = {
    "img_size": 48,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": DEPTH,
    "num_heads": 4,
    "num_classes": 3,
}
# name: (model of timm, settings of its own, tokens in front of the patches)
ZOO: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit": ("vit_tiny_patch16_224", {}, 1),
    "deit": ("deit_tiny_patch16_224", {}, 1),
    "deit-distilled": ("deit_tiny_distilled_patch16_224", {}, 2),
    "deit3": ("deit3_small_patch16_224", {}, 1),
    "dinov2": ("vit_small_patch14_dinov2", {}, 1),
    "dinov2-registers": ("vit_small_patch14_reg4_dinov2", {}, 5),
    "dinov2-swiglu": ("vit_giant_patch14_dinov2", {"mlp_ratio": 2.0}, 1),
    "clip": ("vit_base_patch32_clip_224", {}, 1),
    "siglip": ("vit_base_patch16_siglip_224", {}, 0),
    "gap": ("vit_medium_patch16_gap_240", {}, 0),
    "mean": ("vit_tiny_patch16_224", {"global_pool": "avg", "qk_norm": True}, 1),
    "mean-of-all": ("vit_tiny_patch16_224", {"global_pool": "avg", "pool_include_prefix": True, "reg_tokens": 2}, 3),
    "mean-and-max": ("vit_tiny_patch16_224", {"global_pool": "avgmax", "fc_norm": False}, 1),
    "prr": ("vit_tiny_patch16_224", {"global_pool": "prr", "scale_attn_norm": True, "scale_mlp_norm": True}, 1),
    "hybrid": ("vit_tiny_r_s16_p8_224", {"img_size": 192}, 1),
}
SMALL = [name for name in ZOO if name != "hybrid"]


def build(name: str, dtype: torch.dtype = torch.float32, fused: bool = True, **more: Any) -> Any:
    """A random model of a family in eval mode, with weights so large that every token matters."""
    model_name, own, _ = ZOO[name]
    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES.items() if name != "hybrid" or k != "patch_size"}
    model = timm.create_model(model_name, pretrained=False, **{**sizes, **own, **more})
    for key, value in model.named_parameters():
        if key.startswith(("blocks", "attn_pool", "head", "norm", "fc_norm")):
            nn.init.normal_(value, mean=float("norm" in key and "weight" in key), std=0.3)
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model.to(dtype).eval()


def pixels(rows: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0, size: int = 48) -> Tensor:
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_untouched(model: nn.Module) -> None:
    for name, module in model.named_modules():
        assert not module._forward_hooks and not module._forward_pre_hooks, f"{name} has hooks left"
        assert RUN not in vars(module), f"{name} still holds a run"


def by_hand(model: Any, images: Tensor, r: int, prefix: int) -> tuple[list[Tensor], list[list[int]]]:
    """What every image's tokens are behind the last norm, and how many each stands for, one image at a time."""
    hidden = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    outputs, counts = [], []
    for row in hidden:
        x, size = row, [1] * len(row)
        for block in model.blocks:
            attention, normed = block.attn, block.norm1(x)
            q, k, v = attention.qkv(normed).view(len(x), 3, attention.num_heads, -1).permute(1, 2, 0, 3)
            q, k = attention.q_norm(q), attention.k_norm(k)
            score = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + torch.tensor(size).to(x).log()
            mixed = attention.norm((score.softmax(-1) @ v).transpose(0, 1).reshape(len(x), -1))
            y = x + block.ls1(attention.proj(mixed))
            goes = match_slowly(k.mean(0), prefix, r)
            groups = [[j, *[i for i, to in goes.items() if to == j]] for j in range(len(y)) if j not in goes]
            x = torch.stack([sum(y[m] * size[m] for m in g) / sum(size[m] for m in g) for g in groups])
            size = [sum(size[m] for m in g) for g in groups]
            x = x + block.ls2(block.mlp(block.norm2(x)))
        outputs.append(model.norm(x))
        counts.append(size)
    return outputs, counts


# Nothing taken out, nothing left behind ---------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_zero_reduction_is_bit_equal_and_some_reduction_is_not(name: str, fused: bool) -> None:
    size, prefix = (192 if name == "hybrid" else 48), ZOO[name][2]
    model, x = build(name, fused=fused), pixels(size=size)
    total = PATCHES + prefix
    plain, features, names = model(x), model.forward_features(x), list(model.state_dict())
    maps = model.forward_intermediates(x, intermediates_only=True)
    for schedule in (Removal(0), Removal((0,) * DEPTH)):
        with qm.reduce(model, qm.ToMe(), schedule) as run:
            assert torch.equal(model(x), plain) and torch.equal(model.forward_features(x), features)
            for got, want in zip(model.forward_intermediates(x, intermediates_only=True), maps, strict=True):
                assert torch.equal(got, want)
        assert run.summary().tokens_per_block == [total] * DEPTH
    with qm.reduce(model, qm.ToMe(), Removal(R)) as run:
        merged = model(x)
        assert run.summary().tokens_per_block == [total - R * (b + 1) for b in range(DEPTH)]
        assert (run.summary().prefix, run.summary().tokens_in) == (prefix, total)
        assert model.forward_features(x).shape[1] == total - R * DEPTH
        assert list(model.state_dict()) == names
    assert not torch.equal(merged, plain) and merged.shape == plain.shape
    assert torch.equal(model(x), plain)
    assert_untouched(model)


@pytest.mark.parametrize("where", ["plan", "block", "body", "pixels"])
def test_no_exception_leaves_a_trace(where: str) -> None:
    class Broken(qm.ToMe):
        def plan(self, view: TokenView) -> MergePlan:
            raise RuntimeError("no plan")

    def fail(*args: Any) -> None:
        raise RuntimeError("no block")

    model, x = build("vit"), pixels()
    handle = model.blocks[1].register_forward_pre_hook(fail) if where == "block" else None
    error = ValueError if where == "pixels" else RuntimeError
    with pytest.raises(error), qm.reduce(model, Broken() if where == "plan" else qm.ToMe(), Removal(R)):
        model(x[0] if where == "pixels" else x)
        raise RuntimeError("no body")
    if handle is not None:
        handle.remove()
    assert_untouched(model)


def test_two_runs_at_once_are_refused() -> None:
    model = build("vit")
    with qm.reduce(model, qm.ToMe(), Removal(R)) as run:
        with pytest.raises(UnsupportedModelError, match="already inside"):
            qm.reduce(model, qm.ToMe(), Removal(R))
        with pytest.raises(UnsupportedModelError, match="already inside"):
            run.__enter__()
    assert_untouched(model)


@torch.no_grad()
def test_a_copy_and_a_loaded_state_are_the_plain_model() -> None:
    model, x = build("dinov2"), pixels()
    plain = model(x)
    with qm.reduce(model, qm.ToMe(), Removal(R)) as run:
        merged = model(x)
        twin, call = copy.deepcopy(model), run.call
        assert_untouched(twin)
        assert torch.equal(twin(x), plain) and run.call is call
        with qm.reduce(twin, qm.ToMe(), Removal(R)):
            assert torch.equal(twin(x), merged)
        other = build("dinov2")
        other.load_state_dict(model.state_dict())
        assert torch.equal(model(x), merged)
    assert_untouched(model)
    assert torch.equal(model(x), plain) and torch.equal(twin(x), plain) and torch.equal(other(x), plain)


# The maths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [3, 1000])
@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_tome_equals_its_slow_statement_in_float64(name: str, r: int) -> None:
    """Tokens and sizes, and the logits: what is pooled is pooled as if every token were still there."""
    model, x, prefix = build(name, torch.float64), pixels(2, torch.float64), ZOO[name][2]
    outputs, sizes = by_hand(model, x, r, prefix)
    with qm.reduce(model, qm.ToMe(), Removal(r)) as run:
        got, logits = model.forward_features(x), model(x)
    for row, (want, size) in enumerate(zip(outputs, sizes, strict=True)):
        torch.testing.assert_close(got[row], want, rtol=1e-9, atol=1e-9)
        assert run.call.last.size[row].tolist() == size and sum(size) == PATCHES + prefix
        heavy = torch.tensor(size).to(want)[:, None]
        start = 0 if model.pool_include_prefix else prefix
        mean = (want * heavy)[start:].sum(0) / heavy[start:].sum()
        if name == "deit-distilled":
            logit = (model.head(want[0]) + model.head_dist(want[1])) / 2
        elif name == "prr":  # every token attends to all with its own features for query, key and value
            z = want.view(len(want), 4, -1).transpose(0, 1)
            score = (z @ z.transpose(1, 2) / z.shape[-1] ** 0.5 + heavy[:, 0].log()).softmax(-1)
            logit = model.head(model.fc_norm((score @ z).transpose(0, 1).reshape(len(want), -1)[0]))
        elif name == "siglip":
            pool = model.attn_pool
            k, v = pool.kv(want[prefix:]).view(len(want) - prefix, 2, pool.num_heads, -1).permute(1, 2, 0, 3)
            q = pool.q(pool.latent[0]).view(1, pool.num_heads, -1).transpose(0, 1)
            score = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + heavy[prefix:, 0].log()
            mixed = pool.proj((score.softmax(-1) @ v).transpose(0, 1).reshape(1, -1))
            logit = model.head(model.fc_norm((mixed + pool.mlp(pool.norm(mixed)))[0]))
        elif model.global_pool == "avgmax":
            logit = model.head(model.fc_norm((mean + want[prefix:].amax(0)) / 2))
        else:
            logit = model.head(model.fc_norm(mean if model.global_pool == "avg" else want[0]))
        torch.testing.assert_close(logits[row], logit, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["mean", "dinov2"])
@torch.no_grad()
def test_a_method_sees_the_attention_that_the_block_computed(name: str) -> None:
    traces = []

    class Watching(qm.ToMe):
        def plan(self, view: TokenView) -> MergePlan:
            traces.append((view, view.evidence.attention[0]))
            return super().plan(view)

    model, x, mixed = build(name, torch.float64), pixels(2, torch.float64), []
    for block in model.blocks:
        block.attn.proj.register_forward_pre_hook(lambda module, args: mixed.append(args[0]))
    with qm.reduce(model, Watching(), Removal((R, 0, R))):
        model(x)
    assert len(traces) == 2
    for (view, trace), want in zip(traces, mixed[::2], strict=True):
        score = trace.query @ trace.key.transpose(2, 3) * trace.scaling + view.size.double().log()[:, None, None]
        got = (score.softmax(-1) @ trace.value).transpose(1, 2).flatten(2)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(
    r=st.lists(st.integers(0, 40), min_size=DEPTH, max_size=DEPTH),
    rows=st.integers(1, 3),
    pruned=st.booleans(),
    unmerge=st.booleans(),
)
@torch.no_grad()
def test_a_batch_equals_its_rows_and_loses_no_token(r: list[int], rows: int, pruned: bool, unmerge: bool) -> None:
    model, x = build("mean", torch.float64), pixels(rows, torch.float64)
    reducer = qm.TopNorm() if pruned else qm.ToMe()
    with qm.reduce(model, reducer, Removal(tuple(r)), unmerge=unmerge) as run:
        features, logits = model.forward_features(x), model(x)
        level = run.call.last
        for row in range(rows):
            one = x[row : row + 1]
            torch.testing.assert_close(features[row : row + 1], model.forward_features(one), rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(logits[row : row + 1], model(one), rtol=1e-9, atol=1e-9)
    assert features.shape[1] == (PATCHES + 1 if unmerge else run.summary().tokens_per_block[-1])
    if level is not None:
        assert pruned or level.size.sum(1).tolist() == [PATCHES + 1] * rows
        assert bool((level.slot[:, 0] == 0).all()) and bool((level.slot[:, 1:] != 0).all())


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_half_precision_stays_near(name: str) -> None:
    model, x = build(name), pixels()
    plain, half = model(x), build(name).to(torch.bfloat16)(x.to(torch.bfloat16))
    with qm.reduce(model, qm.Uniform(), Removal(R)):  # what is kept does not depend on rounding
        want = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(x)
        got = model.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert got.dtype == torch.bfloat16
    error = (half.float() - plain).abs().mean()
    assert (got.float() - want).abs().mean() < 3 * error + 1e-3
    assert (cast.float() - want).abs().mean() < 3 * error + 1e-3


# What comes out -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "dinov2-registers", "siglip", "mean"])
@pytest.mark.parametrize("reducer", [qm.ToMe(), qm.Uniform()])
@torch.no_grad()
def test_unmerge_gives_every_patch_its_slot(name: str, reducer: Any) -> None:
    model, x, prefix = build(name), pixels(), ZOO[name][2]
    with qm.reduce(model, reducer, Removal(R)) as run:
        short, logits, slot = model.forward_features(x), model(x), run.call.last.slot
    with qm.reduce(model, reducer, Removal(R), unmerge=True):
        long = model.forward_features(x)
        assert torch.equal(model(x), logits)
        final, normed = model.forward_intermediates(x, norm=True, output_fmt="NLC")
        again, maps = model.forward_intermediates(x, return_prefix_tokens=prefix > 0)
        early = model.forward_intermediates(x, [1], stop_early=True, intermediates_only=True)
    assert long.shape[1] == PATCHES + prefix
    for row in range(2):
        kept = slot[row] >= 0
        torch.testing.assert_close(long[row][kept], short[row][slot[row][kept]])
        assert bool((long[row][~kept] == 0).all())
    assert torch.equal(final, long) and torch.equal(again, long) and torch.equal(normed[-1], long[:, prefix:])
    spatial = [each[0] for each in maps] if prefix else maps
    assert [each.shape for each in spatial] == [(2, 32, 6, 6)] * DEPTH
    assert torch.equal(early[0], spatial[1])
    for depth, each in enumerate(normed):
        gone = (each == 0).all(-1).sum(1).tolist()
        assert gone == [R * (depth + 1) if isinstance(reducer, qm.Uniform) else 0] * 2
    # The norm makes of the last block's map what forward_features gives, where nothing was dropped.
    rows = model.norm(spatial[-1].flatten(2).transpose(1, 2))
    gone = (slot[:, prefix:] < 0)[..., None]
    torch.testing.assert_close(torch.where(gone, 0.0, rows), long[:, prefix:])


@torch.no_grad()
def test_every_intermediate_is_the_slots_of_its_own_depth() -> None:
    """The r-th map of a run is the last map of a run that stops reducing there."""
    model, x = build("dinov2", torch.float64), pixels(2, torch.float64)
    with qm.reduce(model, qm.ToMe(), Removal(R), unmerge=True):
        maps = model.forward_intermediates(x, intermediates_only=True, output_fmt="NLC")
    for depth in range(DEPTH):
        head = copy.deepcopy(model)
        head.blocks, head.norm = head.blocks[: depth + 1], nn.Identity()
        with qm.reduce(head, qm.ToMe(), Removal((R,) * (depth + 1)), unmerge=True):
            torch.testing.assert_close(maps[depth], head.forward_features(x)[:, 1:], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_what_would_go_wrong_in_silence_is_refused() -> None:
    model, x = build("mean"), pixels()
    with qm.reduce(model, qm.ToMe(), Removal(R)):
        with pytest.raises(QuickmergeError, match="unmerge must be True"):
            model.forward_intermediates(x)
        short = model.forward_features(x)
        with pytest.raises(QuickmergeError, match="forward_head would count a slot once"):
            model.forward_head(short)
        want = model(x)
        with pytest.raises(QuickmergeError, match="attn_mask must be None"):
            model(x, attn_mask=torch.zeros(37, 37))
    with qm.reduce(model, qm.ToMe(), Removal(R), unmerge=True):
        torch.testing.assert_close(model.forward_head(model.forward_features(x)), want)
    with qm.reduce(model, qm.Uniform(), Removal(R), unmerge=True):
        features = model.forward_features(x)
        with pytest.raises(QuickmergeError, match="call the model itself"):
            model.forward_head(features)
    token = build("vit")
    with qm.reduce(token, qm.ToMe(), Removal(R)):
        torch.testing.assert_close(token.forward_head(token.forward_features(x)), token(x))
    drops = build("vit", patch_drop_rate=0.5).train()
    with qm.reduce(drops, qm.ToMe(), Removal(R)), pytest.raises(QuickmergeError, match="patch_drop must leave all 37"):
        drops(x)


@torch.no_grad()
def test_a_module_around_a_tower_reads_every_token() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = build("gap", torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.tower.forward_features(x).mean(1)

    model, x = Around(), pixels(2, torch.float64)
    outputs, sizes = by_hand(model.tower, x, R, 0)
    with qm.reduce(model, qm.ToMe(), Removal(R)):
        got = model(x)
    for row, (tokens, size) in enumerate(zip(outputs, sizes, strict=True)):
        weight = torch.tensor(size).to(tokens)[:, None] / PATCHES
        torch.testing.assert_close(got[row], (tokens * weight).sum(0), rtol=1e-9, atol=1e-9)
    assert_untouched(model)
    features = timm.create_model("vit_tiny_patch16_224", features_only=True, **{**SIZES, "num_classes": 0}).eval()
    with qm.reduce(features, qm.ToMe(), Removal(R), unmerge=True) as run:
        assert [each.shape for each in features(pixels())] == [(2, 32, 6, 6)] * 3
    assert run.summary().tokens_per_block[-1] == PATCHES + 1 - R * DEPTH


@torch.no_grad()
def test_a_budget_of_its_own_for_every_image() -> None:
    class Half(qm.TopNorm):
        def plan(self, view: TokenView) -> MergePlan:
            from quickmerge.merge.tokens.budget import select

            free = view.free.sum(-1)
            share = torch.where(view.hidden[:, 0, 0] > 0, 0.5, 0.33).double()
            count = view.valid.sum(-1) - free + (free * share).long()
            return MergePlan.from_anchors(view, select(self.score(view), count, view))

    model = build("mean", torch.float64)
    for block in model.blocks:
        block.attn.fused_attn = True
    x = pixels(6, torch.float64)
    x[::2] *= 3
    with qm.reduce(model, Half(keep=qm.Entropy()), [0, 2]) as run:
        whole = model(x)
        kept = (run.call.last.slot >= 0).sum(-1).tolist()
        for row in range(6):
            torch.testing.assert_close(whole[row : row + 1], model(x[row : row + 1]), rtol=1e-8, atol=1e-8)
    assert len(set(kept)) > 1


# Training, compiling, exporting -------------------------------------------------------------------------------------


class Before(qm.TopNorm):
    """Takes tokens out in front of the attention."""

    before = True


@pytest.mark.parametrize(
    ("name", "reducer", "entry"),
    [
        *((name, qm.ToMe(), "forward") for name in ("vit", "deit3", "dinov2-registers", "siglip")),
        ("mean", Before(), "forward"),
        ("mean", Before(), "intermediates"),
        ("vit", qm.ToMe(), "intermediates"),
        ("vit", qm.ToMe(), "features"),
    ],
)
def test_checkpointing_changes_no_gradient(name: str, reducer: Any, entry: str) -> None:
    def gradients(checkpointing: bool, backwards: str) -> dict[str, Tensor]:
        model = build(name, torch.float64, drop_path_rate=0.3).train()
        model.set_grad_checkpointing(checkpointing)

        def loss(seed: int) -> Tensor:
            torch.manual_seed(seed)
            x = pixels(2, torch.float64, seed=seed)
            if entry == "forward":
                return model(x).square().mean()
            if entry == "features":
                return model.forward_features(x)[..., ::3].square().mean()
            return sum(each[:, ::3].square().mean() for each in model.forward_intermediates(x)[1])  # type: ignore[return-value]

        with qm.reduce(model, reducer, Removal(R), unmerge=entry != "forward") as run:
            first, call, second = loss(0), run.call, loss(1)
            assert run.call is not call
            if backwards == "together":
                (first + second).backward()
            else:
                first.backward()
                second.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    plain = gradients(False, "together")
    assert any(bool((g != 0).any()) for g in plain.values())
    for backwards in ("together", "apart"):
        again = gradients(True, backwards)
        assert plain.keys() == again.keys()
        for key in plain:
            torch.testing.assert_close(again[key], plain[key], rtol=1e-8, atol=1e-10)


def test_checkpointing_that_cannot_be_followed_is_refused() -> None:
    model, x = build("vit").train(), pixels()
    model.set_grad_checkpointing()
    with qm.reduce(model, qm.ToMe(), Removal(R)):
        with pytest.raises(QuickmergeError, match="unmerge must be True"):
            model.forward_features(x)
        timm.layers.set_reentrant_ckpt(True)
        try:
            loss = model(x.requires_grad_()).square().mean()
            with pytest.raises(QuickmergeError, match="not reentrant"):
                loss.backward()
        finally:
            timm.layers.set_reentrant_ckpt(False)


def test_nothing_of_a_forward_is_kept_alive_by_its_run() -> None:
    model, x = build("vit").train(), pixels()
    model.set_grad_checkpointing()
    with qm.reduce(model, qm.ToMe(), Removal(R)) as run:
        for _ in range(3):
            model(x).square().mean()
        assert len(run._inputs) == 0
        loss = model(x).square().mean()
        assert len(run._inputs) == DEPTH
        loss.backward()
        del loss
        assert len(run._inputs) == 0


@pytest.mark.parametrize("name", ["vit", "mean"])
def test_gradients_against_finite_differences(name: str) -> None:
    model = build(name, torch.float64)
    x = pixels(1, torch.float64).requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    with qm.reduce(model, qm.ToMe(), Removal(R)):
        model(x).square().mean().backward()
        step = 1e-6
        with torch.no_grad():
            high, low = (model(x + s * step * direction).square().mean() for s in (1, -1))
    torch.testing.assert_close((x.grad * direction).sum(), (high - low) / (2 * step), rtol=1e-5, atol=1e-9)


@torch.no_grad()
def test_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    model, x = build("dinov2-registers", depth=2), pixels()
    with qm.reduce(model, qm.ToMe(), Removal(R)):
        want = model(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), want)
        assert torch.equal(model(x), want)
    assert_untouched(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov2-registers", "vit", "siglip", "mean", "deit3"])
@torch.no_grad()
def test_compiles_and_exports_without_harm(name: str) -> None:
    torch._dynamo.reset()
    model, x = build(name), pixels()
    with qm.reduce(model, qm.ToMe(), Removal(R)):
        want = model(x)
        for backend in ("eager", "inductor"):
            got = torch.compile(model, fullgraph=True, backend=backend)(x)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        got = torch.export.export(model, (x,)).module()(x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert torch.equal(model(x), want)
    assert_untouched(model)


# Settings -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_other_sizes_of_images() -> None:
    model = build("dinov2", dynamic_img_size=True, dynamic_img_pad=True)
    with qm.reduce(model, qm.ToMe(), Removal(R)) as run:
        model(pixels(size=78))
    assert run.summary().grid == (1, 10, 10) and run.summary().tokens_in == 101


@torch.no_grad()
def test_schedules_and_listed_blocks() -> None:
    model = build("vit")
    with qm.reduce(model, qm.ToMe(keep=0.6)) as run:
        model(pixels())
    assert abs(run.summary().tokens_kept / run.summary().tokens_in - 0.6) < 0.02
    with qm.reduce(model, qm.TopNorm(keep=0.5), [0, 2]) as run:
        model(pixels())
    assert run.summary().tokens_per_block == [19, 19, 10]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"layer": 3}, "layer must be rising blocks in 0..2"),
        ({"layer": Removal((1, 2, 3, 4))}, "at most 3 numbers"),
        ({"layer": qm.Schedule((1,))}, "got a Schedule"),
        ({"mode": "block_causal"}, "mode is for language models"),
        ({"reducer": qm.Truncate()}, "reducer truncate is not for vision"),
    ],
)
def test_bad_settings_are_told(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qm.reduce(build("vit"), **{"reducer": qm.ToMe(), **more})


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "Eva": lambda: timm.create_model("eva02_tiny_patch14_224"),
    "Beit": lambda: timm.create_model("beit_base_patch16_224", depth=1),
    "LayerScaleBlock": lambda: timm.create_model("cait_xxs24_224", depth=1),
    "SwinTransformer": lambda: timm.create_model("swin_tiny_patch4_window7_224"),
    "ParallelScalingBlock": lambda: timm.create_model("vit_base_patch16_xp_224", depth=1),
    "ParallelThingsBlock": lambda: timm.create_model("vit_small_patch16_18x2_224", depth=1),
    "ResPostBlock": lambda: timm.create_model("vit_base_patch16_rpn_224", depth=1),
    "DiffAttention": lambda: timm.create_model("vit_dwee_patch16_reg1_gap_256", depth=1),
    "VisionTransformerRelPos": lambda: timm.create_model("vit_relpos_small_patch16_224", depth=1),
    "ResNet": lambda: timm.create_model("resnet18"),
    "ModuleList": lambda: nn.ModuleList([build("vit"), build("vit")]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_cannot_be_served_are_told_and_left_alone(name: str) -> None:
    with torch.device("meta") if name != "ModuleList" else torch.device("cpu"):
        model = OTHERS[name]()
    assert holds_timm(model)
    with pytest.raises(UnsupportedModelError, match=rf"{name}.*looked for"):
        qm.reduce(model, qm.ToMe(), Removal(R))
    assert_untouched(model)
    assert not holds_timm(nn.Linear(2, 2))


def test_the_parts_are_found() -> None:
    encoder = find_timm_encoder(build("siglip"))
    assert len(encoder) == DEPTH and encoder.config.hidden_size == 32
    assert encoder.pooler is encoder.base.attn_pool
    assert encoder.grid(pixels()) == (1, 6, 6)
