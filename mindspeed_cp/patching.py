"""Changes to other people's modules that can be listed, checked, applied once and undone exactly.

A patch is a record: what it replaces or wraps, why, for which versions, and when to remove it. It fails early: a target
that is not there, or whose parameters are no longer those that the patch was written against, is an error before
anything is changed. Nothing is found by sweeping `sys.modules`; where a function is bound under several names, the
patch lists them.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal, NamedTuple

from packaging.specifiers import SpecifierSet

_ABSENT = object()
"""Stands for an attribute that a class inherits and does not define itself."""

_MARK = "__mindspeed_cp_patch__"


class PatchError(RuntimeError):
    """A patch that cannot be applied, or cannot be undone; the message names its target and the reason."""


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One change to one attribute.

    target: "package.module:attribute" or "package.module:Class.attribute".
    kind: "replace" puts `function` in the target's place. "around" answers each call of the target by `function(call)`,
        see PatchedCall. "wrap" puts `function(original)` there, for what has to be made once of the original.
    why: what would not work without it.
    remove_when: what has to happen elsewhere before it is removed.
    parameters: names that the live target must have among its parameters, or the patch refuses.
    aliases: other names that modules may have bound to the same function by importing it, written like `target`.
    package, versions: module whose `__version__` decides whether the patch is needed, and the versions (PEP 440) that
        need it; every version where `versions` is empty. The module and not a distribution of pip's: a checkout on
        PYTHONPATH may hide a wheel of another version, or have none.
    needs, unless: modules that cannot, and can, be imported where there is nothing to patch.
    upstream: address of the issue or pull request that is about it, where there is one.
    """

    target: str
    kind: Literal["replace", "around", "wrap"]
    function: Callable[..., Any]
    why: str
    remove_when: str
    parameters: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    package: str = "megatron.core"
    versions: str = ""
    needs: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()
    upstream: str = ""

    def __post_init__(self) -> None:
        for path in (self.target, *self.aliases):
            if path.count(":") != 1 or not all(path.split(":")):
                raise ValueError(f"patch target {path!r} is not written 'module:attribute'.")
        if not self.why or not self.remove_when:
            raise ValueError(f"the patch of {self.target} has to say why it is there and when to remove it.")

    def skip_reason(self) -> str | None:
        """Why there is nothing to patch on this machine; None where there is."""
        for module in self.needs:
            if not can_be_imported(module):
                return f"{module} cannot be imported"
        for module in self.unless:
            if can_be_imported(module):
                return f"{module} can be imported"
        if self.versions:
            version = _version(self.package)
            if version is None:
                raise PatchError(f"cannot patch {self.target}: {self.package} has no version here.")
            if not SpecifierSet(self.versions).contains(version, prereleases=True):
                return f"not needed with {self.package} {version}"
        return None

    def in_place_of(self, original: Any) -> Any:
        """What takes the place of what was there before."""
        if self.kind == "replace":
            return self.function
        return around(original, self.function) if self.kind == "around" else self.function(original)

    @property
    def release(self) -> str:
        """What is patched and its version, for messages: "megatron.core 0.19.2"."""
        version = _version(self.package)
        return "this version" if version is None else f"{self.package} {version}"


class PatchStatus(NamedTuple):
    """A patch and what has become of it.

    state: "applied", "not applied", "skipped: <reason>", or "applied, then changed by others: <to what>".
    """

    patch: Patch
    state: str


@dataclass(frozen=True)
class _Place:
    """An attribute of a module or class, as stored: a static method stays a static method."""

    path: str
    owner: ModuleType | type
    name: str

    @classmethod
    def resolve(cls, path: str, patch: Patch) -> "_Place":
        module_name, _, attribute = path.partition(":")
        *parents, name = attribute.split(".")
        try:
            owner: Any = importlib.import_module(module_name)
            for parent in parents:
                owner = getattr(owner, parent)
            getattr(owner, name)
        except (ImportError, AttributeError) as error:
            raise PatchError(f"cannot patch {path}: {error}. Has it moved in {patch.release}?") from error
        return cls(path, owner, name)

    def stored(self) -> Any:
        return vars(self.owner).get(self.name, _ABSENT)

    def found(self) -> Any:
        """What is stored here, or inherited from where it is stored."""
        stored = self.stored()
        return inspect.getattr_static(self.owner, self.name) if stored is _ABSENT else stored

    def value(self) -> Any:
        """The plain function, without the descriptor that a class stores it in."""
        found = self.found()
        return found.__func__ if isinstance(found, staticmethod | classmethod) else found

    def put(self, value: Any) -> None:
        if value is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, value)


