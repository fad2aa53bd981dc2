"""Every image-text-to-text family of transformers, against the committed table in zoo.json.

``QUICKMERGE_WRITE_ZOO=1 pytest tests/merge/visual/test_zoo.py -m ""`` writes the rows that ran anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import vlm_rows as zoo
from caches import held
from torch import Tensor

import quickmerge as qm
from quickmerge.errors import UnsupportedModelError
from quickmerge.merge.text.blocks import mergeable
from quickmerge.merge.text.merged_cache import holding
from quickmerge.merge.visual.places import reduce_vlm
from quickmerge.models.columns import stored
from quickmerge.models.compat import image_text_names
from quickmerge.models.vlm import VLM_FAMILIES, find_vlm

TABLE = Path(__file__).parent / "zoo.json"
WRITE = os.environ.get("QUICKMERGE_WRITE_ZOO") == "1"
EXACT = 1e-4
ROWS = [[0], [1, 2], []]
"""Which images the rows of a batch show."""
ORDERS = ("first", "last", "middle")

SLOW = {
    "cohere2_vision", "cosmos3_edge", "cosmos3_omni", "deepseek_vl_hybrid", "deepseek_ocr2", "emu3", "fast_vlm",
    "florence2", "fuyu", "glm46v", "glm4v_moe", "glm_ocr", "glmga", "got_ocr2", "hy_v4_vl", "inkling2",
    "inkling2_loop", "janus", "kosmos-2", "kosmos-2.5", "llava_next_video", "minimax_m3_vl", "nemotron_h_omni",
    "ovis2", "pp_chart2table", "pp_formulanet", "qianfan_ocr", "qwen2_5_omni_thinker", "qwen3_5_moe",
    "qwen3_omni_moe_thinker", "qwen3_vl_moe", "qwen4_exp", "shieldgemma2", "t5gemma2", "udop", "unlimited_ocr",
    "vision-encoder-decoder", "apertus1p5", "idefics2", "step3p7", "video_llava", "hyperclovax_vision_v2",
}  # fmt: skip
"""Rows whose models are large, or built as those of another row are."""


def families() -> list[Any]:
    return [pytest.param(f, marks=[pytest.mark.slow] if f in SLOW else []) for f in zoo.FAMILIES]


def table() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    return found


def test_every_family_that_is_registered_has_a_row() -> None:
    missing = sorted(set(image_text_names()) - set(table()))
    assert not missing or WRITE, f"new families: {', '.join(missing)}; see the head of this file"


def test_the_list_of_what_is_proven_is_that_of_the_table() -> None:
    assert WRITE or sorted(VLM_FAMILIES) == sorted(f for f, row in table().items() if row["result"] == "pass")


@pytest.mark.parametrize("family", families())
def test_row(family: str) -> None:
    found = row_of(family)
    if WRITE:
        rows = {**table(), family: found}
        TABLE.write_text(json.dumps(dict(sorted(rows.items())), indent=2) + "\n", encoding="utf-8")
    assert table()[family] == found


def row_of(family: str) -> dict[str, str]:
    """What holds for a family; every law that is checked raises where it doesn't."""
    if family in zoo.UNBUILT:
        return {"result": f"not built: {zoo.UNBUILT[family]}"}
    try:
        with torch.device("meta"):
            find_vlm(zoo.build(family))
    except UnsupportedModelError as error:
        return {"result": f"raises UnsupportedModelError: {error}"}
    except (NotImplementedError, RuntimeError):
        pass  # it can't be built without numbers
    try:
        with torch.no_grad():
            return check(family)
    except UnsupportedModelError as error:
        return {"result": f"raises UnsupportedModelError: {error}"}


