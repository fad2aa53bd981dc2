"""What quickmerge saves, given to the Hugging Face hub and taken from there by ids such as owner/name.

A saved folder goes to the hub as it is, with a card beside it. Whatever comes from the hub is a stranger's: only the
files that belong to its kind are fetched, settings and safetensors, none of which can hold a program; each is what the
hub says that it is, by its hash; and then all goes through the same checks as any folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypedDict

from quickmerge.errors import (
    DamagedWeightsError,
    FetchError,
    QuickmergeError,
    QuickmergeWarning,
    UnknownModelError,
    first_sentence,
)
from quickmerge.models.card import CARD, MARK, Section, card_text
from quickmerge.models.folder import check_model_folder
from quickmerge.models.kinds import HUB_ID, RECIPE, Kind, belongs, folder_files, kind_of, looks_like_id
from quickmerge.models.part import CONFIG, HASH, check_hashes
from quickmerge.models.read import saying
from quickmerge.models.weights import read_json, shown

__all__ = ["HubMixin", "HubModel", "HubOptions", "fetched", "looks_like_id", "push_folder"]


class HubOptions(TypedDict, total=False):
    """How something is taken from the hub; for a folder there is nothing of it to say.

    Attributes:
        revision: a branch, a tag or a commit; default the main branch.
        token: of an account, for what is private or gated; True is the one that is stored, False none at all. Default:
            the stored one, or that of ``HF_TOKEN``.
        cache_dir: where fetched files are kept; default the hub's own cache.
        local_files_only: take what was fetched before, and ask nobody.
        force_download: fetch again what is there.
    """

    revision: str | None
    token: str | bool | None
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool
    force_download: bool


# From the hub -------------------------------------------------------------------------------------------------------


def fetched(
    given: str | os.PathLike[str],
    kind: Kind,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path | str:
    """The folder that was given, or that of an id of the hub, fetched if need be.

    Args:
        given: a folder, or an id such as ``"owner/name"`` of which there is no folder here.
        kind: what is wanted; its files alone are fetched.
        revision: as `HubOptions` says it, as are all others.

    Raises:
        UnknownModelError: there is no such repository or revision, or it may not be seen.
        FetchError: the hub can't be reached.
        QuickmergeError: it holds something else.
        DamagedWeightsError: what was fetched is not what the hub says.
    """
    if not looks_like_id(given):
        if revision is not None or force_download:
            option = "force_download" if revision is None else "revision"
            raise QuickmergeError(f"{option} is for ids of the hub such as owner/name, got the folder {given}")
        return given if isinstance(given, str) else Path(os.fsdecode(given))
    name = os.fspath(given)
    options: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only,
                               "force_download": force_download}  # fmt: skip
    with _asking(name, kind.name, revision, token, local_files_only):
        # Settings first: who takes draft heads for a model need not wait for gigabytes to hear of it.
        folder = _download(name, {CONFIG, RECIPE}, revision, options)
    _check_blobs(name, folder, (CONFIG, RECIPE))
    _check_kind(name, folder, kind)
    with _asking(name, kind.name, revision, token, local_files_only):
        folder = _download(name, kind.files, folder.name, options)
    _check_blobs(name, folder, kind.files)
    return folder


def _download(name: str, files: Sequence[str] | set[str], revision: str | None, options: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import are_progress_bars_disabled  # type: ignore[attr-defined]

    with saying(f"fetching {name}", progress=are_progress_bars_disabled(), only_on_terminal=True):
        deeper = "*/" * (1 + max(each.count("/") for each in files)) + "*"  # a star of the hub's goes through slashes
        found = snapshot_download(name, revision=revision, allow_patterns=sorted(files), ignore_patterns=[deeper],
                                  **options)  # fmt: skip
        return Path(found)


def _check_kind(name: str, folder: Path, kind: Kind) -> None:
    found = kind_of(folder, kind)
    if found == kind:
        return
    if found is not None:
        raise QuickmergeError(
            f"{name} on the hub holds {found.name}, where {kind.name} must be: quickmerge.{found.opener} opens it"
        )
    held = "neither file" if not any((folder / file).exists() for file in (CONFIG, RECIPE)) else "something else"
    raise QuickmergeError(f"{name} on the hub must hold {kind.name} of quickmerge, by its {kind.settings}, got {held}")


def _check_blobs(name: str, folder: Path, patterns: Sequence[str]) -> None:
    """See that each fetched file has the hash by which the hub knows it, which is what the cache calls it.

    Raises:
        DamagedWeightsError: one has another.
    """
    for path in sorted(folder.rglob("*")):
        blob = Path(os.path.realpath(path))
        if not path.is_file() or not belongs(path.relative_to(folder).as_posix(), patterns):
            continue
        if blob.parent.name != "blobs" or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
            continue  # a file system without links
        digest = hashlib.sha256() if len(blob.name) == 64 else hashlib.sha1(b"blob %d\0" % blob.stat().st_size)
        with blob.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
        if digest.hexdigest() != blob.name:
            raise DamagedWeightsError(
                f"{path.relative_to(folder)} of {name} is not the file that the hub has (its hash is another): delete "
                f"{blob} and fetch it again"
            )


@contextmanager
def _asking(
    name: str, what: str, revision: str | None, token: str | bool | None, offline: bool = False, pushes: bool = False
) -> Iterator[None]:
    """Tell in one sentence why the hub did not give, or take, what was asked for."""
    from huggingface_hub import constants, errors

    try:
        yield
    except (QuickmergeError, KeyboardInterrupt):
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, (errors.LocalEntryNotFoundError, RuntimeError)) else None
        status = _status(error) or (_status(cause) if cause is not None else None)
        known = "with this token" if _has_token(token) else "without a token (hf auth login, HF_TOKEN or token=)"
        at = constants.ENDPOINT
        kind: type[QuickmergeError] = UnknownModelError
        if isinstance(error, errors.HFValidationError):
            said = f"{shown(name)} must be an id of the hub, owner/name ({first_sentence(error)})"
        elif isinstance(error, errors.GatedRepoError):
            said = f"{name} on the hub is gated, and can't be read {known}: ask for access at {at}/{name}"
        elif isinstance(error, errors.RevisionNotFoundError):
            said = f"{name} on the hub has no revision {shown(str(revision))}: name a branch, a tag or a commit"
        elif pushes and status in (401, 403):
            said = f"{name} can't be written {known} ({_server_words(error)}): use one that may write there"
        elif isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
            said = (
                f"there is no folder {name}, and the hub has no {name} that can be seen {known}: check the id, which "
                f"must name {what}"
            )
        elif isinstance(error, errors.LocalEntryNotFoundError) and (offline or constants.HF_HUB_OFFLINE):
            why = "local_files_only" if offline else "HF_HUB_OFFLINE"
            said = f"there is no folder {name}, and {name} of the hub was not fetched before, which {why} asks for"
        elif isinstance(error, OSError) and error.errno is not None:
            kind, said = FetchError, f"{name} can't be fetched: {error.filename or 'the cache'}: {error.strerror}"
        elif status is not None:
            kind, said = (
                FetchError,
                f"the hub at {at} refused {name} ({_server_words(cause or error)}): try again later",
            )
        elif cause is not None or isinstance(error, (OSError, errors.LocalEntryNotFoundError)) or _is_network(error):
            kind = FetchError
            said = f"the hub at {at} can't be reached ({first_sentence(cause or error)}): check the connection"
            said = said if pushes else f"there is no folder {name}, and {said}"
        elif isinstance(error, ValueError):
            kind, said = QuickmergeError, f"the hub did not take {name} ({first_sentence(error)})"
        else:
            raise
        raise kind(said) from error


def _status(error: BaseException) -> int | None:
    code = getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) else None


def _server_words(error: BaseException) -> str:
    told = getattr(error, "server_message", None)
    return first_sentence(ValueError(told)) if told else first_sentence(error)


def _is_network(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "urllib3")


def _has_token(token: str | bool | None) -> bool:
    from huggingface_hub import get_token

    return bool(token) if token is not None and token is not True else get_token() is not None


# To the hub ---------------------------------------------------------------------------------------------------------


def push_folder(
    folder: Path,
    name: str,
    kind: Kind,
    card: Callable[[Callable[[str], bool]], str],
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Send a saved folder to the hub as one commit: its files as they are, and a card.

    Files of an earlier push that the folder has no longer go. A card that somebody has written by hand stays.

    Args:
        folder: what `kind` has saved.
        name: an id such as ``"owner/name"``; made if there is none yet.
        kind: what it is; its files alone are sent.
        card: makes the card; it is given what says whether the hub has a model of a name.
        private: whether a new repository is seen by its owner alone; default as the account is set.
        token: of an account that may write there; default the stored one, or that of ``HF_TOKEN``.
        commit_message: what the history says.
        revision: a branch, made if need be; default the main one.
        create_pr: propose the change instead of making it.

    Returns:
        The address of the commit, or of the proposal.

    Raises:
        UnknownModelError: it can't be written there.
        FetchError: the hub can't be reached.
        QuickmergeError: the id is none, or there is no token.
    """
    if not isinstance(name, str) or not HUB_ID.fullmatch(name):
        raise QuickmergeError(f"repo_id must be an id of the hub, owner/name, got {name!r:.200}")
    if create_pr and revision is not None:
        raise QuickmergeError(
            f"revision must be left out with create_pr, which is about the main branch, got {revision!r}"
        )
    if not _has_token(token):
        raise QuickmergeError(
            f"{name} can't be written without a token of its owner: run hf auth login, set HF_TOKEN, or give token="
        )
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token, library_name="quickmerge")
    files = folder_files(folder, kind)
    with _asking(name, kind.name, revision, token, pushes=True):
        api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        there = list(api.list_repo_files(name, revision=revision))
        text = card(lambda model: bool(api.repo_exists(model)))
        adds = [CommitOperationAdd(file, folder / file) for file in files]
        if CARD in there and not _is_ours(api, name, revision):
            told = f"the card of {name} was not made by quickmerge, and stays as it is"
            warnings.warn(QuickmergeWarning(told), stacklevel=3)
        else:
            adds.append(CommitOperationAdd(CARD, text.encode()))
        gone = [CommitOperationDelete(file) for file in there if belongs(file, kind.files) and file not in files]
        done = api.create_commit(
            name, [*adds, *gone], commit_message=commit_message or f"Upload {kind.name}", revision=revision,
            create_pr=create_pr,
        )  # fmt: skip
    return str(done.pr_url or done.commit_url)