@dataclass(frozen=True)
class _Applied:
    """A patch in force: what its place held before and holds now."""

    patch: Patch
    place: _Place
    before: Any
    after: Any

    def places(self) -> list[_Place]:
        """Where it is: the target, and the aliases, also those imported, and so bound, while it was in force."""
        return [self.place, *_loaded_aliases(self.patch)]

    def undo(self) -> None:
        for place in self.places():
            place.put(self.before)


@dataclass
class PatchRegistry:
    """Patches that belong together: applied all or none, each at most once, and undone in the opposite order.

    in_use: why they must not be undone at present; None where they may be.
    """

    patches: Sequence[Patch]
    in_use: Callable[[], str | None] = lambda: None
    _applied: dict[Patch, _Applied] = field(default_factory=dict)

    def apply(self) -> None:
        """Apply what is needed on this machine and not applied yet.

        Raises PatchError, with everything as it was before the call, when a target is missing or has changed.
        """
        fresh: list[Patch] = []
        try:
            for patch in self.patches:
                if patch not in self._applied and patch.skip_reason() is None:
                    self._applied[patch] = _apply(patch)
                    fresh.append(patch)
        except Exception:
            for patch in reversed(fresh):
                self._applied.pop(patch).undo()
            raise

    def restore(self) -> None:
        """Put back exactly what was there before `apply`.

        Raises PatchError, with everything as it was before the call, when somebody has patched on top since, or while
        the patches are in use.
        """
        if self._applied and (reason := self.in_use()) is not None:
            raise PatchError(f"cannot restore the patches: {reason}")
        self._check_nobody_patched_on_top()
        for patch in reversed(list(self._applied)):
            self._applied[patch].undo()
            del self._applied[patch]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The patches applied for the time of a `with` block."""
        self.apply()
        try:
            yield
        finally:
            self.restore()

    def status(self) -> list[PatchStatus]:
        """What has become of each patch."""
        return [PatchStatus(patch, self._state(patch)) for patch in self.patches]

    def _check_nobody_patched_on_top(self) -> None:
        held: dict[tuple[int, str], Any] = {}  # What each place will hold once the patches above are undone.
        for applied in reversed(self._applied.values()):
            for place in applied.places():
                key = (id(place.owner), place.name)
                found = held.get(key, place.stored())
                if found is not applied.after:
                    raise PatchError(
                        f"cannot restore {place.path}: it has been changed again since, to {_describe(found)}; "
                        f"undo that first."
                    )
                held[key] = applied.before

    def _state(self, patch: Patch) -> str:
        if patch in self._applied:
            found = self._applied[patch].place.stored()
            if any(found is applied.after for applied in self._applied.values()):
                return "applied"
            return f"applied, then changed by others: {_describe(found)}"
        reason = patch.skip_reason()
        return f"skipped: {reason}" if reason else "not applied"


def targets_by_module(patches: Sequence[Patch]) -> dict[str, list[str]]:
    """The attributes that patches change, in each module."""
    targets: dict[str, list[str]] = {}
    for patch in patches:
        module, _, attribute = patch.target.partition(":")
        targets.setdefault(module, []).append(attribute)
    return targets


def around(original: Callable[..., Any], function: "Callable[[PatchedCall], Any]") -> Callable[..., Any]:
    """`original`, each call of which `function` answers."""
    return lambda *args, **kwargs: function(PatchedCall(original, args, kwargs))


class PatchedCall:
    """A call of a patched function, as a patch of the kind "around" is given it.

    `call[name]` is an argument, by its name in the live signature, whatever the number and order of parameters.
    original: the function as it was before. args, kwargs: the arguments as they came.
    """

    __slots__ = ("_named", "args", "kwargs", "original")

    def __init__(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.original, self.args, self.kwargs = original, args, kwargs
        self._named: dict[str, Any] | None = None

    @property
    def named(self) -> dict[str, Any]:
        """All arguments by name, defaults filled in. Raises TypeError, like the call itself, where they do not fit."""
        if self._named is None:
            self._named = bind_by_name(self.original, self.args, self.kwargs)
        return self._named

    @property
    def instance(self) -> Any:
        """The object whose method was called."""
        return self.args[0]

    def __getitem__(self, name: str) -> Any:
        return self.named[name]

    def proceed(self, /, **changed: Any) -> Any:
        """What the original gives: of the arguments as they came, or with some of them changed."""
        if not changed:
            return self.original(*self.args, **self.kwargs)
        return call_by_name(self.original, {**self.named, **changed})


def bind_by_name(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by parameter name, defaults filled in, whatever their order in this version of `function`.

    Raises TypeError, like the call itself, when they do not fit.
    """
    signature = _signature(function)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    named = dict(bound.arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name)
    return named


