"""The names that releases of transformers differ in: read by any, given by the right one, and told when they change."""

from __future__ import annotations

import functools
import gc
import inspect
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import calm_samples
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from quickmerge.errors import QuickmergeError
from quickmerge.models import compat

ROOT = Path(__file__).parents[2]
names = st.sampled_from(compat.CACHE_NAMES)
others = st.dictionaries(st.sampled_from(["input_ids", "use_cache", "attention_mask"]), st.integers())


@given(names, others)
def test_a_cache_is_read_by_any_name(name: str, more: dict[str, int]) -> None:
    cache = object()
    assert compat.given_cache({**more, name: cache}) is cache
    assert compat.without_cache({**more, name: cache}) == more
    assert compat.given_cache(more) is None
    assert compat.returned_cache(SimpleNamespace(**more, **{name: cache})) is cache
    assert compat.returned_cache(SimpleNamespace(**more)) is None


@given(names)
def test_a_callee_is_given_the_name_that_it_has(name: str) -> None:
    def taker(*args: Any) -> None: ...

    taker.__signature__ = inspect.Signature([inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)])  # type: ignore[attr-defined]
    assert compat.takes_cache(taker) and list(compat.cache_argument(taker, 1)) == [name]


def test_who_names_no_cache_is_given_the_release_s_own() -> None:
    assert not compat.takes_cache(torch.nn.Linear(1, 1))
    assert compat.cache_argument(lambda **more: None, 1) == {compat.cache_name(): 1}
    assert compat.cache_name() in ("cache", "past_key_values")


def test_who_was_asked_is_not_kept() -> None:
    class Big:
        def forward(self, cache: Any = None) -> None: ...

    model = Big()
    model.forward = functools.partial(Big.forward, model)  # type: ignore[method-assign]
    assert list(compat.cache_argument(model, 1)) == ["cache"]
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_outputs_of_models_are_read_without_a_word(tiny_llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    ids = torch.tensor([[1, 2, 3]])
    cache = DynamicCache(config=tiny_llama.config)
    out = tiny_llama(ids, **compat.cache_argument(tiny_llama, cache))
    assert compat.returned_cache(out) is cache
    assert compat.returned_cache(tiny_llama(ids, use_cache=False)) is None
    assert compat.returned_cache((out.logits,)) is None


def test_a_calm_takes_and_gives_its_cache_by_either_name() -> None:
    model = calm_samples.small_calm()
    step = model.config.patch
    ids = calm_samples.some_ids(2, 3 * step)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        whole = model(ids).last_hidden_state[:, 2:]
        for name in ("cache", "past_key_values"):
            out = model(ids[:, : 2 * step], use_cache=True)
            assert out.past_key_values is out.cache is not None
            again = model(ids[:, 2 * step :], mask, **{name: out.cache}).last_hidden_state
            torch.testing.assert_close(again, whole, atol=1e-5, rtol=1e-4)
            assert model(ids).cache is None
        with pytest.raises(QuickmergeError, match="cache must be given by one name, got cache and past_key_values"):
            model(ids, cache=out.cache, past_key_values=out.cache)


def test_nothing_has_changed() -> None:
    assert compat.changes(["llama"]) == []


def shorter(self: Any, length: int) -> None: ...
def longer(self: Any, tokens_to_remove: int, keep: bool = False) -> None: ...


@pytest.mark.parametrize(
    ("where", "new", "told"),
    [
        ("transformers.cache_utils.DynamicLayer.crop", shorter, "`DynamicLayer.crop` no longer takes `tokens_to_r"),
        ("transformers.cache_utils.DynamicLayer.crop", longer, "`DynamicLayer.crop` takes `keep` too"),
        ("transformers.cache_utils.DynamicSlidingWindowLayer", None, "has no `DynamicSlidingWindowLayer`"),
        ("transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS", None, "has no `ALL_MASK_ATTENTION_FUNCTIONS`"),
        ("transformers.masking_utils.sdpa_mask", lambda batch, length: None, "`sdpa_mask` no longer takes `q_length`"),
        (
            "transformers.models.llama.modeling_llama.eager_attention_forward",
            None,
            "`transformers.models.llama.modeling_llama` has no `eager_attention_forward`",
        ),
        (
            "transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
            None,
            "has no `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`",
        ),
        (
            "transformers.LlamaForCausalLM.forward",
            lambda self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, use_cache=None,
            memory=None: None,
            "`LlamaForCausalLM.forward` takes no cache by any of the names",
        ),
    ],
)  # fmt: skip
def test_what_a_release_changes_is_told_by_name(
    where: str, new: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    if new is None:
        monkeypatch.delattr(where)
    else:
        monkeypatch.setattr(where, new)
    families = [] if "CAUSAL_LM" in where else ["llama"]
    found = compat.changes(families)
    assert any(told in each for each in found), found
    assert all(each.startswith(f"transformers {transformers.__version__}: ") for each in found)


def test_the_tested_releases_stand_in_one_place_and_are_quoted() -> None:
    quoted = f"transformers {compat.OLDEST} to {compat.NEWEST}"
    assert quoted in (ROOT / "docs" / "models" / "index.md").read_text(encoding="utf-8")
    floor = compat.OLDEST.rsplit(".", 1)[0]
    assert f'"transformers>={floor},<6"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"transformers=={compat.NEWEST}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")
