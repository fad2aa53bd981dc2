"""What a token costs, written or learnt from: of a CALM, whose parts work once per K tokens, and of its yardstick.

FLOPs are two for each weight of a matrix that a vector passes. Lookups, norms and activations are left out.

- Reading: ``2 P`` for the P weights of backbone and input network, and ``4 n H d`` in each layer for attention to n
  entries. An ordinary model has its output matrix too. A CALM does this once in K tokens, to 1/K as many entries.
- The head: once for each draw (``~ 6 C^2`` a block), as are the autoencoder's decoder and its ``K V d`` logits.
- Learning: three times the forward pass, except the encoder, which is frozen. The head draws N samples a chunk, and the
  loss compares them with M targets.

What the head, the encoder and the decoder spend is counted by running them on one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from quickmerge.bench.harness import Arm, interleave, now
from quickmerge.bench.stats import spread
from quickmerge.calm import temperature as sharper
from quickmerge.calm.evaluate import BrierText, is_calm
from quickmerge.calm.temperature import Drawn, exact, expected_draws, split_inverse
from quickmerge.errors import QuickmergeError, UnsupportedModelError, number_at_least, whole_number
from quickmerge.models.compat import Conv1D

__all__ = [
    "BATCHES",
    "TokenCost",
    "autoencoder_training_cost",
    "counted",
    "measure_speed",
    "speed_rows",
    "temperature_rows",
    "training_cost",
    "write_on",
    "writing_cost",
]


BACKWARD = 3
"""Forward and backward together, in forward passes."""


@dataclass(frozen=True)
class TokenCost:
    """FLOPs for one token of text, by where they are spent.

    Attributes:
        reading: matrices of the transformer, and of the network that makes a vector of K tokens.
        attention: scores and sums over earlier entries.
        output: the output matrix, or head and decoder.
        frozen: the encoder in training.
    """

    reading: float
    attention: float
    output: float
    frozen: float = 0.0

    @property
    def total(self) -> float:
        """All together."""
        return self.reading + self.attention + self.output + self.frozen


def writing_cost(model: Any, context: float, draws: int = 1) -> TokenCost:
    """FLOPs of writing a token when ``context`` tokens stand before it, with a cache.

    Args:
        model: a CALM or a causal LM of transformers.
        context: tokens before, on average.
        draws: of the head for each chunk: 1, or as many as sampling at a temperature takes. Ordinary models need one.

    Raises:
        UnsupportedModelError: the model has matrices that are no linear layers.
        ValueError: a number is out of range.
    """
    number_at_least("context", context, 0)
    draws = whole_number("draws", draws)
    if not is_calm(model):
        body, head = _ends(model)
        return TokenCost(2.0 * matrix_weights(body), _attention(model.config, context + 1), 2.0 * head)
    patch = model.config.patch
    state = _state(model)
    drawn = counted(lambda: model.sample_chunks(state, draws))
    entries = context / patch + 1
    reading, attention = _reading(model), _attention(model.config.backbone, entries)
    return TokenCost(reading / patch, attention / patch, drawn / patch)


def training_cost(model: Any, length: int) -> TokenCost:
    """FLOPs of learning from a token of texts of ``length`` tokens; of a CALM without its autoencoder's training.

    Raises:
        UnsupportedModelError: the model has matrices that are no linear layers.
        ValueError: the length is no whole number of at least 1.
    """
    length = whole_number("length", length)
    if not is_calm(model):
        body, output = _ends(model)
        attention = BACKWARD * _attention(model.config, (length + 1) / 2)
        return TokenCost(2.0 * BACKWARD * matrix_weights(body), attention, 2.0 * BACKWARD * output)
    config = model.config
    chunk = torch.zeros(1, config.patch, dtype=torch.long, device=model.device)
    targets = torch.zeros(config.targets, 1, config.latent, device=model.device)
    head = counted(lambda: model.head.loss(_state(model), targets, many_targets=True))
    encoder = counted(lambda: model.autoencoder.encode(chunk))
    attention = _attention(config.backbone, (length / config.patch + 1) / 2)
    parts = (BACKWARD * _reading(model), BACKWARD * attention, BACKWARD * head, encoder)
    return TokenCost(*(part / config.patch for part in parts))


def autoencoder_training_cost(autoencoder: Any) -> float:
    """FLOPs of the autoencoder's training for each token that it sees, with the exact cross-entropy."""
    config = autoencoder.config
    chunk = torch.zeros(1, config.patch, dtype=torch.long, device=autoencoder.device)
    latent = torch.zeros(1, config.latent, device=autoencoder.device, dtype=autoencoder.dtype)
    once = counted(lambda: autoencoder.encode(chunk)) + counted(lambda: autoencoder.decode(latent))
    return BACKWARD * once / float(config.patch)