def call_by_name(function: Callable[..., Any], named: dict[str, Any]) -> Any:
    """What a function gives of arguments as `bind_by_name` has them: those that have no name in a call by place."""
    by_place = _by_place(function)
    if not by_place:
        return function(**named)
    *single, last = by_place
    placed = [named[parameter.name] for parameter in single]
    placed += named[last.name] if last.kind is inspect.Parameter.VAR_POSITIONAL else [named[last.name]]
    names = {parameter.name for parameter in by_place}
    return function(*placed, **{name: value for name, value in named.items() if name not in names})


@functools.cache
def _by_place(function: Callable[..., Any]) -> tuple[inspect.Parameter, ...]:
    """The parameters of a function up to the last one that cannot be given by its name."""
    parameters = tuple(_signature(function).parameters.values())
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    return parameters[: max((place + 1 for place, each in enumerate(parameters) if each.kind in kinds), default=0)]


@functools.cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """Read once: every layer binds to it in every micro-batch, and reading takes longer than binding."""
    return inspect.signature(function)


def _apply(patch: Patch) -> _Applied:
    place = _Place.resolve(patch.target, patch)
    original = place.value()
    if (other := getattr(original, _MARK, None)) is not None and other.function is patch.function:
        raise PatchError(f"cannot patch {patch.target}: another registry has applied this very patch.")
    _check_parameters(patch, original)

    new = _marked(patch.in_place_of(original), patch, original)
    found, stored = place.found(), place.stored()
    if isinstance(found, staticmethod | classmethod):
        new = type(found)(new)
    aliases = _loaded_aliases(patch)
    for alias in aliases:
        if alias.value() is not original:
            raise PatchError(f"cannot patch {alias.path}: it is not {patch.target} in {patch.release}.")
    for changed in (place, *aliases):
        changed.put(new)
    return _Applied(patch, place, stored, new)


def _check_parameters(patch: Patch, original: Any) -> None:
    if not patch.parameters:
        return
    try:
        live = inspect.signature(original).parameters
    except (TypeError, ValueError) as error:
        raise PatchError(f"cannot patch {patch.target}: its parameters cannot be read ({error}).") from error
    rest = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    missing = [name for name in patch.parameters if name not in live or live[name].kind in rest]
    if missing:
        message = (
            f"cannot patch {patch.target}: it has no parameter {', '.join(missing)} in {patch.release}; "
            f"its parameters are {', '.join(live)}."
        )
        if original.__module__ != (module := patch.target.partition(":")[0]):
            message += (
                f" It is not {module}'s own: another plugin may have been there first, it is {_describe(original)}."
            )
        raise PatchError(message)


def _describe(value: Any) -> str:
    """What somebody has put in a place: a wrapper often bears the name of what it wraps, its code never does."""
    function = getattr(value, "__func__", value)
    code = getattr(function, "__code__", None)
    if code is None:
        return repr(value)
    return f"{function.__module__}.{function.__qualname__} ({code.co_filename}:{code.co_firstlineno})"


def _marked(new: Any, patch: Patch, original: Any) -> Any:
    """A function of its own for the patch, which carries the original and the record that put it there."""
    if not inspect.isfunction(new):
        return new

    @functools.wraps(original, updated=())
    def patched(*args: Any, **kwargs: Any) -> Any:
        return new(*args, **kwargs)

    setattr(patched, _MARK, patch)
    return patched


def _loaded_aliases(patch: Patch) -> list[_Place]:
    """The aliases in modules imported so far; a module that is imported later binds what it finds at the target."""
    return [_Place.resolve(path, patch) for path in patch.aliases if path.partition(":")[0] in sys.modules]


def _version(package: str) -> str | None:
    """`__version__` of what is imported by this name; None where there is none."""
    try:
        return str(importlib.import_module(package).__version__)
    except (ImportError, AttributeError):
        return None


def can_be_imported(module: str) -> bool:
    """Whether importing a module succeeds: Megatron does without one that is installed, but does not load."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True
