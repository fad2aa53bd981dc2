from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from vision_zoo import DEPTH, IMAGE, VISION_ZOO, build, pixels, tome_by_hand

import quickmerge as qm
from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.merge.tokens import MergePlan, TokenView
from quickmerge.merge.tokens.removal import Removal
from quickmerge.models.encoder import find_encoder

R = 7


def patches(name: str) -> int:
    return 72 if "num_frames" in VISION_ZOO[name][2] else 36


def output(model: Any, x: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(x, **more).last_hidden_state  # type: ignore[no-any-return]


# Nothing taken out, nothing left behind ---------------------------------------------------------------------------


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", VISION_ZOO)
def test_zero_reduction_is_bit_equal_and_some_reduction_is_not(
    name: str, attn: str, untouched: Callable[[Any], Any]
) -> None:
    model, x, prefix = untouched(build(name, attn)), pixels(name), VISION_ZOO[name][3]
    plain = output(model, x)
    total = patches(name) + prefix
    for schedule in (Removal(0), Removal((0,) * DEPTH)):
        with qm.reduce(model, qm.ToMe(), schedule) as run:
            assert torch.equal(output(model, x), plain)
        assert run.summary().tokens_per_block == [total] * DEPTH
    with qm.reduce(model, qm.ToMe(keep=1.0)):
        assert torch.equal(output(model, x), plain)
    # A second model: transformers' own recorders stay on a model for ever.
    recorded = build(name, attn)
    with torch.no_grad(), qm.reduce(recorded, qm.ToMe(), Removal(R)) as run:
        out = recorded(x, output_hidden_states=True)
    assert out.last_hidden_state.shape[1] == total - R * DEPTH
    assert run.summary().tokens_per_block == [total - R * (b + 1) for b in range(DEPTH)]
    assert run.summary().prefix == prefix and run.summary().tokens_in == total
    if out.hidden_states is not None:
        assert [h.shape[1] for h in out.hidden_states[: DEPTH + 1]] == [total - R * b for b in range(DEPTH + 1)]
    with qm.reduce(model, qm.ToMe(), Removal(R)):
        assert torch.equal(output(model, x), out.last_hidden_state)
    assert torch.equal(output(model, x), plain)


@pytest.mark.parametrize("where", ["plan", "block", "body"])
def test_no_exception_leaves_a_trace(where: str, untouched: Callable[[Any], Any]) -> None:
    class Broken(qm.ToMe):
        def plan(self, view: TokenView) -> MergePlan:
            raise RuntimeError("no plan")

    model, x = untouched(build("vit")), pixels("vit")
    plain = output(model, x)

    def fail(*args: Any) -> None:
        raise RuntimeError("no block")

    handle = model.layers[2].register_forward_pre_hook(fail) if where == "block" else None
    with pytest.raises(RuntimeError), qm.reduce(model, Broken() if where == "plan" else qm.ToMe(), Removal(R)):
        output(model, x)
        raise RuntimeError("no body")
    if handle is not None:
        handle.remove()
    assert torch.equal(output(model, x), plain)


def test_two_runs_at_once_are_refused() -> None:
    model = build("vit")
    with qm.reduce(model, qm.ToMe(), Removal(R)), pytest.raises(UnsupportedModelError, match="already inside"):
        qm.reduce(model, qm.ToMe(), Removal(R))


# The maths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [3, 11, 1000])
@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "dinov2-registers", "siglip", "clip"])
def test_tome_equals_its_slow_statement_in_float64(name: str, r: int) -> None:
    model, x = build(name, dtype=torch.float64), pixels(name, 2, torch.float64)
    prefix = VISION_ZOO[name][3]
    with torch.no_grad():
        outputs, sizes = tome_by_hand(model, x, r, prefix)
        with qm.reduce(model, qm.ToMe(), Removal(r)) as run:
            got = model(x).last_hidden_state
    for row, (want, size) in enumerate(zip(outputs, sizes, strict=True)):
        torch.testing.assert_close(got[row], want, rtol=1e-9, atol=1e-9)
        assert run.call.last.size[row].tolist() == size
        assert sum(size) == patches(name) + prefix