def check(family: str) -> dict[str, str]:
    model = zoo.build(family)
    vlm = find_vlm(model)
    rows = ROWS if zoo.reads_text_alone(model) else ROWS[:2]
    inputs = zoo.prompt(model, family, rows)
    plain, text = model(**inputs).logits, zoo.write(model, inputs)
    alone = [zoo.row_of(model, family, rows, i) for i in range(len(rows))]
    # Some towers see other images of the batch, with fewer tokens or without: such a row is no part of a law.
    apart = [float((model(**row).logits[0, -1] - plain[i, -1]).abs().max()) for i, row in enumerate(alone)]
    alone = [row if far < EXACT else None for row, far in zip(alone, apart, strict=True)]
    assert sum(row is not None for row in alone) >= len(rows) - 1
    before = state_of(model)
    told = {
        "result": "pass",
        "layout": vlm.family.layout,
        "positions": "grid" if vlm.family.mrope else "line",
        "tower": identity(model, inputs, plain, text),
    }
    halves(model, inputs, rows, alone, text)
    hidden_equals_gone(model, family)
    for order in ORDERS:
        placed(model, family, rows, order)
    told["inside"] = inside(model, inputs, alone, plain, text)
    assert state_of(model) == before
    assert torch.equal(model(**inputs).logits, plain)
    return told


def state_of(model: Any) -> Any:
    """What a run must leave as it was."""
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for n, m in model.named_modules()}
    return hooks, {n: m.config._attn_implementation for n, m in model.named_modules() if hasattr(m, "config")}


def identity(model: Any, inputs: Any, plain: Tensor, text: Tensor) -> str:
    """Keeping everything is the model, bit for bit, whatever was asked of the tower; what of it can be asked."""
    told = "yes"
    for reducer in (qm.Uniform(keep=1.0), qm.SCOPE(keep=1.0), qm.ToMe(keep=1.0)):
        try:
            with reduce_vlm(model, reducer) as run:
                assert torch.equal(model(**inputs).logits, plain)
                assert torch.equal(zoo.write(model, inputs), text)
                assert run.summary().visual_kept == run.summary().visual_in > 0
        except UnsupportedModelError as error:
            if isinstance(reducer, qm.Uniform):
                raise
            told = str(error)
    if told != "yes":
        return next((short for short, words in REASONS.items() if words in told), told)
    with reduce_vlm(model, qm.SCOPE(keep=0.4)) as run:
        out = model(**inputs)
        assert bool(out.logits[:, -1].isfinite().all())
        assert all(0 < i.left < i.count for i in run.images)
        assert all(i.view.evidence.saliency is not None for i in run.images)
    return told


REASONS = {
    "no: a patch is part of several tokens": "part of several",
    "no: blocks without one attention each": "no blocks with one attention",
    "no: image tokens see one another both ways": "both ways",
    "no: blocks are given more of each token": "given more of each token",
    "no: several hidden streams": "hidden streams side by side",
}
"""How the table says why not, by what an error says."""


def halves(model: Any, inputs: Any, rows: Any, alone: Any, text: Tensor) -> None:
    """Half of the visual tokens are read, in every block and its cache; and a batch equals its rows."""
    widths: list[int] = []
    handle = (
        find_vlm(model)
        .decoder.layers[0]
        .register_forward_pre_hook(
            lambda m, a, k: widths.append((a[0] if a else k["hidden_states"]).shape[1]), with_kwargs=True
        )
    )
    with reduce_vlm(model, qm.Uniform(keep=0.5)) as run:
        out = model(**inputs)
        handle.remove()
        images, cache = run.images, held(out)
        assert [i.row for i in images] == [r for r, shown in enumerate(rows) for _ in shown]
        assert all(i.left == int(i.count * 0.5 + 0.5) for i in images)
        gone = [sum(i.count - i.left for i in images if i.row == r) for r in range(len(rows))]
        left = [int(n) - g for n, g in zip(inputs["attention_mask"].sum(-1), gone, strict=True)]
        # What stands between the tokens of an image, such as newlines, stays.
        for r in range(len(rows)):
            placed = (inputs["input_ids"][r] == zoo.IMAGE).nonzero().flatten().tolist()
            own = {c for i in images if i.row == r for c in i.columns.tolist()}
            assert set(placed) - own <= set(run.columns[r].tolist())
        assert widths == [max(left)] and max(left) < inputs["input_ids"].shape[1]
        assert max(map(stored, holding(cache))) == max(left)
        assert run.summary().visual_kept < run.summary().visual_in
        rows_equal(model, alone, out.logits)
        written, again = zoo.write(model, inputs), uncached(model, inputs)
    agree(model, inputs, text, written, again)


def rows_equal(model: Any, alone: Any, logits: Tensor) -> None:
    for i, row in enumerate(alone):
        if row is not None:
            torch.testing.assert_close(model(**row).logits[0, -1], logits[i, -1], rtol=0, atol=EXACT)