def counted(call: Callable[[], Any]) -> float:
    """FLOPs of the matrix products of a call, two for each weight; attention kernels of torch are not seen."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def matrix_weights(model: nn.Module) -> int:
    """Weights of all linear layers of a model through which every token goes.

    Raises:
        UnsupportedModelError: there are matrices of another kind, such as those of experts that few tokens go to.
    """
    known = (nn.Linear, Conv1D, nn.Embedding)
    for module in model.modules():
        odd = [name for name, p in module.named_parameters(recurse=False) if p.ndim > 1]
        if odd and not isinstance(module, known):
            raise UnsupportedModelError(
                f"FLOPs can be counted of linear layers only, and {type(module).__name__} has {odd[0]} of its own"
            )
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Linear, Conv1D)))


def _reading(model: Any) -> float:
    """FLOPs of a CALM for a chunk: the network that embeds it, and the backbone's matrices."""
    return 2.0 * (matrix_weights(model.backbone) + matrix_weights(model.embedding))


def _ends(model: Any) -> tuple[nn.Module, int]:
    """The body of a causal LM, and the weights of its output matrix."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UnsupportedModelError(f"model must be a causal language model with an output matrix, got {type(model)}")
    return model.base_model, head.weight.numel()


def _attention(config: Any, entries: float) -> float:
    """FLOPs of one position that attends to so many entries, in all layers."""
    heads = int(config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 4.0 * entries * heads * size * int(config.num_hidden_layers)


def _state(model: Any) -> torch.Tensor:
    return torch.zeros(1, model.config.hidden_size, device=model.device, dtype=model.dtype)


# Tokens a second that CALMs and ordinary language models write, taking turns.


Row = dict[str, Any]

BATCHES = (1, 8, 32)


def measure_speed(
    models: Mapping[str, Any],
    prompts: Tensor,
    *,
    batches: Sequence[int] = BATCHES,
    new: int = 128,
    rounds: int = 5,
    advance: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Let every model write on from the same prompts in turn, with its cache, sampling at temperature 1.

    Nothing ends a text, so that all write equally much. Each model writes a few tokens unmeasured first.

    Args:
        models: by name, in eval mode.
        prompts: ``(B, n)`` token ids, at least as many as the largest batch.
        batches: texts that are written at a time.
        new: tokens that each is to have.
        rounds: how often each model takes its turn, the order turning.
        advance: called with a label before each turn.

    Returns:
        A record for each turn, by model: its method, batch, round, seconds, and tokens that were written.

    Raises:
        QuickmergeError: there are too few prompts.
        ValueError: a number is out of range.
    """
    new, rounds = whole_number("new", new), whole_number("rounds", rounds)
    batches = [whole_number("batch", batch) for batch in batches]
    if len(prompts) < max(batches):
        raise QuickmergeError(
            f"prompts must be at least {max(batches)}, as many as the largest batch, got {len(prompts)}"
        )
    arms = [Arm(name, settings={"model": model}) for name, model in models.items()]

    def written(arm: Arm, rows: Tensor, turn: int) -> Row:
        advance(f"{arm.name}, batch {len(rows)}")
        seconds, tokens = write_on(arm.settings["model"], rows, new, seed=turn)
        return {"method": arm.name, "batch": len(rows), "round": turn, "seconds": seconds, "tokens": tokens}

    def begun(arm: Arm, rows: Tensor, turn: int) -> None:
        write_on(arm.settings["model"], rows, min(new, 8), seed=0)

    records = []
    for batch in batches:
        for own in interleave(arms, [prompts[:batch]], written, rounds=rounds, warm_up=begun):
            records += own
    return records


def write_on(model: Any, prompts: Tensor, new: int, seed: int) -> tuple[float, int]:
    """Seconds of one call of ``generate``, and tokens that it wrote: ``new`` in each row."""
    prompts = prompts.to(model.device)
    torch.manual_seed(seed)
    with torch.inference_mode(), _endless(model):
        start = now(model.device)
        if is_calm(model):
            out = model.generate(prompts, torch.ones_like(prompts), max_new_tokens=new, eos_token_id=[], seed=seed)
        else:
            out = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, do_sample=True, top_k=0,
                top_p=1.0, temperature=1.0,
            )  # fmt: skip
        seconds = now(model.device) - start
    return seconds, (out.shape[1] - prompts.shape[1]) * len(out)


def speed_rows(records: Sequence[Row], against: str | None = None) -> list[Row]:
    """A row for each batch and model: medians over rounds, with quartiles.

    ``tokens_per_second`` is tokens a second, ``speedup`` the same over that of the model ``against`` (the first unless
    given) in the same round.
    """
    other = against if against is not None else records[0]["method"]
    rows = []
    for batch, method in dict.fromkeys((r["batch"], r["method"]) for r in records):
        pace = {r["round"]: r["tokens"] / r["seconds"] for r in records if (r["batch"], r["method"]) == (batch, method)}
        own = {r["round"]: r["tokens"] / r["seconds"] for r in records if (r["batch"], r["method"]) == (batch, other)}
        row: Row = {"method": method, "batch": batch, "against": other, "rounds": len(pace)}
        ratios = [pace[turn] / own[turn] for turn in pace]
        for name, values in (("tokens_per_second", list(pace.values())), ("speedup", ratios)):
            row |= spread(name, values)
        rows.append(row)
    return rows


