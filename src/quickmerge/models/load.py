"""Checking how a model is asked to be loaded, before anything is read."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from quickmerge.data import shipped_shape
from quickmerge.errors import (
    DamagedWeightsError,
    QuickmergeError,
    UnknownModelError,
    UnsupportedModelError,
    door,
    first_sentence,
    near_match,
)
from quickmerge.models.compat import attention_names
from quickmerge.models.download import cache_folder
from quickmerge.models.embedded import EMBEDDED, MODELS, SENTENCE_MODELS, VISION_MODELS
from quickmerge.models.folder import CONFIG, check_files, check_model_folder
from quickmerge.models.kinds import HUB_ID
from quickmerge.models.read import check_causal, read, read_config, saying, transformers_silenced
from quickmerge.models.weights import check_build, local_path, shown
from quickmerge.terminal import say

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "MODELS",
    "check_attention",
    "check_device",
    "check_dtype",
    "find_model",
    "find_name",
    "hub_folder",
    "load",
    "load_from",
    "load_shape_only",
    "model_folder",
    "noted_tokenizer",
    "verify",
]


DTYPES = ("float32", "bfloat16", "float16", "float64")
AUTO, INT8 = "auto", "int8"
WORDS = (*DTYPES, INT8, AUTO)
"""What ``dtype`` may say of a model that writes text."""


def check_dtype(dtype: str | torch.dtype, allowed: Sequence[str] = DTYPES) -> torch.dtype:
    """Give the torch dtype that is meant; ``allowed`` are the names that a message tells.

    Raises:
        QuickmergeError: it is not one that weights can be held in.
    """
    import torch

    name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise QuickmergeError(f"dtype is {name!r}{near_match(name, allowed)}, but must be one of: {', '.join(allowed)}")
    resolved: torch.dtype = getattr(torch, name)
    return resolved


def check_device(device: str | torch.device) -> torch.device:
    """Give the torch device that is meant.

    Raises:
        QuickmergeError: the words name no device, or this machine has none such.
    """
    import torch

    try:
        placement = torch.device(device)
        torch.empty(0, device=placement)  # a name can be right and the device still absent
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        allowed = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        if torch.backends.mps.is_available():
            allowed.append("mps")
        raise QuickmergeError(
            f"device is {str(device)!r}, which this machine does not have; it has: {', '.join(allowed)}"
        ) from error
    return placement


def check_attention(name: str) -> str:
    """Give back the name of an attention implementation that transformers knows.

    Raises:
        QuickmergeError: it knows none of this name.
    """
    known = attention_names()
    # a name with a slash is a kernel on the hub, which only transformers can look up
    if name not in known and "/" not in name:
        usual = [word for word in known if "paged" not in word]
        raise QuickmergeError(
            f"attn_implementation is {name!r}{near_match(name, known)}, but must be one of: {', '.join(usual)}"
        )
    return name


# Fetching a model from the hub as files, which then pass the same checks as any folder.


FILES = ("*.json", "*.model", "*.tiktoken", "*.jinja", "*.txt", "LICENSE*", "NOTICE*")
"""What is fetched of a model besides its weights: its settings and its tokenizer."""
OTHERS = ("onnx/*", "openvino/*", "original/*", "coreml/*", "*/*.safetensors", "consolidated*.safetensors")
"""The same model for other programs, and other models that lie in folders of their own."""


def hub_folder(name: str, *, weights: bool = True) -> Path:
    """The folder in the hub's cache that holds a model's files, fetched if need be.

    Args:
        name: a hub id, ``"owner/name"``.
        weights: whether its weights are wanted; only safetensors are fetched.

    Raises:
        UnknownModelError: there is no such model, or the hub can't be reached.
    """
    from huggingface_hub import snapshot_download

    wanted = [*FILES, *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=list(OTHERS)))
    except (OSError, ValueError) as error:  # what the hub's client raises derives from these
        raise UnknownModelError(
            f"the hub has no model {name!r} that can be reached from here ({first_sentence(error)}): "
            "check the id and the connection, or give a local model folder"
        ) from error


# One way to load a model: an embedded name, a folder, or a hub id.


T = TypeVar("T")


def load(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, ready to generate.

    Args:
        name_or_path: an embedded name (`"smollm2-135m"`), a local model folder, or a hub id (`"owner/name"`).
        dtype: what the weights are held in, as `torch.bfloat16` or `"bfloat16"`. `"auto"` takes bfloat16 where a
            measurement of at most two seconds says that it is faster on this machine, see
            `quickmerge.models.precision.choose`, and float32 elsewhere; what it chose is told where there is progress.
            `"int8"` packs the weights of linear layers by torchao, in a model that computes in bfloat16; it saves
            memory, and on a CPU it is slower than bfloat16.
        device: where the weights are held, as `"cpu"`, `"cuda"` or `"cuda:1"`.
        attn_implementation: `"sdpa"`, `"eager"` or another that transformers knows; None lets it choose.
        cache_dir: where embedded models are kept; None means `$QUICKMERGE_CACHE`, else the user's cache folder.
        progress: whether to show on stderr what goes on.

    Returns:
        The model in evaluation mode, and its tokenizer, which pads on the left.

    Raises:
        UnknownModelError: there is no such model, or the hub cannot be reached.
        UnsupportedModelError: it is not a causal language model.
        DamagedWeightsError: a weights file is truncated, garbled or incomplete.
        CacheFolderError: the cache folder cannot be written.
        FetchError: an embedded model could not be downloaded.
        QuickmergeError: `dtype`, `device` or `attn_implementation` is not one that can be used.
    """
    return load_from(
        name_or_path, MODELS, read, dtype=dtype, device=device, attn_implementation=attn_implementation,
        cache_dir=cache_dir, progress=progress,
    )  # fmt: skip


