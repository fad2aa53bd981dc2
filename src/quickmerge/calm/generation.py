"""Writing with a model that draws K tokens at a time: prompts into chunks, steps, and where texts end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from quickmerge.calm import temperature as sharper
from quickmerge.calm.chunks import chunk_prompts
from quickmerge.errors import QuickmergeError, near_match, whole_number

if TYPE_CHECKING:
    from quickmerge.models.compat import BaseStreamer

__all__ = ["METHODS", "generate_chunks"]

METHODS = ("exact", "batch")

Generators = torch.Generator | Sequence[torch.Generator] | None
"""Where noise comes from: one generator for all rows, one for each row, or torch's global one."""


class Writer(Protocol):
    """What writing asks of a model; `quickmerge.calm.CalmForCausalLM` is one."""

    config: Any
    device: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Read chunks."""

    def hidden(self, *args: Any, **kwargs: Any) -> Any:
        """States of the chunks that were read."""

    def sample_chunks(self, hidden: Tensor, count: int = 1, *, generator: Generators = None) -> Tensor:
        """Chunks ``(count, R, K)`` that may follow states ``(R, D)``."""


def generate_chunks(
    model: Writer,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    max_new_tokens: int,
    *,
    temperature: float,
    method: str,
    batch_samples: int,
    most_draws: int,
    eos: int | Sequence[int] | None,
    pad: int | None,
    streamer: BaseStreamer | None,
    generator: Generators,
    seed: int | None,
    use_cache: bool,
) -> Tensor:
    """The loop behind `CalmForCausalLM.generate`, which says what the arguments are."""
    config = model.config
    ids = input_ids.to(model.device)
    valid = _valid(ids, attention_mask, config.pad_token_id, config.vocab_size)
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens)
    draw = _drawer(model, temperature, method, batch_samples, most_draws)
    ends = _ends(eos, config.eos_token_id)
    filler = pad if pad is not None else ends[0] if ends else config.pad_token_id
    noise = _noise(generator, seed, len(ids), model.device)
    if streamer is not None:
        if len(ids) != 1:
            raise QuickmergeError(f"streamer must be given with one row of input_ids, got {len(ids)}")
        streamer.put(ids.cpu())
    read, _ = chunk_prompts(ids, config.patch, config.pad_token_id, valid)
    _check_room(model, read.shape[1] // config.patch, -(-max_new_tokens // config.patch))
    new: list[Tensor] = []
    live = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    lengths = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    cache: Any = None
    while len(new) * config.patch < max_new_tokens and bool(live.any()):
        fresh = new[-1] if new and use_cache else read
        states, cache = model.hidden(fresh, read != config.pad_token_id, cache, use_cache)
        rows = live.nonzero()[:, 0]
        chunks = torch.full((len(ids), config.patch), filler, device=ids.device)
        chunks[rows] = draw(states[rows, -1], noise if not isinstance(noise, list) else [noise[row] for row in rows])
        kept, over = _kept(chunks, ends, config.pad_token_id)
        if streamer is not None:
            _stream(streamer, chunks[0, : min(int(kept[0]), max_new_tokens - len(new) * config.patch)])
        lengths += kept.where(live, 0)
        live = live & ~over
        new.append(chunks)
        read = torch.cat([read, chunks], 1)
    if streamer is not None:
        streamer.end()
    written = torch.cat(new, 1)[:, : min(max_new_tokens, int(lengths.max()))]
    behind = torch.arange(written.shape[1], device=ids.device) >= lengths[:, None]
    return torch.cat([ids, written.masked_fill(behind, filler)], 1)


def _kept(chunks: Tensor, ends: Sequence[int], pad: int) -> tuple[Tensor, Tensor]:
    """How many tokens of each chunk ``(B, K)`` are text, ``(B,)``, and whether the text ends in it, ``(B,)`` bool.

    What ends a text belongs to it, but for padding, which in training stands nowhere but behind an end.
    """
    if not ends:
        return chunks.new_full(chunks.shape[:1], chunks.shape[1]), chunks.new_zeros(chunks.shape[:1], dtype=torch.bool)
    stop = torch.isin(chunks, chunks.new_tensor([*ends, pad]))
    first = stop.int().argmax(1)  # 0 where there is none
    over = stop.any(1)
    padded = chunks.gather(1, first[:, None])[:, 0] == pad
    return torch.where(over, first + (~padded).long(), chunks.shape[1]), over


def _stream(streamer: BaseStreamer, tokens: Tensor) -> None:
    if len(tokens):
        streamer.put(tokens.cpu())


def _drawer(
    model: Writer, temperature: float, method: str, batch_samples: int, most_draws: int
) -> Callable[[Tensor, Generators], Tensor]:
    """From states ``(R, D)`` and generators to the next chunks ``(R, K)``."""
    sharper.split_inverse(temperature)
    if method not in METHODS:
        raise ValueError(
            f"temperature_method must be one of {', '.join(METHODS)}, got {method!r}{near_match(str(method), METHODS)}"
        )
    batch_samples = whole_number("batch_samples", batch_samples)
    most_draws = whole_number("most_draws", most_draws)

    def sharpened(states: Tensor, generator: torch.Generator | None) -> Tensor:
        def sampler(count: int) -> Tensor:
            return model.sample_chunks(states, count, generator=generator)

        if method == "batch":
            return sharper.batch(sampler, temperature, batch_samples, generator=generator).chunks
        return sharper.exact(sampler, temperature, generator=generator, most_draws=most_draws).chunks

    def draw(states: Tensor, generator: Generators) -> Tensor:
        if temperature == 1:
            return model.sample_chunks(states, 1, generator=generator)[0]
        if generator is None or isinstance(generator, torch.Generator):
            return sharpened(states, generator)
        # A row that needs more draws than another must not take them from the other's generator.
        rows = zip(states, generator, strict=True)
        return torch.cat([sharpened(row[None], one) for row, one in rows])

    return draw


def _valid(ids: Tensor, mask: Tensor | None, pad: int, vocabulary: int) -> Tensor:
    """Which tokens of the prompts are there, ``(B, n)`` bool; an error if the prompts can't be read."""
    if ids.ndim != 2 or 0 in ids.shape or ids.is_floating_point():
        raise QuickmergeError(f"input_ids must be (batch, tokens) token ids, got {ids.dtype} {tuple(ids.shape)}")
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise QuickmergeError(
            f"input_ids must be of the {vocabulary} tokens of the vocabulary, got {int(ids.min())} to {int(ids.max())}"
        )
    valid = ids != pad
    if mask is not None:
        if mask.shape != ids.shape:
            raise QuickmergeError(f"attention_mask must have shape {tuple(ids.shape)}, got {tuple(mask.shape)}")
        valid = valid & mask.to(ids.device).bool()
    if not bool(valid.any(1).all()):
        row = int((~valid.any(1)).nonzero()[0])
        raise QuickmergeError(
            f"input_ids must hold at least one token in each row, got nothing but padding in row {row}"
        )
    return valid


def _ends(given: int | Sequence[int] | None, own: int) -> list[int]:
    ends = [own] if given is None else list(given) if isinstance(given, Sequence) else [given]
    return [whole_number("eos_token_id", end, 0) for end in ends]


def _noise(
    generator: Generators, seed: int | None, rows: int, device: torch.device
) -> torch.Generator | list[torch.Generator] | None:
    if seed is not None:
        if generator is not None:
            raise QuickmergeError("either generator or seed must be given, got both")
        seed = whole_number("seed", seed, 0)
        return torch.Generator(device).manual_seed(seed)
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    if len(generator) != rows:
        raise QuickmergeError(f"generator must be one, or one for each of {rows} rows, got {len(generator)}")
    return list(generator)


def _check_room(model: Writer, prompt: int, new: int) -> None:
    most = getattr(model.config.backbone, "max_position_embeddings", None)
    needed = prompt + new - 1  # what is drawn last is not read
    if most is not None and needed > most:
        raise QuickmergeError(
            f"max_new_tokens must leave room: the prompt and what follows are {needed} chunks of {model.config.patch} "
            f"tokens, and the backbone reads at most {most}"
        )
