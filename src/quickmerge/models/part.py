"""Saving models of transformers: the same bytes, wherever on a disk the parts came from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from quickmerge.errors import DamagedWeightsError, QuickmergeError, door
from quickmerge.files import write_bytes, write_json
from quickmerge.models.compat import CONFIG_PLACES
from quickmerge.models.weights import (
    Held,
    check_build,
    check_finite,
    check_floats,
    check_integers,
    local_path,
    read_header,
    read_json,
)
from quickmerge.together import complete, write_together

if TYPE_CHECKING:
    import os

    from torch import Tensor, nn
    from transformers import PreTrainedModel

__all__ = [
    "CONFIG",
    "HASH",
    "WEIGHTS",
    "Part",
    "Signed",
    "check_hashes",
    "file_hash",
    "model_label",
    "open_part",
    "read_settings",
    "save_part",
    "save_parts",
]


def save_parts(folder: Path, *parts: Any) -> None:
    """Save models, processors and tokenizers in ``folder``, without the paths of the user's disk.

    Args:
        folder: an empty folder.
        parts: what has ``save_pretrained``; None is passed over.
    """
    for part in parts:
        if part is not None:
            part.save_pretrained(folder)
    for path in folder.rglob(CONFIG):
        given = json.loads(path.read_text(encoding="utf-8"))
        cleaned = _without_places(given)
        if cleaned != given:
            # as transformers writes it
            path.write_text(json.dumps(cleaned, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items() if key not in CONFIG_PLACES}
    return [_without_places(item) for item in value] if isinstance(value, list) else value


def model_label(name: str) -> str:
    """What a model is called in a file that may be given away: its name, or of a whole path the last part."""
    return Path(name).name or name if Path(name).is_absolute() else name


# A trained part as a folder: config.json and model.safetensors, written together and known to belong together.
#
# The config holds the hash of the weights that it was written with. A pair that was put together by accident, by a copy
# that was cut short for example, is refused; a folder without a hash, of an earlier release, is taken as it is.


CONFIG, WEIGHTS = "config.json", "model.safetensors"
HASH = "weights_sha256"
"""The entry of config.json: the sha256 of each file of weights by its name."""
Network = TypeVar("Network", bound="nn.Module")


def save_part(
    folder: Path | str,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    write: Callable[[Path, bytes], None] = write_bytes,
) -> None:
    """Write both files, all or none; other files of the folder stay. A kill leaves the old pair or the new one.

    Args:
        folder: where to; made if need be.
        config: what is needed to build the part again.
        state: its weights.
        write: writes one file.

    Raises:
        QuickmergeError: the disk is full or not writable; what was there before is still there.
    """
    from safetensors.torch import save

    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, {"format": "pt"})
    signed = {**config, HASH: {WEIGHTS: hashlib.sha256(data).hexdigest()}}

    def fill(work: Path) -> None:
        write(work / WEIGHTS, data)
        write(work / CONFIG, (json.dumps(signed, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())

    write_together(local_path("folder", folder), fill)


@dataclass(frozen=True)
class Part:
    """A folder that was opened: its config is read, its weights are not yet.

    Attributes:
        wrong: how a message begins that says what must be given.
        folder: where it lies.
        config: the content of config.json, without the hash of the weights.
        hashes: that hash, by file; None in folders of earlier releases.
    """

    wrong: str
    folder: Path
    config: dict[str, Any]
    hashes: Any

    @property
    def weights(self) -> Path:
        """The file of the weights."""
        return self.folder / WEIGHTS

    def fill(
        self, build: Callable[[], Network], check: Callable[[Mapping[str, Tensor]], None] | None = None
    ) -> Network:
        """Build the part and load its weights, in float32 and for inference.

        Args:
            build: makes it, by the config that was read.
            check: looks at the tensors once they are known to fit, and raises for what they must not hold.

        Raises:
            QuickmergeError: the weights are missing or damaged, do not fit what is built, or are others than those
                that the config was written with.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not self.weights.exists():
            raise QuickmergeError(f"{self.wrong}, {self.weights} is missing")
        header = read_header(self.weights)
        check_floats(self.weights, header)
        held = Held.of([header])
        check_integers(str(self.folder / CONFIG), self.config, held)
        check_build(str(self.folder / CONFIG), build, held)
        with door(f"{self.folder / CONFIG} can't be used"):
            network = build()
        try:
            state = load_file(self.weights)
        except (SafetensorError, OSError) as error:
            raise DamagedWeightsError(f"{self.weights} is damaged ({error}): copy or train it again") from None
        wanted = network.state_dict()
        for name in sorted(set(wanted) | set(state)):
            if name not in wanted or name not in state:
                side = "lacks" if name in wanted else "has the unknown entry"
                raise QuickmergeError(f"{self.weights} does not fit its {CONFIG}: it {side} {name}")
            given, shape = state[name], wanted[name].shape
            if given.shape != shape:
                raise QuickmergeError(
                    f"{self.weights} does not fit its {CONFIG}: {name} must have shape {tuple(shape)}, "
                    f"got {tuple(given.shape)}"
                )
            if given.is_floating_point() != wanted[name].is_floating_point() or given.is_complex():
                raise DamagedWeightsError(
                    f"{self.weights} is damaged: {name} must be like {wanted[name].dtype}, got {given.dtype}"
                )
        check_finite(str(self.weights), state.items(), "copy or train it again")
        if check is not None:
            check(state)
        check_hashes(self.folder, self.hashes)  # last, since it says least about what is wrong
        network.load_state_dict(state)
        return network.eval()