@pytest.mark.parametrize("name", VISION_ZOO)
def test_half_precision_stays_near(name: str) -> None:
    model, x = build(name), pixels(name)
    with qm.reduce(model, qm.Uniform(), Removal(R)):  # what is kept does not depend on rounding
        want = output(model, x)
        got = output(model.to(torch.bfloat16), x.to(torch.bfloat16))
        assert got.dtype == torch.bfloat16
    plain_model = build(name)
    error = (output(plain_model.to(torch.bfloat16), x.to(torch.bfloat16)).float() - output(build(name), x)).abs().mean()
    assert (got.float() - want).abs().mean() < 2 * error + 1e-3


@pytest.mark.parametrize("name", VISION_ZOO)
def test_a_batch_equals_its_rows(name: str) -> None:
    model, x = build(name, dtype=torch.float64), pixels(name, 3, torch.float64)
    with qm.reduce(model, qm.ToMe(), Removal(R)):
        whole = output(model, x)
        for row in range(3):
            torch.testing.assert_close(whole[row : row + 1], output(model, x[row : row + 1]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", VISION_ZOO)
def test_attention_with_sizes_is_attention_over_copies(name: str) -> None:
    """Dropping the copies of a token and counting it as many changes nothing (ToMe, eq. 1)."""

    class Copies(qm.ToMe):
        """Merges the even patches into the odd ones before them, which hold the same values here."""

        def plan(self, view: TokenView) -> MergePlan:
            n, p = view.hidden.shape[1], view.prefix or 0
            source = torch.arange(p + 1, n, 2).expand(len(view.hidden), -1)
            return MergePlan.from_moves(view, source, source - 1, view.size)

    if VISION_ZOO[name][3] == 5 and name == "dinov3":
        pytest.skip("two places can't be turned into one by rotation")
    if name.startswith("beit"):
        pytest.skip("relative positions of two places differ")
    model = build(name, dtype=torch.float64)
    p = VISION_ZOO[name][3]

    def twice(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[:, p + 1 :: 2] = out[:, p::2][:, : out[:, p + 1 :: 2].shape[1]]
        return out

    model.embeddings.register_forward_hook(twice)
    x = pixels(name, dtype=torch.float64)
    plain = output(model, x)
    with qm.reduce(model, Copies(), 0, unmerge=True) as run:
        merged = output(model, x)
    assert run.summary().tokens_per_block[0] == p + patches(name) // 2
    torch.testing.assert_close(merged, plain, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", VISION_ZOO)
def test_the_prefix_is_never_merged(name: str) -> None:
    model, prefix = build(name), VISION_ZOO[name][3]
    with qm.reduce(model, qm.ToMe(), Removal(1000)) as run:
        output(model, pixels(name))
    call = run.call
    assert call.last.slot[:, :prefix].tolist() == [list(range(prefix))] * 2
    assert bool((call.last.size[:, :prefix] == 1).all())
    assert bool((call.last.slot[:, prefix:] >= prefix).all())


# What comes out -----------------------------------------------------------------------------------------------------

HEADS = {
    "beit": "ForImageClassification",
    "beit-shared": "ForImageClassification",
    "deit": "ForImageClassification",
    "dinov2": "ForImageClassification",
    "dinov2-registers": "ForImageClassification",
    "vit": "ForImageClassification",
    "vivit": "ForVideoClassification",
    "videomae": "ForVideoClassification",
}


@pytest.mark.parametrize("reducer", [qm.ToMe(), qm.Uniform()])
@pytest.mark.parametrize("name", HEADS)
def test_a_head_pools_tokens_by_their_size(name: str, reducer: Any) -> None:
    """The logits are those of the head over every original token that was not dropped, with its slot's features."""
    more = {"use_mean_pooling": True} if name == "videomae" else {}
    model = build(name, dtype=torch.float64, head=HEADS[name], num_labels=3, **more)
    x = pixels(name, dtype=torch.float64)
    seen: dict[str, Any] = {}
    base = find_encoder(model).base
    handle = base.register_forward_hook(lambda module, args, out: seen.update(out=out))
    with torch.no_grad(), qm.reduce(model, reducer, Removal(R)) as run:
        logits = model(x).logits
    handle.remove()
    level, prefix = run.call.last, VISION_ZOO[name][3]
    with qm.reduce(base, reducer, Removal(R)):
        slots = output(base, x)
    weights = level.size[:, prefix:, None].to(slots)
    mean = (slots[:, prefix:] * weights).sum(1) / weights.sum(1)
    spread = seen["out"].last_hidden_state
    torch.testing.assert_close(spread[:, prefix:].mean(1), mean)
    if name.startswith("beit"):
        want = model.classifier(model.beit.pooler.layernorm(mean))
    elif name == "videomae":
        want = model.classifier(model.fc_norm(mean))
    elif name.startswith("dinov2"):
        # transformers takes registers for patches here; so does the statement.
        everything = torch.cat([slots[:, 1:prefix], slots[:, prefix:]], 1)
        heavy = level.size[:, 1:, None].to(slots)
        mean = (everything * heavy).sum(1) / heavy.sum(1) if prefix == 1 else spread[:, prefix:].mean(1)
        want = model.classifier(torch.cat([slots[:, 0], mean], 1))
    else:
        want = model.classifier(slots[:, 0])
    torch.testing.assert_close(logits, want)


def test_the_attention_pooling_of_siglip_adds_log_size() -> None:
    model, x = build("siglip", dtype=torch.float64), pixels("siglip", dtype=torch.float64)
    with torch.no_grad(), qm.reduce(model, qm.ToMe(), Removal(R)) as run:
        out = model(x)
    head, level = model.head, run.call.last
    with torch.no_grad():
        width, heads = model.config.hidden_size, model.config.num_attention_heads
        weight, shift = head.attention.in_proj_weight, head.attention.in_proj_bias
        y = out.last_hidden_state
        q = (head.probe.expand(2, -1, -1) @ weight[:width].T + shift[:width]).view(2, 1, heads, -1).transpose(1, 2)
        k, v = (
            (y @ weight[i * width : (i + 1) * width].T + shift[i * width : (i + 1) * width])
            .view(2, -1, heads, width // heads)
            .transpose(1, 2)
            for i in (1, 2)
        )
        score = q @ k.transpose(-1, -2) / (width // heads) ** 0.5 + level.size.log()[:, None, None]
        mixed = head.attention.out_proj((score.softmax(-1) @ v).transpose(1, 2).reshape(2, 1, width))
        want = (mixed + head.mlp(head.layernorm(mixed)))[:, 0]
    torch.testing.assert_close(out.pooler_output, want)


@pytest.mark.parametrize("name", VISION_ZOO)
def test_unmerge_gives_every_patch_its_slot(name: str) -> None:
    model, x = build(name), pixels(name)
    with qm.reduce(model, qm.ToMe(), Removal(R)) as run:
        short = output(model, x)
    with qm.reduce(model, qm.ToMe(), Removal(R), unmerge=True):
        long = output(model, x)
    assert long.shape[1] == patches(name) + VISION_ZOO[name][3]
    slot = run.call.last.slot
    for row in range(2):
        torch.testing.assert_close(long[row], short[row][slot[row]])
    with qm.reduce(model, qm.Uniform(), Removal(R), unmerge=True) as run:
        pruned = output(model, x)
    gone = run.call.last.slot < 0
    assert bool((pruned[gone] == 0).all()) and int(gone.sum()) == 2 * R * DEPTH


def test_a_budget_of_its_own_for_every_image() -> None:
    """Images keep different numbers of patches; a batch equals its rows all the same."""

    class Half(qm.TopNorm):
        """The longer half of the first image's patches, a third of the others'."""

        def plan(self, view: TokenView) -> MergePlan:
            score = self.score(view)
            share = torch.where(view.hidden[:, 0, 0] > 0, 0.5, 0.33).double()
            free = view.free.sum(-1)
            count = (view.valid.sum(-1) - free) + (free * share).long()
            from quickmerge.merge.tokens.budget import select

            return MergePlan.from_anchors(view, select(score, count, view))

    model = build("vit", dtype=torch.float64)
    x = pixels("vit", 6, torch.float64)
    with qm.reduce(model, Half(keep=qm.Entropy()), [0, 2], unmerge=True) as run:
        whole = output(model, x)
        kept = (run.call.last.slot >= 0).sum(-1).tolist()
        assert len(set(kept)) > 1
        for row in range(6):
            torch.testing.assert_close(whole[row : row + 1], output(model, x[row : row + 1]), rtol=1e-8, atol=1e-8)


COMPILED = ("dinov2-registers", "vit")
"""Compiled in every run of the tests; the others in the slow ones."""

# Training, compiling, exporting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VISION_ZOO)
def test_checkpointing_changes_no_gradient(name: str) -> None:
    def gradients(checkpointing: bool, backwards: str) -> dict[str, Tensor]:
        model = build(name, dtype=torch.float64).train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", None or model.gradient_checkpointing_enable)()
        with qm.reduce(model, qm.ToMe(), Removal(R)):
            first = model(pixels(name, dtype=torch.float64)).last_hidden_state[..., ::3].square().mean()
            second = model(pixels(name, dtype=torch.float64, seed=1)).last_hidden_state[..., ::3].square().mean()
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


@pytest.mark.parametrize("name", ["vit", "dinov2", "siglip"])
def test_gradients_against_finite_differences(name: str) -> None:
    model = build(name, dtype=torch.float64)
    x = pixels(name, 1, torch.float64).requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    with qm.reduce(model, qm.ToMe(), Removal(R)):
        model(x).last_hidden_state[..., ::3].square().mean().backward()
        step = 1e-6
        high, low = (output(model, x.detach() + s * step * direction)[..., ::3].square().mean() for s in (1, -1))
    slope = (x.grad * direction).sum()
    torch.testing.assert_close(slope, (high - low) / (2 * step), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "name", [*COMPILED, *(pytest.param(n, marks=pytest.mark.slow) for n in VISION_ZOO if n not in COMPILED)]
)
def test_compiles_as_one_graph_and_exports_without_harm(name: str, untouched: Callable[[Any], Any]) -> None:
    torch._dynamo.reset()
    model, x = untouched(build(name)), pixels(name)
    with torch.no_grad(), qm.reduce(model, qm.ToMe(), Removal(R)):
        want = model(x).last_hidden_state
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x).last_hidden_state, want)
        exported = torch.export.export(model, (x,)).module()(x)
        got = exported[0] if isinstance(exported, (tuple, list)) else exported.last_hidden_state
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert torch.equal(model(x).last_hidden_state, want)


class Pooled(nn.Module):
    """What an exporter takes: a module from a tensor to a tensor."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).last_hidden_state  # type: ignore[no-any-return]


@torch.no_grad()
@pytest.mark.parametrize("name", ["dinov2", pytest.param("siglip", marks=pytest.mark.slow)])
def test_exports_with_any_batch(name: str) -> None:
    model = Pooled(build(name, num_hidden_layers=2))
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    with qm.reduce(model.model, qm.ToMe(), Removal(R)):
        made = torch.export.export(model, (pixels(name, 3),), dynamic_shapes=shapes).module()
        for rows in (1, 2, 5):
            x = pixels(name, rows, seed=rows)
            torch.testing.assert_close(made(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.slow  # three graphs
def test_compiles_for_every_size_of_image() -> None:
    """How many tokens there are is a number to the compiler: over a symbol it would look for its bounds for hours."""
    torch._dynamo.reset()
    model = build("dinov2", num_hidden_layers=2)
    with qm.reduce(model, qm.ToMe(), Removal(R)):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for size in (IMAGE, 32, 64, IMAGE):
            x = pixels("dinov2", size=size)
            torch.testing.assert_close(compiled(x).last_hidden_state, model(x).last_hidden_state)


def test_the_number_of_tokens_is_known_to_a_compiler() -> None:
    """What makes the sizes after the first one come back, in the small: a graph for each size, not one for all."""
    torch._dynamo.reset()
    encoder = find_encoder(build("dinov2"))
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def tokens(x: Tensor) -> Tensor:
        _, height, width = encoder.grid(x)
        return x.flatten(1)[:, : height * width] + height * width

    compiled = torch.compile(tokens, fullgraph=True, backend=backend)
    for size in (48, 32, 64):
        assert torch.equal(compiled(pixels("dinov2", size=size)), tokens(pixels("dinov2", size=size)))
    assert len(graphs) == 3


@torch.no_grad()
@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)
@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_a_trace_is_refused(name: str, untouched: Callable[[Any], Any]) -> None:
    model, x = Pooled(untouched(build(name))), pixels(name)
    with (
        qm.reduce(model.model, qm.ToMe(), Removal(R)),
        pytest.raises(QuickmergeError, match=r"can't be traced by torch\.jit inside a quickmerge run.*torch\.export"),
    ):
        torch.jit.trace(model, x, check_trace=False)
    torch.jit.trace(model, x, check_trace=False)


def test_two_threads_on_one_run_do_not_mix() -> None:
    model = build("vit")
    images = [pixels("vit", 1, seed=seed, size=IMAGE) for seed in range(2)]
    with qm.reduce(model, qm.ToMe(), Removal(R)):
        want = [output(model, x) for x in images]
        got: list[list[Tensor]] = [[], []]
        halfway = threading.Barrier(2, timeout=30)

        def meet(*_: Any) -> None:
            halfway.wait()

        handle = model.layers[1].register_forward_pre_hook(meet)

        def look(index: int) -> None:
            got[index].append(output(model, images[index]))

        threads = [threading.Thread(target=look, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        handle.remove()
    assert all(torch.equal(mine[0], other) for mine, other in zip(got, want, strict=True))


@pytest.mark.slow
def test_compiles_with_the_default_backend() -> None:
    torch._dynamo.reset()
    model, x = build("dinov2"), pixels("dinov2")
    with torch.no_grad(), qm.reduce(model, qm.ToMe(), Removal(R)):
        want = model(x).last_hidden_state
        got = torch.compile(model, fullgraph=True)(x).last_hidden_state
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# Settings -----------------------------------------------------------------------------------------------------------


def test_keep_alone_means_an_even_removal() -> None:
    model = build("vit")
    with qm.reduce(model, qm.ToMe(keep=0.6)) as run:
        output(model, pixels("vit"))
    assert abs(run.summary().tokens_kept / run.summary().tokens_in - 0.6) < 0.02


def test_listed_blocks_keep_powers_of_the_share() -> None:
    model = build("vit")
    with qm.reduce(model, qm.TopNorm(keep=0.5), [1, 3]) as run:
        output(model, pixels("vit"))
    assert run.summary().tokens_per_block == [37, 19, 19, 10]


def test_other_sizes_of_images() -> None:
    model, x = build("dinov2"), pixels("dinov2", size=80)
    with qm.reduce(model, qm.ToMe(), Removal(R)) as run:
        output(model, x)
    assert run.summary().grid == (1, 10, 10) and run.summary().tokens_in == 101


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 4}, "layer must be rising blocks in 0..3"),
        ({"layer": [2, 1]}, "layer must be rising blocks"),
        ({"layer": True}, "layer must be rising blocks"),
        ({"layer": Removal((1, 2, 3, 4, 5))}, "at most 4 numbers"),
        ({"layer": qm.Schedule((1,))}, "got a Schedule"),
        ({"mode": "block_causal"}, "mode is for language models"),
        ({"reducer": qm.Truncate()}, "reducer truncate is not for vision"),
        ({"reducer": qm.ToMe(keep=qm.Entropy())}, "layer must say which blocks merge"),
        ({"reducer": "tome"}, "reducer must be a quickmerge reducer"),
    ],
)
def test_bad_settings_are_told(settings: dict[str, Any], message: str) -> None:
    reducer = settings.pop("reducer", qm.ToMe())
    with pytest.raises(ValueError, match=message):
        qm.reduce(build("vit"), reducer, **settings)


def test_models_that_cannot_be_served_are_told() -> None:
    swin = transformers.SwinModel(transformers.SwinConfig(image_size=32, embed_dim=8, depths=[1], num_heads=[1]))
    with pytest.raises(UnsupportedModelError, match="SwinModel"):
        find_encoder(swin)
    with pytest.raises(UnsupportedModelError, match="PreTrainedModel"):
        find_encoder(nn.Linear(2, 2))  # type: ignore[arg-type]
    model = build("vit")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UnsupportedModelError, match="flex_attention"):
        qm.reduce(model, qm.ToMe())
    with pytest.raises(ValueError, match="unmerge is for vision transformers"):
        from hosts_zoo import build as build_lm

        qm.reduce(build_lm("llama"), qm.ToMe(), unmerge=True)


def test_masked_images_are_refused() -> None:
    model = transformers.ViTModel(build("vit").config, use_mask_token=True).eval()
    mask = torch.zeros(2, 36, dtype=torch.bool)
    with pytest.raises(QuickmergeError, match="bool_masked_pos"), qm.reduce(model, qm.ToMe(), Removal(R)):
        model(pixels("vit"), bool_masked_pos=mask)


def test_the_vision_half_of_a_pair_is_found() -> None:
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = build("clip").config.to_dict()
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)).eval()
    x = pixels("clip")
    with torch.no_grad():
        plain = model.get_image_features(x)
        with qm.reduce(model, qm.ToMe(), Removal(R)) as run:
            merged = model.get_image_features(x)
        again = model.get_image_features(x)
    assert run.summary().tokens_per_block[-1] == 37 - 4 * R
    plain, merged, again = (getattr(out, "pooler_output", out) for out in (plain, merged, again))
    assert not torch.equal(plain, merged) and torch.equal(plain, again)


def test_a_mean_over_ragged_drops_is_the_mean_over_what_is_left() -> None:
    """Where images drop different numbers of patches, what they dropped must not pull the mean, nor the class token."""

    class Some(qm.Uniform):
        """One patch of the first image, five of the second."""

        def plan(self, view: TokenView) -> MergePlan:
            anchor = torch.ones_like(view.valid)
            anchor[0, 4], anchor[1, 4:9] = False, False
            return MergePlan.from_anchors(view, anchor)

    model = build("dinov2", dtype=torch.float64, head="ForImageClassification", num_labels=3)
    x = pixels("dinov2", dtype=torch.float64)
    with torch.no_grad(), qm.reduce(model, Some(keep=qm.Entropy()), 1):
        logits = model(x).logits
    base = model.dinov2
    with qm.reduce(base, Some(keep=qm.Entropy()), 1) as run:
        slots = output(base, x)
    for row, count in enumerate((35, 31)):
        assert int(run.call.last.valid[row].sum()) == count + 1
        y = slots[row, : count + 1]
        torch.testing.assert_close(logits[row], model.classifier(torch.cat([y[0], y[1:].mean(0)])))
