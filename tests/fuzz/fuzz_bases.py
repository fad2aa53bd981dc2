"""What hostile inputs are made of: sound models, trained parts, images, videos and texts, as small as can be."""

from __future__ import annotations

from pathlib import Path

TEXT = "The sea was calm and the ship went on. " * 12

COMMANDS: dict[str, list[list[str]]] = {
    "model": [
        ["show", "--text", TEXT, "--model", "{it}", "--limit", "64"],
        ["generate", "--prompt", TEXT, "--model", "{it}", "--max-new-tokens", "2"],
        ["show", "--text", TEXT, "--model", "{it}", "--limit", "64", "--html", "{out}/p.html",
         "--figure", "{out}/p.svg"],
        ["plan", "--model", "{it}", "--tokens", "64"],
        ["generate", "--prompt", TEXT, "--model", "{it}", "--max-new-tokens", "2", "--drafter", "lookup"],
        ["generate", "--prompt", TEXT, "--model", "{it}", "--max-new-tokens", "2", "--attention", "multipole"],
        ["transplant", "--base", "{it}", "--tokenizer", "{base}/model", "--out", "{out}/t", "--dry-run"],
        ["transplant", "--base", "{base}/model", "--donor", "{it}", "--out", "{out}/t", "--no-quality", "--method",
         "mean"],
    ],
    "prior": [["generate", "--prompt", TEXT, "--model", "{base}/model", "--prior", "{it}", "--max-new-tokens", "2"]],
    "heads": [["generate", "--prompt", TEXT, "--model", "{base}/model", "--drafter", "{it}", "--max-new-tokens", "2"]],
    "calm": [["generate", "calm", "--prompt", "w6 w7 w8", "--model", "{it}", "--max-new-tokens", "4"]],
    "recognizer": [["recognize", "{base}/photo.png", "--model", "{it}", "--top", "2"]],
    "vit": [["show", "--image", "{base}/photo.png", "--model", "{it}", "--reducer", "tome", "--figure",
             "{out}/p.png"]],
    "predictor": [
        ["bench", "--image", "{base}/photos", "--model", "{base}/classifier", "--dynamicvit", "{it}", "--reducer",
         "random", "--flops", "0.7", "--rounds", "2"]
    ],
    "vlm": [["generate", "--image", "{base}/photo.png", "--model", "{it}", "--prompt", "what is it ?",
             "--max-new-tokens", "2"]],
}  # fmt: skip
"""By kind of folder: commands that open it, as ``{it}``; the sound folders lie in ``{base}``."""

OTHERS = [
    ["bench", "decode", "--drafter", "lookup", "--prompts", "{base}/prompts.jsonl", "--model", "{base}/model",
     "--limit", "1", "--max-new-tokens", "2"],
    ["recognize", "{base}/photo.png", "--model", "{base}/recognizer", "--labels", "{base}/labels.txt"],
    ["bench", "vlm", "{base}/annotated", "--model", "{base}/vlm", "--reducer", "random", "--keep", "0.5"],
    ["show", "--video", "{base}/clip.mp4", "--model", "{base}/vit", "--frames", "2", "--stride", "1", "--figure",
     "{out}/p.png"],
]  # fmt: skip
"""Further commands that hostile files are given to."""


def build(base: Path) -> None:
    """Make every sound thing in an empty folder, one by one."""
    import numpy as np
    import torch
    import transformers as hf
    import vision_samples
    import vlm_samples
    from calm_samples import small_calm, words_tokenizer
    from PIL import Image
    from scene_samples import small_recognizer
    from torch import nn
    from transplant_samples import model_folder

    from quickmerge.merge.prior import Prior, PriorConfig
    from quickmerge.merge.reducers.dynamicvit import DynamicViT, Predictor
    from quickmerge.models.identity import model_hash
    from quickmerge.speculative.gumiho import Gumiho

    model_folder(base / "model")
    lm = hf.AutoModelForCausalLM.from_pretrained(base / "model")
    torch.manual_seed(0)
    known = {"layers": [1], "hash": model_hash(lm)}
    Prior(PriorConfig(features=32, width=16, heads=2, trained_for=known)).save_pretrained(base / "prior")
    Gumiho.new(lm, serial_layers=1, heads=2, mlp_depth=2).save_pretrained(base / "heads")
    small_calm(3).save_pretrained(base / "calm")
    words_tokenizer().save_pretrained(base / "calm")
    small_recognizer().save_pretrained(base / "recognizer")
    processor = hf.ViTImageProcessorPil(size={"height": 32, "width": 32})
    config = hf.ViTConfig(**vision_samples.SIZE, **vision_samples.IMAGE)
    labels = {"id2label": {0: "left", 1: "right"}, "label2id": {"left": 0, "right": 1}}
    seeing = hf.ViTForImageClassification(hf.ViTConfig(**vision_samples.SIZE, **vision_samples.IMAGE, **labels))
    for name, model in (("vit", hf.ViTModel(config)), ("classifier", seeing)):
        model.save_pretrained(base / name)
        processor.save_pretrained(base / name)
    DynamicViT(0.7, nn.ModuleList(Predictor(32) for _ in range(3))).save_pretrained(base / "predictor")
    vlm_samples.save(base / "vlm")
    vlm_samples.annotated(base / "annotated")
    draws = np.random.default_rng(0)
    photo = Image.fromarray(draws.integers(0, 256, (48, 40, 3), dtype=np.uint8))
    for ending in ("png", "jpg", "gif", "webp", "tiff", "bmp"):
        photo.save(base / f"photo.{ending}")
    for side in ("left", "right"):
        (base / "photos" / side).mkdir(parents=True)
        for number in range(2):
            photo.save(base / "photos" / side / f"{number}.png")
    _clip(base / "clip.mp4")
    (base / "text.txt").write_text(TEXT, encoding="utf-8")
    (base / "prompts.jsonl").write_text('{"prompt": "the sea the sea", "kind": "sea"}\n{"prompt": "a ship"}\n')
    (base / "labels.txt").write_text("circle\nsquare\nred\n")


def _clip(path: Path) -> None:
    import numpy as np
    from video_samples import write_frames

    frames = np.full((12, 48, 48, 3), 40, dtype=np.uint8)
    for t, frame in enumerate(frames):
        frame[8:24, 2 * t : 2 * t + 16] = (200, 120, 40)
    write_frames(path, frames, fps=8, pix_fmt="yuv420p")