def open_part(what: str, given: str | os.PathLike[str], wrong: str) -> Part:
    """Look at the config in a folder of a trained part, having finished what a kill left undone there.

    Args:
        what: what messages call it.
        given: the folder.
        wrong: how a message begins that says what must be given, as ``"prior must be a folder with ..."``.

    Raises:
        QuickmergeError: there is none, or its config is damaged.
    """
    folder = local_path(what, given)
    if not folder.is_dir():
        raise QuickmergeError(f"{wrong}, got {folder}, which is none")
    complete(folder)
    if not (folder / CONFIG).exists():
        raise QuickmergeError(f"{wrong}, {folder / CONFIG} is missing")
    config = read_json(folder / CONFIG)
    return Part(wrong, folder, config, config.pop(HASH, None))


class Signed:
    """Saves a model of transformers so that its config holds the hash of its weights; goes in front of its class."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As transformers' own, and then puts the hash of the weights into config.json."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        folder = Path(save_directory)
        files = sorted(folder.glob("*.safetensors"))
        if kwargs.get("is_main_process", True) and files:
            write_json(folder / CONFIG, {**read_settings(folder / CONFIG), HASH: {f.name: file_hash(f) for f in files}})


def read_settings(path: Path) -> dict[str, Any]:
    """The content of a config.json without the hash of its weights; raises DamagedWeightsError."""
    config = read_json(path)
    config.pop(HASH, None)
    return config


def check_hashes(folder: Path, hashes: Any) -> None:
    """See that files of weights are those that a config was written with; None, of an earlier release, says nothing.

    Raises:
        DamagedWeightsError: one is another, or missing.
    """
    if hashes is None:
        return
    if not isinstance(hashes, dict) or not all(isinstance(each, str) for each in hashes.values()):
        raise DamagedWeightsError(f"{folder / CONFIG} is damaged: {HASH} must hold the hash of each file of weights")
    for name, wanted in hashes.items():
        path = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute() or not path.is_file():
            raise DamagedWeightsError(f"{path} is missing although {folder / CONFIG} names it: copy it again")
        if file_hash(path) != wanted:
            raise DamagedWeightsError(
                f"{path} and {folder / CONFIG} don't belong together: the config was written with other weights; "
                f"copy both again, or take the entry {HASH!r} out of the config if you have changed the weights"
            )


def file_hash(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


STALE_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


def save_model(folder: Path, model: PreTrainedModel, processor: Any) -> None:
    """Save a model and its processor among other files of a folder, all of their files or none.

    Paths of the disk are left out of the configuration.

    Raises:
        QuickmergeError: if the disk is full or not writable; what was there before is still there.
    """

    def fill(work: Path) -> None:
        save_parts(work, model, processor)

    write_together(folder, fill, STALE_WEIGHTS)
