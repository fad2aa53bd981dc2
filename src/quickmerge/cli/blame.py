"""Whose fault an error is: that of what was given, of a stranger's model, or ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickmerge.errors import QuickmergeError, UnsupportedModelError, first_sentence

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Alone", "one_sentence"]


class Alone:
    """What a model does by itself, without anything of ours: run after an error, to see whether it can be run at all.

    Args:
        model: of transformers.
        run: runs it the way the command does.
    """

    def __init__(self, model: Any, run: Callable[[], object]) -> None:
        self.name = str(getattr(model, "name_or_path", "") or type(model).__name__)
        self.run = run

    @classmethod
    def writing(cls, model: Any, tokenizer: Any) -> Alone:
        """A language model: its tokenizer splits a text, it reads that, and writes with its own settings."""

        def run() -> None:
            import torch

            from quickmerge.evaluation.answer import chat

            text, _ = chat(tokenizer, "", "The sea is calm. 1 2 3")
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"] or [0]], device=model.device)
            with torch.inference_mode():
                model(input_ids=ids)
                out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
            tokenizer.decode(out[0], skip_special_tokens=True)

        return cls(model, run)

    @classmethod
    def backbone(cls, model: Any) -> Alone:
        """A CALM, which is ours but for the model of transformers that reads the chunks: that reads two."""

        def run() -> None:
            import torch

            width = model.config.backbone.hidden_size
            with torch.inference_mode():
                model.backbone(inputs_embeds=torch.zeros(1, 2, width, device=model.device), use_cache=True)

        return cls(model, run)

    @classmethod
    def seeing(cls, model: Any, processor: Any, image: Image.Image) -> Alone:
        """A vision model: its processor prepares an image, and it looks at that."""

        def run() -> None:
            import torch

            with torch.inference_mode():
                model(**processor([image], return_tensors="pt"))

        return cls(model, run)

    @classmethod
    def asked(cls, model: Any, processor: Any, image: Image.Image) -> Alone:
        """A vision-language model: it is asked about an image, and answers with its own settings."""

        def run() -> None:
            import torch

            from quickmerge.models import ask_inputs

            with torch.inference_mode():
                model.generate(**ask_inputs(processor, [image], "What is this?").to(model.device), max_new_tokens=2)

        return cls(model, run)


@contextmanager
def one_sentence(alone: Alone | None = None) -> Iterator[None]:
    """Turn an error about settings, or about a stranger's model, into one that is told in one sentence.

    A ValueError of ours is about settings. Whatever else is raised while a model runs is the model's fault if it can't
    be run without anything of ours either, and ours if it can: then it passes as it is.
    """
    try:
        yield
    except (QuickmergeError, OSError, MemoryError):
        raise
    except Exception as error:
        if alone is not None and not _refused(error):
            try:
                alone.run()
            except Exception as own:
                raise UnsupportedModelError(f"the model {alone.name} can't be run ({first_sentence(own)})") from own
        if isinstance(error, ValueError):
            raise QuickmergeError(str(error)) from error
        raise


def _refused(error: Exception) -> bool:
    """Whether our own code refused a value, as it does with a ValueError; one that passed through us is not ours."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    home = Path(__file__).resolve().parents[1]
    inside = last is not None and home in Path(last.tb_frame.f_code.co_filename).resolve().parents
    return inside and isinstance(error, ValueError)
