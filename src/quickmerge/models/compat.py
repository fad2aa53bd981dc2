"""Every name of transformers and timm that is private or not settled, in one place.

transformers keeps its models and configurations as they are from release to release; what lies between them (caches,
masks, attention functions, tables of names) it renames. The package leans on it here and nowhere else, so that a
release that changes something is mended in this file; `changes` says what that is.

Nothing is imported before it is asked for: ``import quickmerge`` loads neither torch nor transformers.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache as remembered
from functools import wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from quickmerge.errors import QuickmergeError, UnsupportedModelError

if TYPE_CHECKING:
    from types import ModuleType

    import torch
    from torch import Tensor, nn
    from transformers.cache_utils import (
        DynamicLayer,
        DynamicSlidingWindowLayer,
        LinearAttentionAndFullAttentionLayer,
        LinearAttentionAndSlidingWindowAttentionLayer,
    )
    from transformers.convert_slow_tokenizer import TikTokenConverter
    from transformers.generation import (
        AlternatingCodebooksLogitsProcessor,
        ClassifierFreeGuidanceLogitsProcessor,
        EncoderNoRepeatNGramLogitsProcessor,
        EncoderRepetitionPenaltyLogitsProcessor,
        GenerateDecoderOnlyOutput,
        GenerationMode,
        PrefixConstrainedLogitsProcessor,
        SynthIDTextWatermarkLogitsProcessor,
        UnbatchedClassifierFreeGuidanceLogitsProcessor,
    )
    from transformers.generation.streamers import BaseStreamer
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    from transformers.pytorch_utils import Conv1D
    from transformers.utils import ModelOutput

Model = TypeVar("Model")

__all__ = [
    "CACHE_NAMES",
    "COLUMN_NUMBERS",
    "CONFIG_NOTES",
    "CONFIG_PLACES",
    "CONFIG_TABLE",
    "NEWEST",
    "OLDEST",
    "TIMM_ATTENTION",
    "TIMM_BASE",
    "TIMM_BLOCK",
    "TOKEN_AXES",
    "AlternatingCodebooksLogitsProcessor",
    "BaseStreamer",
    "ClassifierFreeGuidanceLogitsProcessor",
    "Conv1D",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "EncoderNoRepeatNGramLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
    "GenerateDecoderOnlyOutput",
    "GenerationMode",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "LlamaDecoderLayer",
    "ModelOutput",
    "PrefixConstrainedLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "TikTokenConverter",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "asks_registry",
    "attention_function",
    "attention_implementation",
    "attention_names",
    "bad_request",
    "bare_model_class",
    "cache_argument",
    "cache_name",
    "cache_trait",
    "cached_commit",
    "calls_attention",
    "causal_lm_names",
    "changes",
    "choose_attention",
    "device_of",
    "either_cache",
    "fresh_cache",
    "generate_merges",
    "given_cache",
    "gives_feature_maps",
    "has_timm_grid",
    "hear_generate",
    "image_classification_names",
    "image_text_names",
    "is_timm",
    "is_users_cache",
    "keeps_past",
    "library_logging",
    "make_mask",
    "model_types",
    "own_cache",
    "own_model",
    "register_attention",
    "replays_hooks",
    "reshapes_output",
    "returned_cache",
    "rotation",
    "sentencepiece_available",
    "served_names",
    "serves_models",
    "takes_cache",
    "timm_grid",
    "torchvision_available",
    "watch_continuous_batching",
    "without_cache",
]

OLDEST, NEWEST = "5.19.0", "5.24.0"
"""The releases of transformers that ``make compat`` has passed with, and all between them."""

CLASSES = {
    "AlternatingCodebooksLogitsProcessor": "transformers.generation",
    "BaseStreamer": "transformers.generation.streamers",
    "ClassifierFreeGuidanceLogitsProcessor": "transformers.generation",
    "Conv1D": "transformers.pytorch_utils",
    "CacheLayerMixin": "transformers.cache_utils",
    "DynamicIndexedLayer": "transformers.cache_utils",
    "DynamicLayer": "transformers.cache_utils",
    "LinearAttentionAndFullAttentionLayer": "transformers.cache_utils",
    "LinearAttentionAndSlidingWindowAttentionLayer": "transformers.cache_utils",
    "DynamicSlidingWindowLayer": "transformers.cache_utils",
    "EncoderNoRepeatNGramLogitsProcessor": "transformers.generation",
    "EncoderRepetitionPenaltyLogitsProcessor": "transformers.generation",
    "GenerateDecoderOnlyOutput": "transformers.generation",
    "GenerationMode": "transformers.generation",
    "LlamaDecoderLayer": "transformers.models.llama.modeling_llama",
    "ModelOutput": "transformers.utils",
    "PrefixConstrainedLogitsProcessor": "transformers.generation",
    "SynthIDTextWatermarkLogitsProcessor": "transformers.generation",
    "TikTokenConverter": "transformers.convert_slow_tokenizer",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "transformers.generation",
}
"""Classes that stand in no list of public names, and the module that each is taken from."""


def __getattr__(name: str) -> Any:
    """The classes, imported when first asked for."""
    if name not in CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = _take(CLASSES[name], name)
    globals()[name] = found
    return found


def _take(module: str, name: str) -> Any:
    """``name`` out of ``module`` of transformers; an ImportError that tells the release if it is gone."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        import transformers

        raise ImportError(
            f"transformers {transformers.__version__} has no {module}.{name}, which quickmerge needs: "
            f"install transformers {OLDEST} to {NEWEST}"
        ) from error


