"""Being attached to a model for the length of a ``with`` block, and leaving nothing behind on any way out.

What is copied or saved while a run is attached is the plain model: hooks of ours, and what stands in for a method, are
left out of the state of a module when it is copied or pickled. The registry of `copyreg` is the place for that; the
classes that are hooked have an entry in it while they are.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import itertools
import sys
import threading
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, overload
from weakref import WeakKeyDictionary, WeakSet, finalize, ref

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from quickmerge.errors import QuickmergeError, QuickmergeWarning, UnsupportedModelError

T = TypeVar("T")

HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""Where a module keeps its hooks, each under the number of its handle."""

_ASIDE: ContextVar[bool] = ContextVar("quickmerge_aside", default=False)
_UNCOUNTED: ContextVar[bool] = ContextVar("quickmerge_uncounted", default=False)
_LOCK = threading.RLock()
_ACTIVE: WeakSet[Attachment] = WeakSet()
"""The runs that are attached to a model."""
_OWN_HOOKS: set[int] = set()
"""Numbers of the hooks that belong to them."""
_STAND_INS: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()
"""For each module what its own attributes were before a run set them, `_ABSENT` for none."""
_ABSENT = object()
_COPIED: Counter[type] = Counter()
"""How many attached runs have hooks on modules of a class."""
_REDUCERS: dict[type, Callable[[Any], Any] | None] = {}
"""What `copyreg` knew of these classes before."""
_ORDER = itertools.count()
_EAGER: list[Attachment] = []
"""The runs because of which nothing is compiled."""
_STANCE: list[Any] = []
"""What takes torch's compiler back to where it was before them."""


@contextmanager
def aside() -> Iterator[None]:
    """Within the block every run that is attached lets this thread's forwards pass as if it were not."""
    token = _ASIDE.set(True)
    try:
        yield
    finally:
        _ASIDE.reset(token)


def stands_aside() -> bool:
    """Whether this thread is inside of `aside`."""
    # A compiler of graphs can't look; what it makes is of the model inside the run.
    return not torch.compiler.is_compiling() and _ASIDE.get()


@contextmanager
def uncounted() -> Iterator[None]:
    """Within the block runs do what they do, and count nothing of this thread's forwards: nobody's text is read."""
    token = _UNCOUNTED.set(True)
    try:
        yield
    finally:
        _UNCOUNTED.reset(token)


def counts() -> bool:
    """Whether this thread is outside of `uncounted`."""
    return not _UNCOUNTED.get()