def agree(model: Any, inputs: Any, text: Tensor, written: Tensor, again: Tensor | None) -> None:
    """What is written with a cache is what is written without, unless the model itself writes something else."""
    if again is not None and not torch.equal(again, written):
        plain = uncached(model, inputs)
        assert plain is None or not torch.equal(plain, text), "only the plain model goes on alike without a cache"


def uncached(model: Any, inputs: Any) -> Tensor | None:
    """What is written without a cache; None where the model itself can't."""
    try:
        return zoo.write(model, inputs, use_cache=False)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None


def hidden_equals_gone(model: Any, family: str) -> None:
    """A token that is gone is one that nobody sees: the dense model with those hidden computes the same.

    A block that reads tokens into a memory of fixed size can't be hidden from; there the language model is given what
    stays alone.
    """
    decoder = find_vlm(model).decoder
    inputs = zoo.row_of(model, family, ROWS, 1)
    n = inputs["input_ids"].shape[1]
    with reduce_vlm(model, qm.Random(keep=0.4)) as run:
        wanted = model(**inputs).logits[0, -1]
        columns = run.columns[0]
    stays = torch.zeros(n, dtype=torch.bool)
    stays[columns] = True

    def hide(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        place = kwargs.get("position_ids")
        place = torch.arange(n)[None] if place is None else place
        if any(block.memory is not None for block in decoder.traits):
            short = {"inputs_embeds": kwargs["inputs_embeds"][:, columns], "position_ids": place[..., columns]}
            return args, {**kwargs, **short, "attention_mask": torch.ones(1, len(columns), dtype=torch.long)}
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Mapping):
            mask = {kind: hidden(each, stays) for kind, each in mask.items()}
        elif isinstance(mask, Tensor) and mask.ndim == 4:
            mask = hidden(mask, stays)
        else:
            mask = stays[None].long()
        return args, {**kwargs, "attention_mask": mask, "position_ids": place}

    handle = decoder.base.register_forward_pre_hook(hide, with_kwargs=True)
    try:
        found = model(**inputs).logits[0, -1]
    finally:
        handle.remove()
    torch.testing.assert_close(found, wanted, rtol=0, atol=EXACT)


def hidden(mask: Tensor | None, stays: Tensor) -> Tensor:
    """A mask ``(1, 1, N, N)`` that hides the columns that don't stay, from all but themselves."""
    n = len(stays)
    see = torch.ones(n, n).tril().bool()[None, None] if mask is None else mask
    see = see if see.dtype == torch.bool else see > torch.finfo(see.dtype).min / 2
    return see & (stays | torch.eye(n).bool())


def placed(model: Any, family: str, rows: Any, order: str) -> None:
    """Images first, last, in the middle: all that are shown are found, and none where none is shown."""
    inputs = zoo.prompt(model, family, rows, order)
    with reduce_vlm(model, qm.Uniform(keep=0.5)) as run:
        out = model(**inputs).logits
        assert [i.row for i in run.images] == [r for r, shown in enumerate(rows) for _ in shown]
        assert bool(out[:, -1].isfinite().all()) and out.shape[1] < inputs["input_ids"].shape[1]
        assert all(bool((inputs["input_ids"][i.row, i.columns] == zoo.IMAGE).all()) for i in run.images)


def inside(model: Any, inputs: Any, alone: Any, plain: Tensor, text: Tensor) -> str:
    """In front of a block of the language model; or why not."""
    layer = next((block for block in mergeable(find_vlm(model).decoder) if block > 1), 2)
    try:
        with reduce_vlm(model, qm.Uniform(keep=1.0), layer):
            assert torch.equal(model(**inputs).logits, plain)
        with reduce_vlm(model, qm.Uniform(keep=0.5), layer) as run:
            out = model(**inputs)
            assert run.summary().visual_kept < run.summary().visual_in
            rows_equal(model, alone, out.logits)
            written, again = zoo.write(model, inputs), uncached(model, inputs)
    except UnsupportedModelError as error:
        return next((short for short, words in REASONS.items() if words in str(error)), str(error))
    agree(model, inputs, text, written, again)
    return "yes"
