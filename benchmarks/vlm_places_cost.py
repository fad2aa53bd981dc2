"""What merging at several places of a vision-language model at once saves (results/vlm_places_cost.json).

python benchmarks/vlm_places_cost.py

A LLaVA of the sizes of ViT-S/14 and SmolLM2-135M with random weights reads one image and a question. What is counted,
tokens, FLOPs and bytes of the cache, depends on sizes alone. Nothing is said of answers or seconds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import tables
import torch
from rich.console import Console
from transformers import LlavaConfig, LlavaForConditionalGeneration

import quickmerge as qm
from quickmerge.bench.harness import environment
from quickmerge.console.options import quiet, write_json
from quickmerge.merge.attach import reduce_places
from quickmerge.merge.bench.cost import model_shape
from quickmerge.merge.bench.vision_cost import vision_shape
from quickmerge.models.vlm import find_vlm, tower_encoder

HERE = Path(__file__).parent
IMAGE, PATCHES, WORDS = 49152, 256, 64
TOWER = qm.Merge(qm.ToMe(keep=0.6))
VISUAL = qm.Merge(qm.SCOPE(keep=qm.Count(64)))
TEXT = qm.Merge(qm.QuickMerge(keep=0.4), mode=qm.Prefix(min_tokens=0))
WAYS: dict[str, dict[str, Any]] = {
    "text": {"text": TEXT},
    "visual": {"visual": VISUAL},
    "tower, unmerged": {"tower": qm.Merge(TOWER.reducer, unmerge=True)},
    "tower": {"tower": TOWER},
    "tower and text": {"tower": TOWER, "text": TEXT},
    "visual and text": {"visual": VISUAL, "text": TEXT},
    "tower and visual": {"tower": TOWER, "visual": VISUAL},
    "tower, visual and text": {"tower": TOWER, "visual": VISUAL, "text": TEXT},
}


def model_of() -> Any:
    """Random weights; the projector reads the layers that the model measured in docs/results/visual-tokens.md reads."""
    vision = {"model_type": "dinov2", "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6,
              "mlp_ratio": 4, "image_size": 224, "patch_size": 14}  # fmt: skip
    text = {"model_type": "llama", "vocab_size": IMAGE + 1, "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=PATCHES,
        vision_feature_layer=[4, 8, 11], vision_feature_select_strategy="default",
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).eval()


@torch.no_grad()
def counted(model: Any, merges: dict[str, Any]) -> dict[str, Any]:
    """Tokens, FLOPs and bytes of one prompt."""
    ids = torch.randint(3, 1000, (1, WORDS), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([ids[:, :24], torch.full((1, PATCHES), IMAGE), ids[:, 24:]], 1)
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    shape, seen, vit = model_shape(model), PATCHES + 1, vision_shape(tower_encoder(find_vlm(model)))
    read, left = [float(ids.shape[1])] * len(shape.weights), [float(seen)] * 12
    visual = float(PATCHES)
    if merges:
        with reduce_places(model, **merges) as run:
            model(input_ids=ids, pixel_values=pixels)
        stats = run.summary()
        read, left, visual = stats.tokens_per_layer, stats.tower_tokens or left, stats.visual_kept
    entering = [float(seen), *left[:-1]]
    return {
        "tower_tokens": sum(left) / len(left),
        "visual": visual,
        "text_tokens": sum(read) / len(read),
        "tower_flops": 2 * vit.macs(entering, left),
        "text_flops": shape.prefill_flops(read),
        "cache_bytes": shape.cache_bytes(read),
    }


def main() -> int:
    """Count and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "vlm_places_cost.json")
    args = parser.parse_args()
    quiet()
    model = model_of()
    rows = [{"method": "nothing", **counted(model, {})}]
    rows += [{"method": name, **counted(model, merges)} for name, merges in WAYS.items()]
    full = rows[0]["tower_flops"] + rows[0]["text_flops"]
    rows = [{**row, "flops_ratio": (row["tower_flops"] + row["text_flops"]) / full} for row in rows]
    settings = {place: merge.label for place, merge in WAYS["tower, visual and text"].items()}
    meta = {"patches": PATCHES, "words": WORDS, "settings": settings}
    write_json(args.out, {"rows": rows, "meta": meta, "environment": environment()})
    tables.vlm_places_cost(rows).print(Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