@contextmanager
def _endless(model: Any) -> Iterator[None]:
    """Let no token end a text of an ordinary model meanwhile."""
    config = getattr(model, "generation_config", None)
    if is_calm(model) or config is None:
        yield
        return
    known = config.eos_token_id, config.pad_token_id
    config.eos_token_id, config.pad_token_id = None, known[1] if known[1] is not None else 0
    try:
        yield
    finally:
        config.eos_token_id, config.pad_token_id = known


# What a temperature does to a CALM: how often it is right, how often it repeats itself, and the draws it takes.


TWICE = 2
"""Chunks that are made at each place, so that they can be the same."""


@torch.no_grad()
def temperature_rows(
    model: Any,
    text: BrierText,
    temperatures: Sequence[float],
    *,
    places: int = 64,
    count: int = 200,
    pilot: int = 1000,
    most_draws: int = 10_000,
    seed: int = 0,
    advance: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Draw two chunks at some places at each temperature, by the exact method, and by ``batch`` where it can.

    A row has ``right``, the share of chunks that are what stands there, ``same``, the share of places whose two chunks
    are the same, ``draws`` that were looked at for a chunk on average and ``made`` for it, ``gave_up``, the share of
    chunks for which ``most_draws`` were not enough (they count in ``right`` and ``same`` at temperature 1),
    ``expected``, what the formula says of the shares of chunks among ``pilot`` draws at each place, and ``flops`` for
    a token.

    Args:
        model: a CALM in eval mode.
        text: places of held-out texts.
        temperatures: each in (0, 1].
        places: the first so many of the text.
        count: draws of the batch method.
        pilot: draws at each place for the formula. A chunk that is rarer is not seen, so that where no chunk is likely
            the formula says too few.
        most_draws: of the exact method for a chunk.
        seed: of all that is random.
        advance: called with a label after each row.

    Raises:
        QuickmergeError: a temperature is not in (0, 1].
        ValueError: a number is out of range.
    """
    places, count, pilot = whole_number("places", places), whole_number("count", count), whole_number("pilot", pilot)
    ways = [(t, "exact") for t in temperatures]
    ways += [(t, "batch") for t in temperatures if split_inverse(t)[1] == 0 and t != 1]  # at 1 one draw does
    states, truth = _states(model, text, places)
    generator = torch.Generator().manual_seed(seed)
    shares = _shares(model.sample_chunks(states, pilot, generator=generator))
    twice = states.repeat_interleave(TWICE, 0)
    context = text.windows.shape[1] / 2
    rows = []
    for temperature, method in ways:

        def sampler(draws: int) -> Tensor:
            drawn: Tensor = model.sample_chunks(twice, draws, generator=generator)
            return drawn

        if method == "exact":
            found = exact(sampler, temperature, generator=generator, most_draws=most_draws, give_up=True)
            expected = sum(expected_draws(p, temperature) for p in shares) / len(shares)
        else:
            found, expected = sharper.batch(sampler, temperature, count, generator=generator), float(count)
        rows.append({
            "temperature": temperature, "temperature_method": method, "places": len(states), **_quality(found, truth),
            "draws": float(found.draws.double().mean()), "expected": expected, "made": found.made,
            "gave_up": float((~found.exact).double().mean()) if method == "exact" else 0.0,
            "flops": writing_cost(model, context, max(1, round(float(found.draws.double().mean())))).total,
        })  # fmt: skip
        advance(f"temperature {temperature:g}, {method}")
    return rows


def _states(model: Any, text: BrierText, most: int) -> tuple[Tensor, Tensor]:
    """``(P, D)`` of the first places of a text, and the chunks ``(P, K)`` that stand there."""
    patch = model.config.patch
    states, truth = [], []
    for window, place in text.places[:most].tolist():
        ids = text.windows[window, : place + patch].to(model.device)
        states.append(model.hidden(ids[None, :place])[0][0, -1])
        truth.append(ids[place:])
    return torch.stack(states), torch.stack(truth)


def _shares(chunks: Tensor) -> list[Tensor]:
    """The share of each different chunk among the draws ``(N, P, K)`` of each place."""
    shares = []
    for column in chunks.unbind(1):
        counts: Tensor = torch.unique(column, dim=0, return_counts=True)[1]
        shares.append(counts.double() / len(column))
    return shares


def _quality(found: Drawn, truth: Tensor) -> Row:
    pairs = found.chunks.view(-1, TWICE, found.chunks.shape[1])
    right = (pairs == truth[:, None]).all(-1).double().mean()
    return {"right": float(right), "same": float((pairs[:, 0] == pairs[:, 1]).all(-1).double().mean())}
