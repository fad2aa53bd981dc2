"""Reading a model with transformers in one quiet voice, and saying in a sentence what is wrong where it fails."""

from __future__ import annotations

import contextlib
import copy
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from quickmerge.errors import (
    DamagedWeightsError,
    QuickmergeError,
    UnknownModelError,
    UnsupportedModelError,
    door,
    first_sentence,
)
from quickmerge.models.compat import causal_lm_names, library_logging
from quickmerge.models.folder import CONFIG, held_by, weight_files
from quickmerge.models.part import HASH, check_hashes
from quickmerge.models.weights import FLOATS, check_build, check_finite, check_integers, read_header, read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "check_causal",
    "damaged",
    "first_sentence",
    "read",
    "read_config",
    "read_weights",
    "saying",
    "transformers_silenced",
    "tried",
]


@contextmanager
def saying(message: str, *, progress: bool, only_on_terminal: bool = False) -> Iterator[None]:
    """Show `message` with a spinner while the block runs, or as one plain line where there is no terminal.

    Args:
        message: what goes on.
        progress: False says nothing at all.
        only_on_terminal: leave out the plain line, for what takes a second or two.
    """
    if not progress:
        yield
        return
    from quickmerge.terminal import Terminal

    # this very stream, and not whatever sys.stderr is later: `transformers_silenced` replaces that one
    console = Terminal(file=sys.stderr)
    if not console.is_terminal:
        if not only_on_terminal:
            console.print(message, highlight=False, soft_wrap=True)
        yield
        return
    with console.status(message):
        yield


@contextmanager
def transformers_silenced() -> Iterator[None]:
    """Keep the bars and warnings of transformers off the screen; the caller reports what matters itself."""
    logging = library_logging()
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # some of its bars ask no setting
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# A tokenizer is tried as soon as it is read: what its files hold wrongly comes out only when it is used.


T = TypeVar("T")
WORDS = "The sea, 12."
MOST_IDS = 2**22
"""No vocabulary that was ever published has a fourth of it; whoever makes a row for each id pays for the highest."""


def tried(tokenizer: T) -> T:
    """Give back a tokenizer of transformers that splits a text and puts it together again.

    Raises:
        ValueError: its longest text is no number, or an id is out of all proportion. Whatever else its parts raise is
            raised as it is: call this where reading it is turned into one sentence.
    """
    any_: Any = tokenizer
    longest = any_.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, (int, float)):
        raise ValueError(f"model_max_length must be a number, got {longest!r}")
    highest = max(any_.get_vocab().values(), default=0)
    if highest >= MOST_IDS:
        raise ValueError(f"ids must be below {MOST_IDS:,}, got {highest:,}")
    any_.decode(any_(WORDS, add_special_tokens=False, verbose=False)["input_ids"], skip_special_tokens=True)
    return tokenizer


# Configs and weights.


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
        config = read_config(source)
        check_causal(source, config)
        # the tokenizer first: it is small, and its absence should not cost the wait for the weights
        tokenizer = _read_tokenizer(source)
        model = _read_model(source, config, options)
    return model, tokenizer


def read_config(source: str) -> PretrainedConfig:
    """Read the config that lies in a folder or on the hub.

    Raises:
        UnknownModelError: nothing of this name can be reached.
        UnsupportedModelError: the installed transformers knows no such model type.
        DamagedWeightsError: the config is garbled.
    """
    from transformers import AutoConfig

    folder = Path(source)
    if folder.is_dir():
        check_integers(str(folder / CONFIG), saved := read_json(folder / CONFIG), held_by(folder, saved))
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        if Path(source).is_dir():
            raise DamagedWeightsError(
                f"{Path(source) / 'config.json'} is damaged ({first_sentence(error)}): copy or download it again"
            ) from error
        raise UnknownModelError(
            f"the hub has no model {source!r} that can be reached from here ({first_sentence(error)}): "
            "check the id and the connection, or give a local model folder"
        ) from error
    except KeyError as error:
        raise UnsupportedModelError(
            f"{source} is of a model type that the installed transformers does not know ({first_sentence(error)})"
        ) from error
    except ValueError as error:
        if "model type" in str(error) or "model_type" in str(error):
            raise UnsupportedModelError(
                f"{source} is of a model type that the installed transformers does not know ({first_sentence(error)})"
            ) from error
        raise _bad_config(source, error) from error
    except Exception as error:  # configs check themselves, each with errors of its own
        raise _bad_config(source, error) from error

    saved = config.architectures
    if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
        raise UnsupportedModelError(
            f"{Path(source) / 'config.json'} must hold a list of names as architectures, got {saved!r}"
        )
    config.return_dict = True  # all of ours reads outputs by name
    return config


def _bad_config(source: str, error: Exception) -> UnsupportedModelError:
    return UnsupportedModelError(f"{Path(source) / 'config.json'} can't be used ({first_sentence(error)})")


