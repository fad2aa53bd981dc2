"""Merges at several places of a vision-language model, and what its blocks called one by one make of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vlm_zoo import FLAT, build, entering, text_of

import quickmerge as qm
from quickmerge.merge.place import Merge
from quickmerge.merge.text.modes import Prefix

SHORT = Prefix(sinks=1, recent=2, min_tokens=0)
"""Tiny prompts are merged too."""

REDUCERS: dict[str, Any] = {
    "quickmerge": qm.QuickMerge(keep=0.5, layers=2, window=8, pool=3),
    "tome": qm.ToMe(keep=0.5),
    "scope": qm.SCOPE(keep=0.4),
}


def merge_of(name: str, layer: Any, keep: float | None = None) -> Merge:
    """A merge of all tokens."""
    reducer = REDUCERS[name] if keep is None else type(REDUCERS[name])(keep=keep)
    return Merge(reducer, layer, SHORT)


COMBINATIONS: dict[str, dict[str, Merge]] = {
    "text": {"text": merge_of("quickmerge", 2)},
    "text twice": {"text": merge_of("tome", [2, 3])},
    "scope then tome": {"visual": Merge(REDUCERS["scope"]), "text": merge_of("tome", 2)},
    "tome then quickmerge": {"visual": Merge(REDUCERS["tome"]), "text": merge_of("quickmerge", [2, 3])},
    "inside, then tome": {"visual": Merge(qm.ToMe(keep=0.6), [0, 2]), "text": merge_of("tome", 3)},
}
MODELS: dict[str, Any] = {}


def double(family: str, **own: Any) -> Any:
    """A model in float64 that is built once."""
    key = str((family, own))
    if key not in MODELS:
        MODELS[key] = build(family, **own).double()
    return MODELS[key]


def doubled(inputs: dict[str, Any]) -> dict[str, Any]:
    """A prompt whose pixels are float64."""
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


@torch.no_grad()
def by_hand(
    model: Any,
    inputs: dict[str, Any],
    run: Any,
    merges: dict[str, Merge],
    extra: Tensor,
    visual: dict[int, Tensor] | None = None,
) -> Tensor:
    """Logits of one row without padding, and of ``extra (1, t)`` tokens behind it, by a run's plans.

    ``visual`` are features of the columns that a merged tower has changed.
    """
    text, dense = text_of(model), entering(model, inputs)
    x, n = dense["inputs_embeds"][0].clone(), dense["inputs_embeds"].shape[1]
    for column, features in (visual or {}).items():
        x[column] = features
    place = dense.get("position_ids")
    place = torch.arange(n)[None] if place is None else place
    place = place[1:] if place.shape[0] == 4 else place
    if model.config.model_type not in FLAT:
        place = place.expand(3, 1, n)
    t, columns, votes = extra.shape[1], torch.arange(n), torch.ones(n, dtype=torch.float64)
    behind = (int(place.max()) + 1 + torch.arange(t)).expand(*place.shape[:-1], t)
    lows = [torch.zeros_like(x) for _ in dense.get("deepstack_visual_embeds") or ()]
    for low, features in zip(lows, dense.get("deepstack_visual_embeds") or (), strict=True):
        low[dense["visual_pos_masks"][0]] = features
    x = torch.cat([x, model.get_input_embeddings()(extra)[0]])
    for index, block in enumerate(text.layers):
        if index in run.merges:
            plan, n = run.merges[index], len(columns)
            into = torch.zeros(plan.slots, n, dtype=torch.float64)
            for j, slot in enumerate(plan.slot[0].tolist()):
                if slot >= 0:
                    into[slot, j] = plan.weight[0, j]
            mean, members = into @ votes, (into > 0).double() @ votes
            which = "visual" if "visual" in merges and index in run.visual_stages else "text"
            if index == 0 and "tower" in merges:
                votes = plan.size[0].double()  # of methods that count a slot as its size, or merge nothing
            else:
                votes = members if merges[which].reducer.proportional else mean
            x = torch.cat([into @ x[:n], x[n:]])
            lows = [into @ low for low in lows] if index == 0 else lows
            columns = plan.position[0]
        n, m = len(columns), len(columns) + t
        places = torch.cat([place[..., columns], behind], -1)
        bias = torch.full((m, m), -torch.inf, dtype=torch.float64).triu(1)
        bias = bias + torch.cat([votes, torch.ones(t, dtype=torch.float64)]).log()
        tables = text.rotary_emb(x[None], places)
        out = block(x[None], attention_mask=bias[None, None], position_embeddings=tables)
        x = (out[0] if isinstance(out, tuple) else out)[0]
        if index < len(lows):
            x = torch.cat([x[:n] + lows[index], x[n:]])
    logits: Tensor = model.lm_head(text.norm(x[None]))
    return logits