def load_from(
    name_or_path: str | os.PathLike[str],
    embedded: Mapping[str, str],
    read: Callable[[str, dict[str, Any]], tuple[PreTrainedModel, T]],
    *,
    dtype: str | torch.dtype,
    device: str | torch.device,
    attn_implementation: str | None,
    cache_dir: str | os.PathLike[str] | None,
    progress: bool,
    writes: bool = True,
) -> tuple[PreTrainedModel, T]:
    """Load a model of any kind and what goes with it.

    Args:
        name_or_path: as for `load`, as are the settings.
        embedded: the embedded models of this kind.
        read: reads a folder or hub id with settings of `from_pretrained`.
        writes: whether models of this kind write text, for which ``"auto"`` and ``"int8"`` are.

    It raises what `load` raises, and what ``read`` does.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        what = type(name_or_path).__name__
        raise UnsupportedModelError(
            f"name_or_path must be a name, a folder or a hub id, got {what}: a model that is there already goes "
            "straight to quickmerge.reduce or quickmerge.multipole"
        )
    from quickmerge.models.precision import choose
    from quickmerge.models.quantized import int8_packer, pack_int8

    name = os.fspath(name_or_path)
    placement = check_device(device)
    # What takes seconds to find out comes last, and what is only a name at once.
    asked = dtype if writes and isinstance(dtype, str) and dtype in (AUTO, INT8) else None
    options: dict[str, Any] = {}
    if asked is None:
        options["dtype"] = check_dtype(dtype, WORDS if writes else DTYPES)
    elif asked == INT8:
        int8_packer()
        options["dtype"] = check_dtype("bfloat16")
    if attn_implementation is not None:
        options["attn_implementation"] = check_attention(attn_implementation)
    if name in embedded:
        source = str(EMBEDDED[name].prepare(cache_folder(cache_dir), progress=progress))
    else:
        source = find_model(name, embedded)
        if not Path(source).is_dir():
            source = _fetched(source, progress)
    if asked == AUTO:
        with saying("measuring float32 and bfloat16", progress=progress, only_on_terminal=True):
            with transformers_silenced():
                config = read_config(source)
            chosen = choose(config, placement)
        options["dtype"] = check_dtype(chosen.dtype)
        if progress:
            say(str(chosen))
    with saying(f"loading {name}", progress=progress, only_on_terminal=True):
        try:
            model, companion = read(source, options)
        except DamagedWeightsError:
            if name in embedded:  # we know what every file should be, so say which one is not
                EMBEDDED[name].check(Path(source))
            raise
        model = model.to(placement).eval()
        if asked == INT8:
            pack_int8(model)
        _NOTED[model] = getattr(companion, "tokenizer", companion)
        return model, companion


_NOTED: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""What each model was loaded with."""


def noted_tokenizer(model: Any) -> Any:
    """The tokenizer that a model was loaded with by `load` or the like; None for any other model."""
    found = _NOTED.get(model)
    return found if callable(getattr(found, "convert_ids_to_tokens", None)) else None


def model_folder(name: str, *, progress: bool = True) -> Path:
    """The folder that holds a model's files, made or fetched if need be, and looked at.

    Args:
        name: an embedded language model, a folder of any kind of model, or a hub id.
        progress: whether to show on stderr what goes on.

    Raises:
        UnknownModelError: there is no such model, or the hub cannot be reached.
        UnsupportedModelError: it is an embedded model of another kind.
        DamagedWeightsError: its weights are truncated or garbled.
        CacheFolderError, FetchError: as `load`.
    """
    if name in MODELS:
        return EMBEDDED[name].prepare(cache_folder(None), progress=progress)
    found = find_model(name)
    return Path(found) if Path(found).is_dir() else Path(_fetched(found, progress))