def check_causal(source: str, config: PretrainedConfig) -> None:
    """Raise UnsupportedModelError unless a config is that of a causal language model."""
    if config.model_type == "quickmerge-calm":
        raise UnsupportedModelError(
            f"{source} is a CALM, which has no probabilities of tokens and is no use here: open it with "
            "quickmerge.calm.load_calm"
        )
    causal = causal_lm_names().get(config.model_type)
    saved = list(config.architectures or [])
    # An encoder such as BERT can be opened as a causal model too, but it was not trained as one.
    if causal is None or (saved and not set(saved) & set(causal_lm_names().values())):
        kind = saved[0] if saved else f"model type {config.model_type!r}"
        raise UnsupportedModelError(
            f"{source} is not a causal language model ({kind}): "
            "give one that AutoModelForCausalLM opens, as Llama or Qwen"
        )


def _read_tokenizer(source: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with door(f"{source} has no usable tokenizer", UnsupportedModelError):
        tokenizer: PreTrainedTokenizerBase = tried(AutoTokenizer.from_pretrained(source, trust_remote_code=False))
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read_model(source: str, config: PretrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    model, lacking = read_weights(AutoModelForCausalLM, source, config, options)
    if lacking:
        raise damaged(source, f"{len(lacking)} tensors are missing, {lacking[0]} first")
    return model


def read_weights(
    auto: Any, source: str, config: PretrainedConfig, options: dict[str, Any]
) -> tuple[PreTrainedModel, list[str]]:
    """Read a model, and tell which tensors its files lack.

    transformers fills what a file lacks with random numbers and goes on; the model would then talk nonsense, so the
    caller has to look at the list.

    Args:
        auto: the class that opens it, such as `AutoModel`.
        source: a folder, or a hub id.
        config: what `read_config` gave.
        options: what goes to `from_pretrained`.

    Returns:
        The model, and the names of the tensors that were not read, sorted.

    Raises:
        UnknownModelError: the weights cannot be reached.
        DamagedWeightsError: they are garbled.
        QuickmergeError: they cannot be loaded as `options` ask.
    """
    from safetensors import SafetensorError

    _check_build(auto, source, config)
    try:
        model, info = auto.from_pretrained(
            source, config=config, output_loading_info=True, use_safetensors=True, trust_remote_code=False, **options
        )
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise damaged(source, first_sentence(error)) from error
    except OSError as error:
        if Path(source).is_dir():
            raise damaged(source, first_sentence(error)) from error
        raise UnknownModelError(f"the weights of {source!r} cannot be reached ({first_sentence(error)})") from error
    except (ImportError, ValueError, NotImplementedError) as error:
        raise QuickmergeError(f"{source} cannot be loaded as asked ({first_sentence(error)})") from error
    except Exception as error:  # building by a config raises whatever its values lead to
        raise UnsupportedModelError(f"{source} cannot be built by its config.json ({first_sentence(error)})") from error
    lacking = sorted(info["missing_keys"]) + sorted(str(entry) for entry in info.get("mismatched_keys") or [])
    # What is missing is told as that: it may hold whatever was in the memory.
    there = [
        (name, value)
        for name, value in [*model.named_parameters(), *model.named_buffers()]
        if name not in info["missing_keys"]
    ]
    check_finite(source, there, "copy or download its weights again")
    folder = Path(source)
    if folder.is_dir():
        settings = read_json(folder / CONFIG)
        if not isinstance(settings.get("quantization_config"), dict):
            _check_parameters(folder, [name for name, _ in model.named_parameters()])
        check_hashes(folder, settings.get(HASH))
    return model, lacking


def _check_parameters(folder: Path, names: list[str]) -> None:
    """See that no parameter was read from integers, which may lie beside the weights as counters and indices."""
    ends = {name.split(".", 1)[-1] for name in names} | set(names)
    for path in weight_files(folder):
        for name, tensor in read_header(path).items():
            if tensor.dtype not in FLOATS and (name in ends or name.split(".", 1)[-1] in ends):
                raise DamagedWeightsError(
                    f"{path} holds {name!r} as {tensor.dtype}, but weights must be one of {', '.join(FLOATS)}"
                )


def _check_build(auto: Any, source: str, config: PretrainedConfig) -> None:
    folder = Path(source)
    if not folder.is_dir():
        return

    def build() -> PreTrainedModel:
        own = copy.deepcopy(config)  # building writes into it
        model: PreTrainedModel = auto.from_config(own, trust_remote_code=False) if _is_auto(auto) else auto(own)
        return model

    check_build(str(folder / CONFIG), build, held_by(folder, read_json(folder / CONFIG)))


def _is_auto(auto: Any) -> bool:
    return hasattr(auto, "from_config")


def damaged(source: str, reason: str) -> DamagedWeightsError:
    """The error for weights that are garbled or incomplete."""
    return DamagedWeightsError(
        f"the weights in {source} are damaged or incomplete ({reason}): delete them and copy or download them again"
    )