# The cache: what models take and give -----------------------------------------------------------------------------

TOKEN_AXES = {"input_ids": 1, "inputs_embeds": 1, "position_ids": -1, "cache_position": 0, "token_type_ids": 1}
"""Along which axis of a decoder's arguments tokens lie."""

COLUMN_NUMBERS = "cache_position"
"""What some releases call the numbers of the columns of a cache that tokens are written to."""

CACHE_NAMES = ("cache", "past_key_values", "layer_past")
"""What the cache is called as an argument: from transformers 5.24 on, before it, and in some blocks still."""


@remembered
def cache_name() -> str:
    """What the installed transformers calls the cache, as an argument of models and of ``generate`` and as an output:
    ``cache`` from 5.24 on, ``past_key_values`` before it."""
    output = _take("transformers.modeling_outputs", "BaseModelOutputWithPast")
    return next(name for name in CACHE_NAMES if name in inspect.signature(output).parameters)


def cache_argument(taker: Any, cache: Any) -> dict[str, Any]:
    """The cache as the keyword argument that ``taker`` wants, to be given on as ``**cache_argument(model, cache)``.

    Args:
        taker: a module, whose ``forward`` is asked, or a function.
        cache: the cache or None.

    Returns:
        One entry. A ``taker`` that names no cache is given the name of the installed transformers.
    """
    return {_name_in(taker) or cache_name(): cache}


def own_cache(base: nn.Module) -> str | None:
    """The class of cache that a decoder makes for itself, where it takes no other; None where any will do."""
    parameters = inspect.signature(type(base).forward).parameters
    told = [
        str(getattr(p.annotation, "__args__", (p.annotation,))[0]) for n, p in parameters.items() if n in CACHE_NAMES
    ]
    found = told[0].strip("'<>").rsplit(".", 1)[-1].split(" |")[0] if told else "Cache"
    return None if found in ("Cache", "DynamicCache", "_empty", "inspect._empty", "Any") else found


def keeps_past(base: nn.Module) -> bool:
    """Whether a decoder keeps what it read in modules of its own, and not in the cache that it is given."""
    return not takes_cache(base) or any(hasattr(module, "_setup_cache") for module in base.modules())


