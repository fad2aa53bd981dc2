"""Reading a model with transformers, and saying in one sentence what is wrong when it cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickmerge.errors import DamagedWeightsError, QuickmergeError, UnknownModelError, UnsupportedModelError
from quickmerge.models.console import transformers_silenced

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["read"]


def read(source: str, options: dict[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read the model and the tokenizer that lie in a folder or on the hub.

    Args:
        source: a folder, or a hub id.
        options: what goes to `from_pretrained` of the model.

    Raises:
        UnknownModelError: nothing of this name can be reached.
        UnsupportedModelError: it is not a causal language model, or lacks a tokenizer.
        DamagedWeightsError: the weights are garbled or incomplete.
    """
    with transformers_silenced():
        config = _read_config(source)
        _check_causal(source, config)
        # the tokenizer first: it is small, and its absence should not cost the wait for the weights
        tokenizer = _read_tokenizer(source)
        model = _read_model(source, config, options)
    return model, tokenizer


def _read_config(source: str) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source)
    except OSError as error:
        if Path(source).is_dir():
            raise DamagedWeightsError(
                f"{Path(source) / 'config.json'} is damaged ({_first_sentence(error)}): copy or download it again"
            ) from error
        raise UnknownModelError(
            f"the hub has no model {source!r} that can be reached from here ({_first_sentence(error)}): "
            "check the id and the connection, or give a local model folder"
        ) from error
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"{source} is of a model type that the installed transformers does not know ({_first_sentence(error)})"
        ) from error


def _check_causal(source: str, config: PretrainedConfig) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    saved = list(config.architectures or [])
    # An encoder such as BERT can be opened as a causal model too, but it was not trained as one.
    if causal is None or (saved and not set(saved) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())):
        kind = saved[0] if saved else f"model type {config.model_type!r}"
        raise UnsupportedModelError(
            f"{source} is not a causal language model ({kind}): "
            "give one that AutoModelForCausalLM opens, as Llama or Qwen"
        )


def _read_tokenizer(source: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise UnsupportedModelError(f"{source} has no usable tokenizer ({_first_sentence(error)})") from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read_model(source: str, config: PretrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    damaged = f"the weights in {source} are damaged or incomplete (%s): delete them and copy or download them again"
    try:
        model, info = AutoModelForCausalLM.from_pretrained(source, config=config, output_loading_info=True, **options)
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise DamagedWeightsError(damaged % _first_sentence(error)) from error
    except OSError as error:
        if Path(source).is_dir():
            raise DamagedWeightsError(damaged % _first_sentence(error)) from error
        raise UnknownModelError(f"the weights of {source!r} cannot be reached ({_first_sentence(error)})") from error
    except (ImportError, ValueError, NotImplementedError) as error:
        raise QuickmergeError(f"{source} cannot be loaded as asked ({_first_sentence(error)})") from error
    # transformers fills what a file lacks with random numbers and goes on; the model would then talk nonsense
    lacking = sorted(info["missing_keys"]) + sorted(str(entry) for entry in info.get("mismatched_keys") or [])
    if lacking:
        raise DamagedWeightsError(damaged % f"{len(lacking)} tensors are missing, {lacking[0]} first")
    return model


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0].rstrip(".")[:200]