class PerThread(Generic[T]):
    """An attribute of a run of which each thread sees its own, as each has a forward of its own.

    On a GPU gradient checkpointing computes blocks again in autograd's threads, which see nothing of it: what is needed
    there has to travel with the call.

    Args:
        make: gives a thread its first value.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, run: None, owner: type) -> PerThread[T]: ...
    @overload
    def __get__(self, run: Attachment, owner: type) -> T: ...
    def __get__(self, run: Attachment | None, owner: type) -> PerThread[T] | T:
        if run is None:
            return self
        own = run._threads.__dict__
        if self._name not in own:
            own[self._name] = self._make()
        value: T = own[self._name]
        return value

    def __set__(self, run: Attachment, value: T) -> None:
        run._threads.__dict__[self._name] = value


class Attachment(ABC):
    """What every run on a model is. Enter it with ``with``; it detaches on any way out, and may be entered again.

    Where a ``with`` block doesn't fit, as in a notebook, call `attach` and later `detach`. `quickmerge.detach` leaves
    the runs of a model whose names are lost.

    Args:
        model: what it attaches to.
    """

    eager = False
    """Whether models that `torch.compile` has made run as they were written meanwhile. What such a run does depends on
    its input, and on caches that it changes: compiled, it would come out wrong."""

    def __init__(self, model: nn.Module) -> None:
        self._name = type(model).__name__
        self._of = ref(model)
        self._undo: list[Callable[[], None]] = []
        self._hooks: set[int] = set()
        self._kinds: set[type] = set()
        self._order = 0
        self._threads = threading.local()
        self._unused: finalize[..., Any] | None = None

    @abstractmethod
    def _attach(self) -> None:
        """Hook everything, and note in ``_undo`` how to take it off."""

    def _note(self, handle: Any) -> None:
        """Remove this hook when the run is left."""
        self._undo.append(handle.remove)

    def _detach(self) -> None:
        failed: Exception | None = None
        while self._undo:
            try:
                self._undo.pop()()
            except Exception as error:  # the rest has to be taken off too
                failed = failed or error
        self._threads = threading.local()
        if failed is not None:
            raise failed

    @property
    def attached(self) -> bool:
        """Whether the model runs with fewer tokens now."""
        return bool(self._undo)

    def attach(self) -> Self:
        """Begin, as ``with`` does; returns the run itself.

        Raises:
            UnsupportedModelError: if a run is attached already that this one can't share the model with.
        """
        if self._unused is not None:
            self._unused.detach()
        with _LOCK:
            if self._undo:
                raise UnsupportedModelError(f"{self._name} is already inside a quickmerge run; leave that first")
            try:
                self._attach()
            except BaseException:
                self._detach()
                raise
            self._order = next(_ORDER)
            _ACTIVE.add(self)
            self._leave_out_of_copies()
            if self.eager and "torch._dynamo" in sys.modules:  # else nothing was compiled, and to import it takes long
                _EAGER.append(self)
                if not _STANCE:
                    _STANCE.append(torch.compiler.set_stance("force_eager"))
        return self

    def detach(self) -> None:
        """Leave the model as it was, as the end of a ``with`` block does; nothing happens if that is done already."""
        with _LOCK:
            _ACTIVE.discard(self)
            if self in _EAGER:
                _EAGER.remove(self)
                if not _EAGER:
                    _STANCE.pop().__exit__(None, None, None)
            try:
                self._detach()
            finally:
                _OWN_HOOKS.difference_update(self._hooks)
                for kind in self._kinds:
                    _forget_kind(kind)
                self._hooks, self._kinds = set(), set()

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def warn_if_unused(self, call: str) -> Self:
        """Warn when the run goes without ever having been entered, since it has done nothing then.

        Args:
            call: by which it was made, such as ``quickmerge.reduce``.
        """
        self._unused = finalize(self, _tell_unused, call, self._name)
        return self

    def owned(self) -> Self:
        """Belong to another run, which enters this one, and warns in its place."""
        if self._unused is not None:
            self._unused.detach()
        return self

    def _leave_out_of_copies(self) -> None:
        handles = (getattr(undo, "__self__", None) for undo in self._undo)
        self._hooks = {handle.id for handle in handles if isinstance(handle, RemovableHandle)}
        _OWN_HOOKS.update(self._hooks)
        model = self._of()
        for module in () if model is None else model.modules():
            if module in _STAND_INS or any(not self._hooks.isdisjoint(vars(module).get(name, ())) for name in HOOKS):
                self._kinds.add(type(module))
        for kind in self._kinds:
            _COPIED[kind] += 1
            if _COPIED[kind] == 1:
                _REDUCERS[kind] = copyreg.dispatch_table.get(kind)
                copyreg.pickle(kind, _plain)


def detach(model: nn.Module) -> int:
    """Leave every quickmerge run on a model, whoever holds it: after an interrupted cell of a notebook, say.

    Nothing happens where there is none.

    Args:
        model: a model that runs may be attached to, whole, a part of it, or what it is wrapped in.

    Returns:
        How many runs were left.

    Raises:
        QuickmergeError: if it is no `torch.nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise QuickmergeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    parts = set(model.modules())
    left = 0
    with _LOCK:
        for run in sorted(_ACTIVE, key=lambda each: each._order, reverse=True):
            if run not in _ACTIVE:  # it belonged to one that was left before it
                continue
            held = run._of()
            if not run.attached:
                continue  # it was part of another one that was left
            if held is not None and (held in parts or any(module is model for module in held.modules())):
                run.detach()
                left += 1
    return left


def stand_in(module: nn.Module, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute of one module while a run is attached; copies and pickles of the module don't have it.

    Args:
        module: a part of the model.
        name: of the attribute; what a class or the user had under it comes back.
        value: what it is meanwhile.

    Returns:
        A function that undoes it.
    """
    before = _STAND_INS.setdefault(module, {})
    outer = vars(module).get(name, _ABSENT)
    before.setdefault(name, outer)
    object.__setattr__(module, name, value)

    def undo() -> None:
        # What somebody has put in front of ours meanwhile is theirs, and stays.
        if vars(module).get(name, _ABSENT) is value:
            if outer is _ABSENT:
                del vars(module)[name]
            else:
                object.__setattr__(module, name, outer)
        if outer is before.get(name):
            before.pop(name)
        if not before:
            _STAND_INS.pop(module, None)

    return undo


def refuse_tracing(name: str) -> None:
    """Raise QuickmergeError if `torch.jit.trace` is looking on at the model called ``name``."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise QuickmergeError(
            f"{name} can't be traced by torch.jit inside a quickmerge run, since what is merged depends on the input "
            "and a trace would hold on to what was merged of its example; leave the run first, or use torch.export, "
            "which works inside a run of a vision transformer"
        )


def _plain(module: nn.Module) -> Any:
    """How to make a module again that is like this one, but outside of every run; for `copy` and `pickle`."""
    known = _REDUCERS.get(type(module))
    made = module.__reduce_ex__(2) if known is None else known(module)
    if not isinstance(made, tuple) or len(made) < 3 or not isinstance(made[2], dict):
        return made
    state = dict(made[2])
    for name in HOOKS:
        hooks = state.get(name)
        if hooks and not _OWN_HOOKS.isdisjoint(hooks):
            state[name] = type(hooks)((number, hook) for number, hook in hooks.items() if number not in _OWN_HOOKS)
    for name, value in _STAND_INS.get(module, {}).items():
        state.pop(name, None)
        if value is not _ABSENT:
            state[name] = value
    return (*made[:2], state, *made[3:])


def _forget_kind(kind: type) -> None:
    _COPIED[kind] -= 1
    if _COPIED[kind]:
        return
    before = _REDUCERS.pop(kind)
    if copyreg.dispatch_table.get(kind) is not _plain:
        return  # somebody has put theirs in its place
    if before is None:
        del copyreg.dispatch_table[kind]
    else:
        copyreg.dispatch_table[kind] = before


def _tell_unused(call: str, name: str) -> None:
    warnings.warn(
        f"a run made by {call} on {name} was never entered, so it has done nothing: write "
        f"`with {call}(...):` around what shall run inside, or call its attach() first",
        QuickmergeWarning,
        stacklevel=3,
    )


# Standing in front of one model's ``generate``, which is told things that no forward is told.


def watch_generate(model: nn.Module, around: Callable[[dict[str, Any], Callable[..., Any]], Any]) -> Callable[[], None]:
    """Let ``around`` see every call of ``model.generate``.

    Args:
        model: a model that has it.
        around: is given the arguments by name, those of the generation config among them, and the call itself, which
            it makes or does not make. Keyword arguments that it makes it with take the place of the caller's.

    Returns:
        A function that undoes it.
    """
    inner: Any = model.generate
    signature = inspect.signature(inner)

    @functools.wraps(inner)
    def generate(*args: Any, **kwargs: Any) -> Any:
        def call(**more: Any) -> Any:
            if not more:
                return inner(*args, **kwargs)
            # What was given by its place has to be told by its name, or it might be told twice.
            return inner(**{**dict(zip(signature.parameters, args, strict=False)), **kwargs, **more})

        return around(by_name(signature, args, kwargs), call)

    return stand_in(model, "generate", generate)


def by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, those of a ``**kwargs`` among them."""
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    return given


def setting(model: Any, given: dict[str, Any], name: str) -> Any:
    """What a call of ``generate`` was told by ``name``: an argument, or else of a generation config."""
    if given.get(name) is not None:
        return given[name]
    told = getattr(given.get("generation_config"), name, None)
    return getattr(getattr(model, "generation_config", None), name, None) if told is None else told


ASSISTED = ("assistant_model", "prompt_lookup_num_tokens")
"""Arguments by which ``generate`` of transformers guesses tokens and takes wrong ones back."""


def refuse_assisted(model: Any, given: dict[str, Any], why: str) -> None:
    """Raise QuickmergeError if a call of ``generate`` asks for guesses; ``why`` says where they can't be made."""
    for name in ASSISTED:
        if setting(model, given, name) is not None:
            raise QuickmergeError(f"{name} must be left out {why}")