def _is_ours(api: Any, name: str, revision: str | None) -> bool:
    with tempfile.TemporaryDirectory(prefix="quickmerge-") as work:
        path = Path(api.hf_hub_download(name, CARD, revision=revision, cache_dir=work))
        return MARK in path.read_text(encoding="utf-8", errors="replace")


class HubMixin:
    """Gives what has ``save_pretrained`` a ``push_to_hub``; goes in front of other base classes."""

    hub_kind: ClassVar[Kind]

    def hub_sections(self) -> list[Section]:
        """What the card shall say beyond what stands in the saved settings."""
        return []

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        results: Any = None,
        command: str | None = None,
        license: str | None = None,
        base_model: str | None = None,
    ) -> str:
        """Save this on the Hugging Face hub, with a card that says what it is.

        Args:
            repo_id: an id such as ``"owner/name"``; made if there is none yet.
            private: whether a new repository is seen by its owner alone; default as the account is set.
            token: of an account that may write there; default the stored one, or that of ``HF_TOKEN``.
            commit_message: what the history says.
            revision: a branch, made if need be; default the main one.
            create_pr: propose the change instead of making it.
            results: what was measured, for the card: the file of a benchmark's ``--json``, its result, or rows. The
                card says nothing that is not given here or saved with the part.
            command: the command that makes this again, for the card.
            license: of the weights, as the hub calls it: ``"apache-2.0"``. Left out, the card says that nobody said.
            base_model: the id on the hub of the model that this was made for, where the card can't know it.

        Returns:
            The address of the commit, or of the proposal.

        Raises:
            UnknownModelError: it can't be written there.
            FetchError: the hub can't be reached.
            QuickmergeError: there is no token, or results that can't be read.
        """
        return self._push(
            repo_id, {"results": results, "command": command, "license": license, "base_model": base_model},
            private=private, token=token, commit_message=commit_message, revision=revision, create_pr=create_pr,
        )  # fmt: skip

    def _push(self, repo_id: str, told: Mapping[str, Any], *, beside: Sequence[Any] = (), **options: Any) -> str:
        """Save in a folder of no duration, what is ``beside`` too, make the card of what was ``told``, and send it."""
        with tempfile.TemporaryDirectory(prefix="quickmerge-") as work:
            folder = Path(work)
            saved: Any = self
            for each in (saved, *beside):
                each.save_pretrained(folder)

            def card(known: Callable[[str], bool]) -> str:
                return card_text(
                    folder, self.hub_kind, repo_id, known=known, **{"sections": self.hub_sections(), **told}
                )

            card(lambda _: False)  # what can't be told is heard of before anything is sent
            return push_folder(folder, repo_id, self.hub_kind, card, **options)