def takes_cache(taker: Any) -> bool:
    """Whether a module or function names a cache among its arguments."""
    return _name_in(taker) is not None


_NAMES: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()
"""What functions that were asked call the cache. None of them is kept alive by it: a patched one may hold a model."""


def _name_in(taker: Any) -> str | None:
    forward = getattr(taker, "forward", taker)
    function = getattr(forward, "__func__", forward)
    if function not in _NAMES:
        parameters = inspect.signature(function).parameters
        _NAMES[function] = next((name for name in CACHE_NAMES if name in parameters), None)
    return _NAMES[function]


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments, by any of its names; None if none is given."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def without_cache(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments without the cache, by whatever name it was given."""
    return {name: value for name, value in arguments.items() if name not in CACHE_NAMES}


def either_cache(cache: Any, past_key_values: Any) -> Any:
    """The one that was given of two arguments for the same cache, or None.

    Raises:
        QuickmergeError: if both were given.
    """
    if cache is not None and past_key_values is not None:
        raise QuickmergeError("cache must be given by one name, got cache and past_key_values")
    return past_key_values if cache is None else cache


def returned_cache(output: Any) -> Any:
    """The cache that a model's or ``generate``'s output holds, by either name; None if it holds none."""
    held = getattr(output, "__dict__", {})
    return next((held[name] for name in CACHE_NAMES if held.get(name) is not None), None)


def fresh_cache(model: Any) -> Any:
    """An empty cache with the layers that the blocks of ``model`` need, as ``generate`` makes one."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def cache_trait(cache: Any) -> str:
    """What a cache is, in words: its kind, and the trait for which columns can't be merged, moved or dropped in it."""
    kind, layers = type(cache).__name__, getattr(cache, "layers", [])
    if getattr(cache, "offloading", False):
        return "offloaded one, whose entries leave the device between blocks"
    if any(getattr(layer, "max_cache_len", None) is not None for layer in layers):
        return f"{kind}, whose size is fixed before a prompt is read"
    if any(hasattr(layer, "nbits") for layer in layers):
        return f"{kind}, which packs entries into a few bits"
    return kind


def is_users_cache(cache: Any) -> bool:
    """Whether ``generate`` was given this cache by its caller, who may go on with it."""
    return bool(getattr(cache, "_is_user_defined", False))


# Attention ----------------------------------------------------------------------------------------------------------


def attention_implementation(config: Any) -> str:
    """The name of the attention implementation that a configuration chooses: "eager", "sdpa", or one of ours."""
    return str(config._attn_implementation)


def choose_attention(config: Any, name: str) -> None:
    """Have a configuration name an attention implementation. For parts without a model; a model is told itself."""
    config._attn_implementation = name


def attention_names() -> list[str]:
    """The attention implementations that transformers knows by name, sorted."""
    return sorted({"eager", *_registry("ALL_ATTENTION_FUNCTIONS").valid_keys()})