def _fetched(name: str, progress: bool) -> str:
    """The folder that holds a model of the hub; its files may be a stranger's, and are checked as any folder's are."""
    with saying(f"fetching {name}", progress=progress, only_on_terminal=True):
        folder = hub_folder(name)
    check_model_folder(folder)
    return str(folder)


def verify(name: str = "smollm2-135m", *, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Hash every file of an embedded model that is already in the cache.

    Returns:
        The folder of the model.

    Raises:
        UnknownModelError: `name` is not an embedded model.
        DamagedWeightsError: a file is missing, or is not what was written.
    """
    known = [*MODELS, *VISION_MODELS, *SENTENCE_MODELS]
    if name not in known:
        raise UnknownModelError(f"name is {name!r}{near_match(name, known)}, but must be one of: {', '.join(known)}")
    folder = EMBEDDED[name].folder_in(cache_folder(cache_dir))
    EMBEDDED[name].check(folder)
    return folder


def find_model(name: str, embedded: Mapping[str, str] = MODELS) -> str:
    """Tell what a name that is not an embedded one stands for: a folder that looks sound, or a hub id.

    Args:
        name: what the user gave.
        embedded: the embedded models that could have been meant, for the messages.

    Returns:
        What `from_pretrained` takes.

    Raises:
        UnknownModelError: it can be neither.
        UnsupportedModelError: it is an embedded model of the other kind.
        DamagedWeightsError: the folder holds truncated or garbled weights.
    """
    found = find_name(name, embedded)
    if Path(found).is_dir():
        check_model_folder(Path(found))
    return found


def find_name(name: str, embedded: Mapping[str, str] = MODELS) -> str:
    """As `find_model`, without a look into the folder."""
    if name not in embedded and name in VISION_MODELS:
        raise UnsupportedModelError(f"{name} is a vision model, not a causal language model: open it with load_vision")
    if name not in embedded and name in MODELS:
        raise UnsupportedModelError(f"{name} is a causal language model, not a vision model: open it with load")
    if name not in embedded and name in SENTENCE_MODELS:
        raise UnsupportedModelError(f"{name} is a sentence encoder: open it with quickmerge.recognition.sentence")
    known = f"an embedded name ({', '.join(embedded)}), " if embedded else ""
    allowed = f"give {known}a local model folder, or a hub id such as owner/name"
    if not name.strip():
        raise UnknownModelError(f"no model is called {name!r}: {allowed}")
    folder = local_path("name_or_path", name, UnknownModelError)
    if folder.is_dir():
        return str(folder)
    if folder.exists():
        raise UnknownModelError(f"name_or_path is {shown(name)}, which is a file: give the folder that it is in")
    # a hub id is exactly owner/name; whatever else has a slash was meant as a path
    owner, slash, _ = name.partition("/")
    if not slash:
        raise UnknownModelError(f"no model is called {shown(name)}{near_match(name, embedded)}: {allowed}")
    if not HUB_ID.fullmatch(name) or owner in (".", "..") or len(name) > 200:
        raise UnknownModelError(f"there is no folder {shown(name)}: {allowed}")
    return name


# A model without its weights: enough to count tokens, FLOPs and bytes.


def load_shape_only(name: str) -> PreTrainedModel:
    """The model on the meta device: all shapes, no values, nothing but its config read.

    Neither weights nor a cache are needed for an embedded model or a folder.

    Raises:
        UnknownModelError: there is no such model.
        UnsupportedModelError: it is not a causal language model, or its config asks for sizes that no model has.
        DamagedWeightsError: its config is damaged.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder = shipped_shape(name) or _folder(name)
    with transformers_silenced():
        config = read_config(str(folder))
        check_causal(str(folder), config)

        def build() -> PreTrainedModel:
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)

        check_build(str(folder / CONFIG), build, None)
        with door(f"{folder / CONFIG} can't be used", UnsupportedModelError), torch.device("meta"):
            return build()


def _folder(name: str) -> Path:
    found = find_name(name)
    if not Path(found).is_dir():
        return hub_folder(found, weights=False)
    folder = Path(found)
    check_files(folder)
    if not (folder / CONFIG).exists():
        raise UnknownModelError(f"the folder {folder} is not a model folder: it has no config.json")
    return folder