class HubModel(HubMixin):
    """The same for models of transformers, whose ``from_pretrained`` takes ids of the hub by itself.

    What comes from the hub is checked here; the Auto classes of transformers come this way too.
    """

    def push_to_hub(
        self, repo_id: str, *, tokenizer: Any = None, results: Any = None, command: str | None = None,
        license: str | None = None, base_model: str | None = None, **options: Any,
    ) -> str:  # fmt: skip
        """As `HubMixin.push_to_hub`, with the ``tokenizer`` beside the model where one is given.

        Args:
            repo_id: an id such as ``"owner/name"``.
            tokenizer: of the model; without it nobody can use the model by its id alone.
            results: for the card, as are ``command``, ``license`` and ``base_model``.
            **options: ``private``, ``token``, ``commit_message``, ``revision`` and ``create_pr``.

        Raises:
            QuickmergeError: as `HubMixin.push_to_hub`.
        """
        told = {"results": results, "command": command, "license": license, "base_model": base_model}
        known = ("private", "token", "commit_message", "revision", "create_pr")
        if unknown := sorted(set(options) - set(known)):
            raise QuickmergeError(f"push_to_hub takes {', '.join(known)}, got {unknown[0]!r}")
        return self._push(repo_id, told, beside=() if tokenizer is None else (tokenizer,), **options)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As transformers' own; ``push_to_hub=True`` is refused, since it would send files before they are signed."""
        if kwargs.pop("push_to_hub", False):
            raise QuickmergeError(
                "push_to_hub must be left out of save_pretrained: call model.push_to_hub('owner/name')"
            )
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, given: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own, of a folder or of an id of the hub.

        Args:
            given: the folder or the id.
            *args: of transformers, as are others by name.
            **kwargs: those of `HubOptions` among them.

        Raises:
            QuickmergeError: the hub has no such model, or it is another one or damaged.
        """
        named = {name: kwargs.pop(name) for name in HubOptions.__annotations__ if name in kwargs}
        if looks_like_id(given) and not kwargs.get("subfolder"):
            given = str(
                fetched(given, cls.hub_kind, **{name: value for name, value in named.items() if value is not None})
            )
            # what transformers has resolved the id to by itself
            kwargs.pop("_commit_hash", None)
            folder = Path(given)
            check_model_folder(folder)
            check_hashes(folder, read_json(folder / CONFIG).get(HASH))
        else:
            kwargs |= named
        return super().from_pretrained(given, *args, **kwargs)  # type: ignore[misc]