def attention_function(implementation: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that transformers itself would use for this module.

    Raises:
        UnsupportedModelError: for "eager" if the module's file has none.
    """
    if implementation != "eager":
        return _registry("ALL_ATTENTION_FUNCTIONS")[implementation]  # type: ignore[no-any-return]
    # Eager is not in the registry: every modeling file has its own.
    function = _beside(module, "eager_attention_forward")
    if function is None:
        raise UnsupportedModelError(f"{type(module).__name__} has no eager_attention_forward beside it; use sdpa")
    return function  # type: ignore[no-any-return]


def asks_registry(module: nn.Module) -> bool:
    """Whether a module's ``forward`` looks its attention function up in transformers' registry."""
    # What a decorator stands in front of, as those do that rename arguments.
    forward = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())


def replays_hooks(block: nn.Module) -> bool:
    """Whether the hooks of a block run again when checkpointing computes it again: older releases wrap its call."""
    own = [cls for cls in type(block).__mro__ if cls.__module__.startswith("transformers.")]
    return any("__call__" in vars(cls) for cls in own)


def reshapes_output(base: nn.Module) -> bool:
    """Whether a decoder gives what its last block gives the shape of the tokens that entered, as GPT-2 does."""
    forward = inspect.unwrap(type(base).forward)
    return "output_shape" in getattr(getattr(forward, "__code__", None), "co_varnames", ())


def register_attention(name: str, function: Callable[..., Any], like: str) -> None:
    """Make ``function`` an attention implementation called ``name``, with the masks of implementation ``like``.

    A name that is there already stays as it is.
    """
    if name in _registry("ALL_ATTENTION_FUNCTIONS"):
        return
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, _registry("ALL_MASK_ATTENTION_FUNCTIONS")[like])


def calls_attention(module: nn.Module) -> bool:
    """Whether a module's own ``forward`` asks transformers' attention registry which function it shall call."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def rotation(attention: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The function by which an attention module turns queries and keys, ``f(query, key, cos, sin)``; None if its file
    has none."""
    return _beside(attention, "apply_rotary_pos_emb")  # type: ignore[no-any-return]


def make_mask(
    implementation: str,
    *,
    rows: int,
    queries: int,
    keys: int,
    query_offset: int,
    key_offset: int,
    dtype: Any,
    device: Any,
    config: Any,
    valid: Tensor | None = None,
    sees: Callable[[Any, Any, Any, Any], Any] | None = None,
    skip: bool = True,
) -> Any:
    """An attention mask as the implementation wants it, by transformers' own builder.

    Args:
        implementation: "eager" or "sdpa".
        rows: batch size.
        queries: number of queries.
        keys: number of keys.
        query_offset: place of the first query in the sequence.
        key_offset: place of the first key.
        dtype: of the scores.
        device: where the mask is wanted.
        config: the model's configuration.
        valid: ``(B, keys)`` bool, which keys are there. Default: all.
        sees: ``sees(row, head, query, key)``, whether a query sees a key, of places. Default: causal order.
        skip: whether the mask may be left out where it is no more than causal order.

    Returns:
        The mask, or None where none is needed.
    """
    build = _registry("ALL_MASK_ATTENTION_FUNCTIONS")[implementation]
    given = {} if sees is None else {"use_vmap": True}
    return build(
        batch_size=rows,
        q_length=queries,
        kv_length=keys,
        q_offset=query_offset,
        kv_offset=key_offset,
        mask_function=sees or _registry("causal_mask_function"),
        attention_mask=valid,
        allow_is_causal_skip=skip,
        dtype=dtype,
        config=config,
        device=device,
        **given,
    )


REGISTRIES = {
    "ALL_ATTENTION_FUNCTIONS": "transformers.modeling_utils",
    "ALL_MASK_ATTENTION_FUNCTIONS": "transformers.masking_utils",
    "causal_mask_function": "transformers.masking_utils",
}
"""What attention is looked up in, and the module that each is taken from."""

_FOUND: dict[str, Any] = {}


def _registry(name: str) -> Any:
    # A table of our own, as compiled code can look into it and not import.
    if name not in _FOUND:
        _FOUND[name] = _take(REGISTRIES[name], name)
    return _FOUND[name]


def _beside(module: nn.Module, name: str) -> Any:
    """A function of the file that a module's class comes from; None if there is none."""
    return getattr(sys.modules[type(module).__module__], name, None)


# What there is ------------------------------------------------------------------------------------------------------


def causal_lm_names() -> Mapping[str, str]:
    """Class of the causal language model by ``model_type``."""
    return _take(_AUTO, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")  # type: ignore[no-any-return]


def image_classification_names() -> Mapping[str, str | tuple[str, ...]]:
    """Class or classes of the image classifier by ``model_type``."""
    return _take(_AUTO, "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES")  # type: ignore[no-any-return]


def image_text_names() -> Mapping[str, str]:
    """Class of the vision-language model by ``model_type``."""
    return _take(_AUTO, "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES")  # type: ignore[no-any-return]


def served_names() -> Mapping[str, str]:
    """Class that ``transformers serve`` opens whatever a config names, by ``model_type``; none in older releases."""
    return getattr(import_module(_AUTO), "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {})


def model_types() -> list[str]:
    """Every ``model_type`` that has a configuration, sorted."""
    return sorted(_take(CONFIG_TABLE, "CONFIG_MAPPING_NAMES"))


_AUTO = "transformers.models.auto.modeling_auto"


def gives_feature_maps(module: nn.Module) -> bool:
    """Whether a model is a backbone, which hands out its patches as maps (B, C, H, W)."""
    return any(each.__name__ == "BackboneMixin" for each in type(module).__mro__)


def bare_model_class(config: Any) -> Any:
    """The class of the model without a head that a configuration belongs to; None if there is none."""
    from transformers import MODEL_MAPPING

    found = MODEL_MAPPING.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


CONFIG_TABLE = "transformers.models.auto.configuration_auto"
"""The module that holds the table of model types."""

CONFIG_PLACES = ("_name_or_path", "name_or_path")
"""Entries that say where a model was read from; transformers leaves them out of a saved configuration, but not out of
those inside it."""

CONFIG_NOTES = ("transformers_version", "_name_or_path", "dtype", "architectures")
"""Entries of a saved configuration that say where it comes from, and nothing of what a model computes."""


def own_model(
    initialise: Callable[[nn.Module], None] | None = None, *, attention: bool = False
) -> Callable[[type[Model]], type[Model]]:
    """Tell transformers what it must know of a `PreTrainedModel` of ours; decorates the class.

    Args:
        initialise: gives a module its first weights. Default: modules keep what they made themselves.
        attention: whether the model is built of one of transformers', and runs whatever attention that runs.
    """

    def _init_weights(self: Any, module: nn.Module) -> None:
        if initialise is not None:
            initialise(module)

    def declare(model: type[Model]) -> type[Model]:
        told: Any = model
        told._init_weights = _init_weights
        if attention:
            told._supports_sdpa = told._supports_flash_attn = told._supports_flex_attn = True
            told._supports_attention_backend = True
        return model

    return declare


def generate_merges(vocabulary: dict[str, int], scores: dict[str, float], skip: set[str]) -> list[tuple[str, str]]:
    """The merges of a BPE model of SentencePiece, from its pieces and their scores.

    Args:
        vocabulary: id of each piece.
        scores: score of each piece.
        skip: pieces that nothing is merged to or from.
    """
    merge = _take("transformers.convert_slow_tokenizer", "generate_merges")
    return merge(vocabulary, scores, skip_tokens=skip)  # type: ignore[no-any-return]


def sentencepiece_available() -> bool:
    """Whether the package sentencepiece is there."""
    return bool(_take("transformers.utils", "is_sentencepiece_available")())


def torchvision_available() -> bool:
    """Whether the package torchvision is there."""
    return bool(_take("transformers.utils", "is_torchvision_available")())


def library_logging() -> ModuleType:
    """The module by which transformers' bars and warnings are set."""
    return _take("transformers.utils", "logging")  # type: ignore[no-any-return]


# Generation ---------------------------------------------------------------------------------------------------------

Hearing = Callable[[Any, Any, dict[str, Any], dict[str, Any]], dict[str, Any]]

_HEARING: list[Hearing] = []


def hear_generate(hearing: Hearing) -> None:
    """Have a function called in every ``generate``, when it sorts its arguments; at once if it is there already.

    ``generate`` hands a callable ``custom_generate`` neither its streamer nor its tokenizer nor its assistant model,
    and has no seam at which they can be seen but the method that sorts them. It is looked up on the model when the
    call has begun, so that listening also works where ``generate`` itself was taken from the model before.

    Args:
        hearing: ``hearing(model, custom_generate, given, kwargs)``, where ``given`` holds ``tokenizer``,
            ``assistant_model``, ``streamer`` and ``synced_gpus``, and ``kwargs`` the arguments of no other name. What
            it returns is handed on to ``custom_generate`` beside what would be anyway.

    Raises:
        ImportError: the installed transformers sorts them elsewhere.
    """
    if hearing in _HEARING:
        return
    mixin = _take("transformers", "GenerationMixin")
    name = "_extract_generation_mode_kwargs"
    sort = getattr(mixin, name, None)
    wanted = ["self", "custom_generate", "kwargs", "synced_gpus", "assistant_model", "streamer"]
    if sort is None or list(inspect.signature(sort).parameters) != wanted:
        import transformers

        raise ImportError(
            f"transformers {transformers.__version__} has no GenerationMixin.{name}({', '.join(wanted[1:])}), which "
            f"quickmerge needs: install transformers {OLDEST} to {NEWEST}"
        )

    @wraps(sort)
    def sort_and_tell(
        self: Any, custom_generate: Any, kwargs: dict[str, Any], synced_gpus: Any, assistant_model: Any, streamer: Any
    ) -> dict[str, Any]:
        given = {"tokenizer": kwargs.get("tokenizer"), "synced_gpus": synced_gpus}
        given |= {"assistant_model": assistant_model, "streamer": streamer}
        sorted_out = sort(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer)
        return {**sorted_out, **hearing(self, custom_generate, given, kwargs)}

    setattr(mixin, name, sort_and_tell)
    _HEARING.append(hearing)


# Serving -------------------------------------------------------------------------------------------------------------


def serves_models() -> bool:
    """Whether this process is transformers' own command line, in which models are loaded to be served."""
    return "transformers.cli.serve" in sys.modules


def bad_request(sentence: str) -> Exception:
    """What ``transformers serve`` answers a client with as status 400 and this sentence."""
    from fastapi import HTTPException

    return HTTPException(400, sentence)


def cached_commit(model: Any) -> str | None:
    """The commit of the hub's repository that a model was loaded from, None for a folder."""
    return getattr(model.config, "_commit_hash", None)


_WATCHING: list[Callable[[Any], None]] = []
"""Who looks at models that are about to be batched continuously."""


def watch_continuous_batching(look: Callable[[Any], None]) -> None:
    """Let ``look`` see every model before it is batched continuously, which never calls its ``generate``.

    Args:
        look: is given the model, and may raise. It is asked once, however often it is given here.

    Raises:
        ImportError: the installed transformers starts that elsewhere.
    """
    if look in _WATCHING:
        return
    mixin = _take("transformers", "GenerationMixin")
    begin = mixin.init_continuous_batching

    @wraps(begin)
    def look_and_begin(self: Any, *args: Any, **kwargs: Any) -> Any:
        look(self)
        return begin(self, *args, **kwargs)

    mixin.init_continuous_batching = look_and_begin
    _WATCHING.append(look)


# Where weights are ----------------------------------------------------------------------------------------------------


def device_of(model: Any) -> torch.device:
    """The device that a model of transformers, or a part of one, computes on; where it is spread, that of its inputs.

    Weights that accelerate has moved to a disk are on the meta device, and come to another one for a forward.
    """
    import torch

    found: torch.device = next((each.device for each in model.parameters()), torch.device("cpu"))
    if found.type != "meta":
        return found
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return found


# timm ---------------------------------------------------------------------------------------------------------------

TIMM_BASE = ("patch_embed", "blocks", "norm", "num_prefix_tokens")
"""Parts of a vision transformer of timm."""

TIMM_BLOCK = ("norm1", "attn", "ls1", "norm2", "mlp", "ls2")
"""Of a block, in the order in which they are computed; a block that norms what it adds names them in another one."""

TIMM_ATTENTION = ("qkv", "q_norm", "k_norm", "proj", "num_heads", "head_dim", "scale")
"""Of its attention, whose ``forward`` takes an ``attn_mask``."""


def is_timm(module: nn.Module) -> bool:
    """Whether a module is of a class that timm defines, or of one made from it. timm itself is not imported."""
    return any(each.__module__.startswith("timm.models") for each in type(module).__mro__)


def timm_grid(base: Any, size: tuple[int, int]) -> tuple[int, int]:
    """How many patches ``(height, width)`` an image of ``size`` is cut into, padding at the border included."""
    height, width = base.patch_embed.dynamic_feat_size(size)
    return int(height), int(width)


def has_timm_grid(base: Any) -> bool:
    """Whether `timm_grid` can be asked."""
    return hasattr(base.patch_embed, "dynamic_feat_size")


# What it leans on ---------------------------------------------------------------------------------------------------

CALLED = {
    "transformers.cache_utils": {
        "Cache.crop": "tokens_to_remove",
        "Cache.get_mask_sizes": "query_length layer_idx",
        "Cache.get_seq_length": "layer_idx",
        "Cache.batch_select_indices": "indices",
        "Cache.batch_repeat_interleave": "repeats",
        "Cache.update": "key_states value_states layer_idx",
        "DynamicCache.__init__": "config",
        "DynamicLayer.lazy_initialization": "key_states value_states",
        "DynamicSlidingWindowLayer.get_seq_length": "",
    },
    "transformers.convert_slow_tokenizer": {
        "TikTokenConverter.__init__": "vocab_file pattern extra_special_tokens",
        "TikTokenConverter.converted": "",
        "TikTokenConverter.load_tiktoken_bpe": "tiktoken_url",
        "generate_merges": "vocab vocab_scores skip_tokens",
    },
    "transformers.generation": {
        "GenerationMixin.generate": "inputs generation_config custom_generate streamer logits_processor",
        "GenerationMixin.init_continuous_batching": "generation_config continuous_batching_config",
        "GenerationMixin.prepare_inputs_for_generation": "input_ids next_sequence_length is_first_iteration",
        "GenerateDecoderOnlyOutput": "sequences",
    },
    "transformers.masking_utils": {
        "causal_mask_function": "batch_idx head_idx q_idx kv_idx",
        **dict.fromkeys(
            ("eager_mask", "sdpa_mask"),
            "batch_size q_length kv_length q_offset kv_offset mask_function attention_mask allow_is_causal_skip "
            "use_vmap dtype config device",
        ),
    },
    "transformers.modeling_utils": {
        "ALL_ATTENTION_FUNCTIONS.register": "key value",
        "ALL_ATTENTION_FUNCTIONS.valid_keys": "",
        "PreTrainedModel.set_attn_implementation": "attn_implementation",
        "PreTrainedModel.get_input_embeddings": "",
        "PreTrainedModel.get_output_embeddings": "",
        "PreTrainedModel.post_init": "",
    },
    "transformers.models.llama.modeling_llama": {
        "LlamaDecoderLayer.forward": "hidden_states attention_mask position_embeddings",
    },
    "transformers.utils": {
        "is_sentencepiece_available": "",
        "is_torchvision_available": "",
        **{
            f"logging.{name}": ""
            for name in (
                "disable_progress_bar",
                "enable_progress_bar",
                "get_verbosity",
                "is_progress_bar_enabled",
                "set_verbosity_error",
            )
        },
    },
}
"""What is called of transformers beyond its models, and the names of the arguments that it is given."""

OVERRIDDEN = {
    "transformers.cache_utils": {
        "DynamicLayer.batch_repeat_interleave": "repeats",
        "DynamicLayer.batch_select_indices": "indices",
        "DynamicLayer.crop": "tokens_to_remove",
        "DynamicLayer.get_mask_sizes": "query_length",
        "DynamicLayer.get_seq_length": "",
        "DynamicLayer.reorder_cache": "beam_idx",
        "DynamicLayer.reset": "",
        "DynamicLayer.update": "key_states value_states args kwargs",
    },
    "transformers": {
        "GenerationMixin._extract_generation_mode_kwargs": (
            "custom_generate kwargs synced_gpus assistant_model streamer"
        ),
    },
}
"""Methods that ours take the place of, so that transformers calls these: all their arguments."""

BESIDE = {
    "eager_attention_forward": "module query key value attention_mask scaling dropout",
    "apply_rotary_pos_emb": "q k cos sin",
}
"""Functions that stand in the file of each language model, and what they are given."""

READ = "input_ids attention_mask position_ids inputs_embeds use_cache"
"""What a language model is given besides its cache."""


def changes(families: Iterable[str] = ()) -> list[str]:
    """What the installed transformers has renamed, moved or dropped of all that quickmerge leans on.

    Args:
        families: ``model_type`` of causal language models to look at too.

    Returns:
        One sentence for each, that names the release; none where nothing has changed.
    """
    import transformers

    told: list[str] = []
    for name, module in {**CLASSES, **REGISTRIES}.items():
        _look(told, module, name)
    for module, calls in CALLED.items():
        for name, arguments in calls.items():
            _compare(told, module, name, arguments)
    for module, methods in OVERRIDDEN.items():
        for name, arguments in methods.items():
            _compare(told, module, name, arguments, all_of_them=True)
    _look(told, CONFIG_TABLE, "AutoConfig")
    for table in ("CAUSAL_LM", "IMAGE_CLASSIFICATION", "IMAGE_TEXT_TO_TEXT"):
        _look(told, _AUTO, f"MODEL_FOR_{table}_MAPPING_NAMES")
    if not hasattr(transformers.PretrainedConfig, "_attn_implementation"):
        told.append("configurations no longer name their attention in `_attn_implementation`")
    if not hasattr(transformers.PreTrainedModel, "_init_weights"):
        told.append("models no longer have `_init_weights`")
    for family in families:
        _compare_model(told, family)
    return [f"transformers {transformers.__version__}: {each}" for each in dict.fromkeys(told)]


def _look(told: list[str], module: str, name: str) -> Any:
    """``name``, dotted, out of a module; None, and a sentence, if it is gone."""
    try:
        found: Any = import_module(module)
    except ImportError:
        told.append(f"there is no module `{module}`")
        return None
    for part in name.split("."):
        found = getattr(found, part, None)
        if found is None:
            told.append(f"`{module}` has no `{name}`")
            return None
    return found


def _compare(told: list[str], module: str, name: str, arguments: str, *, all_of_them: bool = False) -> None:
    found = _look(told, module, name)
    if found is None:
        return
    taken = {key: each for key, each in inspect.signature(found).parameters.items() if key not in ("self", "cls")}
    given = arguments.split()
    open_end = any(each.kind is each.VAR_KEYWORD for each in taken.values())
    for argument in given:
        if argument not in taken and (all_of_them or not open_end):
            told.append(f"`{name}` no longer takes `{argument}`, it takes ({', '.join(taken)})")
    for key, each in taken.items():
        plain = each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
        needed = plain and each.default is each.empty
        if key not in given and (all_of_them or (needed and key not in CACHE_NAMES)):
            told.append(f"`{name}` takes `{key}` too, which it did not")


def _compare_model(told: list[str], family: str) -> None:
    import transformers

    name = causal_lm_names().get(family)
    if name is None:
        told.append(f"there is no causal language model for `{family}`")
        return
    model = getattr(transformers, name)
    for function, arguments in BESIDE.items():
        _compare(told, model.__module__, function, arguments)
    _compare(told, model.__module__, f"{name}.forward", READ)
    if not takes_cache(model.forward):
        told.append(f"`{name}.forward` takes no cache by any of the names {', '.join(CACHE_NAMES)}")
