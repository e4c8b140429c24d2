"""The patch engine, on throw-away modules."""

import dataclasses
import functools
import importlib
import re
import sys
import types

import pytest

from mindspeed_cp.patching import Patch, PatchError, PatchRegistry, PatchStatus, bind_by_name, targets_by_module

TOY = """
__version__ = "1.2"
CONSTANT = object()

def double(x, factor=2):
    "Twice x."
    return x * factor

def sibling(x):
    return x

class Base:
    def inherited(self, x):
        return ("inherited", x)

    @staticmethod
    def inherited_static(x):
        return ("inherited_static", x)

    @classmethod
    def inherited_class(cls, x):
        return (cls.__name__, x)

class Child(Base):
    def __init__(self, value=0):
        self.value = value

    def method(self, x):
        return ("method", x)

    @staticmethod
    def static(x):
        return ("static", x)

    @classmethod
    def made(cls, x):
        return (cls.__name__, x)

    class Inner:
        def deep(self, x):
            return ("deep", x)

class Grandchild(Child):
    pass
"""


@pytest.fixture
def make_module(monkeypatch):
    """Make a module of a name and a source, gone after the test."""

    def make(name, source):
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(source, vars(module))
        return module

    return make


@pytest.fixture
def toy(make_module):
    return make_module("toy", TOY)


def mark_result(original):
    """A wrapper that says it was there."""

    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        return "patched", original(*args, **kwargs)

    return wrapper


def patch_of(target, function=mark_result, kind="wrap", **fields):
    """A patch record of the toy, with its reasons filled in."""
    reasons = {"why": "Because.", "remove_when": "Never."}
    return Patch(target=target, kind=kind, function=function, **{"package": "toy", **reasons, **fields})


def snapshot(*owners):
    """What modules and classes hold, as stored."""
    return [dict(vars(owner)) for owner in owners]


def same(before, after):
    """Whether two snapshots hold the very same objects."""
    return [{k: id(v) for k, v in held.items()} for held in before] == [
        {k: id(v) for k, v in held.items()} for held in after
    ]


def refusal_of(action):
    """The message of the PatchError that `action` raises."""
    with pytest.raises(PatchError) as refusal:
        action()
    return str(refusal.value)


def test_replace_puts_the_function_in_the_target_s_place(toy):
    with PatchRegistry([patch_of("toy:double", lambda x: ("replaced", x), "replace")]).applied():
        assert toy.double(3) == ("replaced", 3)
    assert toy.double(3) == 6


def test_wrap_hands_the_original_to_the_wrapper(toy):
    with PatchRegistry([patch_of("toy:double")]).applied():
        assert toy.double(3, factor=5) == ("patched", 15)
    assert toy.double(3, factor=5) == 15


def test_replace_takes_objects_that_are_no_functions(toy):
    before, value = toy.CONSTANT, object()
    with PatchRegistry([patch_of("toy:CONSTANT", value, "replace")]).applied():
        assert toy.CONSTANT is value
    assert toy.CONSTANT is before


def test_replace_takes_a_class(toy):
    class Other:
        pass

    child = toy.Child
    with PatchRegistry([patch_of("toy:Child", Other, "replace")]).applied():
        assert toy.Child is Other
    assert toy.Child is child


def test_patched_function_keeps_name_docstring_and_original(toy):
    original = toy.double
    for kind, function in (("wrap", mark_result), ("replace", lambda x: x)):
        with PatchRegistry([patch_of("toy:double", function, kind)]).applied():
            assert toy.double is not original
            assert (toy.double.__name__, toy.double.__doc__) == ("double", "Twice x.")
            assert toy.double.__wrapped__ is original


def test_one_function_patched_in_at_two_targets_stays_two_functions(toy):
    def shared(*args):
        return "shared"

    registry = PatchRegistry([patch_of(f"toy:{name}", shared, "replace") for name in ("double", "sibling")])
    with registry.applied():
        assert toy.double(1) == toy.sibling(1) == "shared"
        assert toy.double is not toy.sibling
        assert toy.sibling.__name__ == "sibling"
    assert not hasattr(shared, "__wrapped__")


CALLS = {
    "method": (("method", 1), lambda toy: [toy.Child().method(1), toy.Grandchild().method(1)]),
    "static": (("static", 1), lambda toy: [toy.Child.static(1), toy.Child().static(1)]),
    "made": (("Child", 1), lambda toy: [toy.Child.made(1), toy.Child().made(1)]),
    "inherited": (("inherited", 1), lambda toy: [toy.Child().inherited(1), toy.Grandchild().inherited(1)]),
    # What a class inherits has to be looked up as stored, not as bound.
    "inherited_static": (
        ("inherited_static", 1),
        lambda toy: [toy.Child.inherited_static(1), toy.Child().inherited_static(1)],
    ),
    "inherited_class": (("Child", 1), lambda toy: [toy.Child.inherited_class(1), toy.Child().inherited_class(1)]),
}


@pytest.mark.parametrize("name", CALLS)
def test_method_of_any_kind_is_wrapped_on_class_and_instance(toy, name):
    result, call = CALLS[name]
    with PatchRegistry([patch_of(f"toy:Child.{name}")]).applied():
        assert call(toy) == [("patched", result)] * 2
    assert call(toy) == [result] * 2


@pytest.mark.parametrize("name", CALLS)
def test_class_is_restored_exactly_as_stored(toy, name):
    before = snapshot(toy, toy.Base, toy.Child, toy.Grandchild)
    registry = PatchRegistry([patch_of(f"toy:Child.{name}")])
    registry.apply()
    assert not same(snapshot(toy.Child), before[2:3])
    assert same(snapshot(toy, toy.Base, toy.Grandchild), [*before[:2], before[3]])
    registry.restore()
    assert same(snapshot(toy, toy.Base, toy.Child, toy.Grandchild), before)


@pytest.mark.parametrize(("name", "descriptor"), [("static", staticmethod), ("made", classmethod)])
def test_method_keeps_the_kind_in_which_it_is_stored(toy, name, descriptor):
    with PatchRegistry([patch_of(f"toy:Child.{name}")]).applied():
        assert type(vars(toy.Child)[name]) is descriptor


def test_class_method_of_a_patched_class_sees_the_subclass(toy):
    with PatchRegistry([patch_of("toy:Child.made")]).applied():
        assert toy.Grandchild.made(1) == ("patched", ("Grandchild", 1))


def test_constructor_and_nested_class_can_be_patched(toy):
    def wrap_init(original):
        def __init__(self, *args, **kwargs):
            original(self, *args, **kwargs)
            self.value += 1

        return __init__

    with PatchRegistry([patch_of("toy:Child.__init__", wrap_init), patch_of("toy:Child.Inner.deep")]).applied():
        assert toy.Child(value=1).value == 2
        assert toy.Child.Inner().deep(1) == ("patched", ("deep", 1))
    assert toy.Child(value=1).value == 1


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("no_such_module:double", "No module named 'no_such_module'"),
        ("toy.inside:double", "No module named 'toy.inside'; 'toy' is not a package"),
        ("toy:triple", "module 'toy' has no attribute 'triple'"),
        ("toy:Missing.method", "module 'toy' has no attribute 'Missing'"),
        ("toy:Child.missing", "type object 'Child' has no attribute 'missing'"),
    ],
)
def test_missing_target_raises_and_is_named(toy, target, reason):
    message = refusal_of(PatchRegistry([patch_of(target)]).apply)
    assert message == f"cannot patch {target}: {reason}. Has it moved in toy 1.2?"


def test_missing_target_of_a_package_that_tells_no_version_raises_too(toy):
    message = refusal_of(PatchRegistry([patch_of("toy:triple", package="toy.nothing")]).apply)
    assert message.endswith("module 'toy' has no attribute 'triple'. Has it moved in this version?")


def test_missing_parameter_raises_and_is_named(toy):
    registry = PatchRegistry([patch_of("toy:double", parameters=("x", "scale", "factor", "mask"))])
    assert refusal_of(registry.apply) == (
        "cannot patch toy:double: it has no parameter scale, mask in toy 1.2; its parameters are x, factor."
    )
    assert toy.double(1) == 2


def test_parameters_that_are_there_are_accepted(toy):
    with PatchRegistry([patch_of("toy:double", parameters=("x", "factor"))]).applied():
        assert toy.double(1) == ("patched", 2)


def test_parameters_of_a_target_without_any_raise_a_patch_error(toy):
    with pytest.raises(PatchError, match="toy:CONSTANT"):
        PatchRegistry([patch_of("toy:CONSTANT", object(), "replace", parameters=("key",))]).apply()


@pytest.mark.parametrize("target", ["toy", "toy:", ":double", "toy:Child:method", ""])
@pytest.mark.parametrize("place", ["target", "aliases"])
def test_path_that_is_not_module_and_attribute_is_refused(target, place):
    fields = {"target": target} if place == "target" else {"target": "toy:double", "aliases": (target,)}
    with pytest.raises(ValueError) as refusal:
        patch_of(**fields)
    assert str(refusal.value) == f"patch target {target!r} is not written 'module:attribute'."


@pytest.mark.parametrize("silent", ["why", "remove_when"])
def test_patch_without_reason_or_end_is_refused(silent):
    with pytest.raises(ValueError) as refusal:
        dataclasses.replace(patch_of("toy:double"), **{silent: ""})
    assert str(refusal.value) == "the patch of toy:double has to say why it is there and when to remove it."


def test_patch_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        patch_of("toy:double").target = "toy:sibling"


def test_applying_twice_is_nothing(toy):
    registry = PatchRegistry([patch_of("toy:double")])
    registry.apply()
    once = snapshot(toy)
    registry.apply()
    assert same(snapshot(toy), once)
    registry.restore()
    assert toy.double(3) == 6


def test_restoring_twice_is_nothing(toy):
    before = snapshot(toy)
    registry = PatchRegistry([patch_of("toy:double")])
    registry.apply()
    registry.restore()
    registry.restore()
    assert same(snapshot(toy), before)


def test_restored_patches_can_be_applied_again(toy):
    registry = PatchRegistry([patch_of("toy:double")])
    for _ in range(2):
        with registry.applied():
            assert toy.double(3) == ("patched", 6)
        assert toy.double(3) == 6


@pytest.mark.parametrize("kind", ["wrap", "replace"])
def test_patch_that_another_registry_has_applied_is_refused(toy, kind):
    patch = patch_of("toy:double", kind=kind)
    with PatchRegistry([patch]).applied():
        message = refusal_of(PatchRegistry([patch]).apply)
    assert message == "cannot patch toy:double: another registry has applied this very patch."


@pytest.mark.parametrize(
    "bad", [patch_of("toy:triple"), patch_of("toy:sibling", parameters=("y",)), patch_of("no_such_module:f")]
)
def test_one_patch_that_fails_leaves_everything_as_it_was(toy, bad):
    before = snapshot(toy, toy.Child)
    good = [patch_of("toy:double"), patch_of("toy:Child.inherited"), patch_of("toy:Child.static")]
    registry = PatchRegistry([*good, bad, patch_of("toy:Child.method")])
    with pytest.raises(PatchError):
        registry.apply()
    assert same(snapshot(toy, toy.Child), before)
    assert {state for _, state in registry.status()} == {"not applied"}


def test_failing_wrapper_leaves_everything_as_it_was(toy):
    def fail(original):
        raise KeyError("broken wrapper")

    before = snapshot(toy)
    with pytest.raises(KeyError, match="broken wrapper"):
        PatchRegistry([patch_of("toy:double"), patch_of("toy:sibling", fail)]).apply()
    assert same(snapshot(toy), before)


def test_patches_applied_earlier_survive_a_later_failure(toy):
    registry = PatchRegistry([patch_of("toy:double")])
    registry.apply()
    registry.patches = [*registry.patches, patch_of("toy:sibling"), patch_of("toy:triple")]
    with pytest.raises(PatchError):
        registry.apply()
    assert toy.double(3) == ("patched", 6)
    assert toy.sibling(3) == 3
    registry.restore()


def test_two_patches_of_one_target_are_undone_in_the_opposite_order(toy):
    before = snapshot(toy)
    outer = patch_of("toy:double", lambda original: lambda x: ("outer", original(x)))
    with PatchRegistry([patch_of("toy:double"), outer]).applied():
        assert toy.double(1) == ("outer", ("patched", 2))
    assert same(snapshot(toy), before)


def test_restore_is_refused_when_someone_patched_on_top(toy):
    registry = PatchRegistry([patch_of("toy:double")])
    registry.apply()
    ours = toy.double
    toy.double = theirs = lambda x: x
    line = theirs.__code__.co_firstlineno
    assert refusal_of(registry.restore) == (
        f"cannot restore toy:double: it has been changed again since, to {__name__}.{theirs.__qualname__} "
        f"({__file__}:{line}); undo that first."
    )
    assert toy.double is theirs
    toy.double = ours
    registry.restore()
    assert toy.double(3) == 6


def test_restore_is_refused_when_someone_patched_on_top_of_an_alias(toy, make_module):
    user = make_module("toy_user", "from toy import double")
    registry = PatchRegistry([patch_of("toy:double", aliases=("toy_user:double",))])
    registry.apply()
    ours = user.double
    user.double = lambda x: ours(x)
    with pytest.raises(PatchError, match="toy_user:double"):
        registry.restore()


def other_plugin(original):
    """What another plugin puts around a function, as plugins do."""

    @functools.wraps(original)
    def theirs(*args, **kwargs):
        return "theirs", original(*args, **kwargs)

    return theirs


def test_another_plugin_s_wrapper_that_was_there_before_is_kept_and_left_behind(toy):
    toy.double = theirs = other_plugin(toy.double)
    with PatchRegistry([patch_of("toy:double", parameters=("x", "factor"))]).applied():
        assert toy.double(3) == ("patched", ("theirs", 6))
    assert toy.double is theirs


def test_another_plugin_s_wrapper_that_comes_later_is_named_while_both_hold(toy):
    registry = PatchRegistry([patch_of("toy:double"), patch_of("toy:sibling")])
    registry.apply()
    ours = toy.double
    toy.double = other_plugin(toy.double)
    assert toy.double(3) == ("theirs", ("patched", 6))
    changed, untouched = (state for _, state in registry.status())
    assert re.fullmatch(rf"applied, then changed by others: toy\.double \({re.escape(__file__)}:\d+\)", changed)
    assert untouched == "applied"
    toy.double = ours  # They go, and all is as before.
    assert {state for _, state in registry.status()} == {"applied"}
    registry.restore()
    assert toy.double(3) == 6


def test_another_plugin_that_puts_the_original_back_under_us_is_seen(toy):
    original = toy.double
    toy.double = other_plugin(original)
    registry = PatchRegistry([patch_of("toy:double")])
    registry.apply()
    toy.double = original  # They restore what they saw, and our patch is gone with theirs.
    (status,) = registry.status()
    assert status.state.startswith("applied, then changed by others: toy.double (<string>:")
    assert "cannot restore toy:double: it has been changed again since, to toy.double" in refusal_of(registry.restore)


def test_restore_in_the_middle_of_a_stack_undoes_nothing(toy):
    registry = PatchRegistry([patch_of(f"toy:{name}") for name in ("double", "sibling", "Child.method")])
    registry.apply()
    toy.sibling = other_plugin(toy.sibling)
    before = snapshot(toy, toy.Child)
    assert refusal_of(registry.restore).startswith("cannot restore toy:sibling: it has been changed again since, to ")
    assert same(snapshot(toy, toy.Child), before)


def test_parameters_hidden_by_another_plugin_are_said_to_be_hidden_by_it(toy):
    def theirs(*args, **kwargs):
        return None

    toy.double = theirs
    message = refusal_of(PatchRegistry([patch_of("toy:double", parameters=("factor",))]).apply)
    assert message == (
        "cannot patch toy:double: it has no parameter factor in toy 1.2; its parameters are args, kwargs. "
        "It is not toy's own: another plugin may have been there first, it is "
        f"{__name__}.{theirs.__qualname__} ({__file__}:{theirs.__code__.co_firstlineno})."
    )


def test_patches_in_use_stay(toy):
    reasons = ["somebody counts on them."]
    registry = PatchRegistry([patch_of("toy:double")], in_use=lambda: reasons[0] if reasons else None)
    registry.restore()  # Nothing is applied, and so nothing in use.
    registry.apply()
    assert refusal_of(registry.restore) == "cannot restore the patches: somebody counts on them."
    assert toy.double(3) == ("patched", 6)
    reasons.clear()
    registry.restore()
    assert toy.double(3) == 6


def test_targets_are_listed_by_module():
    patches = [patch_of(target) for target in ("a:f", "b.c:g", "a:C.h")]
    assert targets_by_module(patches) == {"a": ["f", "C.h"], "b.c": ["g"]}


def test_patches_hold_for_the_time_of_a_with_block_even_if_it_fails(toy):
    before = snapshot(toy)
    with pytest.raises(KeyError), PatchRegistry([patch_of("toy:double")]).applied():
        assert toy.double(3) == ("patched", 6)
        raise KeyError
    assert same(snapshot(toy), before)


def test_alias_bound_before_is_patched_and_restored(toy, make_module):
    user = make_module("toy_user", "from toy import double as twice")
    before = snapshot(toy, user)
    with PatchRegistry([patch_of("toy:double", aliases=("toy_user:twice",))]).applied():
        assert user.twice is toy.double
        assert user.twice(3) == ("patched", 6)
    assert same(snapshot(toy, user), before)


def test_alias_bound_while_the_patch_is_in_force_is_restored(toy, make_module):
    original = toy.double
    with PatchRegistry([patch_of("toy:double", aliases=("toy_user:twice",))]).applied():
        assert "toy_user" not in sys.modules
        user = make_module("toy_user", "from toy import double as twice")
        assert user.twice(3) == ("patched", 6)
    assert user.twice is toy.double is original


def test_alias_that_is_another_function_raises_and_is_named(toy, make_module):
    user = make_module("toy_user", "def twice(x): return x")
    before = snapshot(toy, user)
    registry = PatchRegistry([patch_of("toy:double", aliases=("toy_user:twice",))])
    assert refusal_of(registry.apply) == "cannot patch toy_user:twice: it is not toy:double in toy 1.2."
    assert same(snapshot(toy, user), before)


def test_alias_that_is_missing_raises_and_is_named(toy, make_module):
    make_module("toy_user", "")
    before = snapshot(toy)
    registry = PatchRegistry([patch_of("toy:double", aliases=("toy_user:twice",))])
    assert refusal_of(registry.apply) == (
        "cannot patch toy_user:twice: module 'toy_user' has no attribute 'twice'. Has it moved in toy 1.2?"
    )
    assert same(snapshot(toy), before)


@pytest.mark.parametrize("imported", ["first", "last"])
def test_import_order_is_irrelevant(tmp_path, monkeypatch, imported):
    (tmp_path / "order_source.py").write_text("def double(x): return 2 * x\n")
    (tmp_path / "order_user.py").write_text("from order_source import double\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry = PatchRegistry([patch_of("order_source:double", aliases=("order_user:double",))])
    try:
        if imported == "first":
            importlib.import_module("order_user")
        with registry.applied():
            user = importlib.import_module("order_user")
            assert user.double(3) == sys.modules["order_source"].double(3) == ("patched", 6)
        assert user.double(3) == sys.modules["order_source"].double(3) == 6
    finally:
        sys.modules.pop("order_user", None)
        sys.modules.pop("order_source", None)


@pytest.mark.parametrize(
    ("versions", "version", "needed"),
    [
        ("", "0.1", True),
        (">=0.19,<0.20", "0.19.2", True),
        (">=0.19,<0.20", "0.20.0", False),
        (">=0.19,<0.20", "0.18.9", False),
        (">=0.19", "0.20.0rc1", True),
        ("<0.20", "0.19.2+abc123", True),
    ],
)
def test_patch_applies_to_the_versions_that_need_it(toy, monkeypatch, versions, version, needed):
    monkeypatch.setattr(toy, "__version__", version)
    patch = patch_of("toy:double", versions=versions)
    registry = PatchRegistry([patch])
    with registry.applied():
        assert toy.double(3) == (("patched", 6) if needed else 6)
    reason = f"not needed with toy {version}"
    assert patch.skip_reason() == (None if needed else reason)
    assert registry.status() == [PatchStatus(patch, "not applied" if needed else f"skipped: {reason}")]


def test_package_of_unknown_version_raises_a_patch_error(toy):
    with pytest.raises(PatchError, match="toy:double"):
        PatchRegistry([patch_of("toy:double", package="no_such_package", versions=">=0.19")]).apply()


def test_patch_whose_needs_cannot_be_imported_is_skipped_though_they_are_installed(toy, monkeypatch, tmp_path):
    (tmp_path / "broken_module.py").write_text("raise ImportError('a library of it is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "blocked_module", None)
    for module in ("no_such_module", "no_such_package.inside", "blocked_module", "broken_module"):
        patch = patch_of("no_such_target:f", needs=("toy", module))
        registry = PatchRegistry([patch, patch_of("toy:double")])
        with registry.applied():
            assert toy.double(3) == ("patched", 6)
            assert registry.status()[0] == (patch, f"skipped: {module} cannot be imported")


def test_patch_whose_needs_can_be_imported_is_applied(toy):
    with PatchRegistry([patch_of("toy:double", needs=("json", "toy"))]).applied():
        assert toy.double(3) == ("patched", 6)


def test_patch_that_another_module_makes_needless_is_skipped(toy):
    needless, needed = (patch_of("toy:double", unless=unless) for unless in (("no_such_module", "json"), ("no_such",)))
    assert PatchRegistry([needless]).status() == [(needless, "skipped: json can be imported")]
    with PatchRegistry([needed]).applied():
        assert toy.double(3) == ("patched", 6)


def test_status_tells_what_has_become_of_each_patch(toy):
    patch, skipped = patch_of("toy:double"), patch_of("toy:sibling", needs=("no_such_module",))
    registry = PatchRegistry([patch, skipped])
    reason = "skipped: no_such_module cannot be imported"
    assert registry.status() == [(patch, "not applied"), (skipped, reason)]
    registry.apply()
    assert registry.status() == [(patch, "applied"), (skipped, reason)]
    registry.restore()
    assert registry.status() == [(patch, "not applied"), (skipped, reason)]


def in_one_order(config, size=1, *, mask=None):
    """A function as one version has it."""


def in_another_order(size, mask=None, config=None, added=0):
    """The same function as another version has it."""


def with_rest(config, **rest):
    """A function that takes what it does not name."""


def test_bind_by_name_names_arguments_whatever_their_order():
    assert bind_by_name(in_one_order, ("c", 4), {"mask": "m"}) == {"config": "c", "size": 4, "mask": "m"}
    expected = {"size": 4, "mask": "m", "config": "c", "added": 0}
    assert bind_by_name(in_another_order, (4, "m", "c"), {}) == expected
    assert bind_by_name(in_another_order, (), {"config": "c", "mask": "m", "size": 4}) == expected


def test_bind_by_name_fills_in_defaults():
    assert bind_by_name(in_one_order, ("c",), {}) == {"config": "c", "size": 1, "mask": None}


def test_bind_by_name_spreads_keyword_arguments_that_have_no_parameter():
    assert bind_by_name(with_rest, ("c",), {"size": 4}) == {"config": "c", "size": 4}
    assert bind_by_name(with_rest, ("c",), {}) == {"config": "c"}


def test_bind_by_name_gives_arguments_to_call_with():
    def original(config, size=1, *, mask=None, **rest):
        return config, size, mask, rest

    assert original(**bind_by_name(original, ("c",), {"mask": "m", "new": 1})) == ("c", 1, "m", {"new": 1})


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), (("c", 1, 2), {}), (("c",), {"unknown": 1})])
def test_bind_by_name_refuses_what_the_call_would_refuse(args, kwargs):
    with pytest.raises(TypeError):
        in_one_order(*args, **kwargs)
    with pytest.raises(TypeError):
        bind_by_name(in_one_order, args, kwargs)


def test_bind_by_name_sees_through_a_patched_function(toy):
    with PatchRegistry([patch_of("toy:double")]).applied():
        assert bind_by_name(toy.double, (3,), {}) == {"x": 3, "factor": 2}


def test_around_gives_each_call_with_its_arguments_by_name_and_proceeds_with_some_of_them_changed(toy):
    def tripled(call):
        assert call.original is before
        return call.args, call["x"], call["factor"], call.proceed(), call.proceed(factor=3 * call["factor"])

    before = toy.double
    with PatchRegistry([patch_of("toy:double", tripled, "around")]).applied():
        assert toy.double(3) == ((3,), 3, 2, 6, 18)
        assert toy.double(factor=5, x=1) == ((), 1, 5, 5, 15)
    assert toy.double is before


def test_around_proceeds_with_arguments_that_are_not_looked_at_as_they_came(toy):
    with PatchRegistry([patch_of("toy:double", lambda call: call.proceed(), "around")]).applied():
        with pytest.raises(TypeError, match="unknown"):
            toy.double(3, unknown=1)
        assert toy.double(3) == 6


@pytest.mark.parametrize(
    "source", ["def f(x, *others, key=0, **rest):", "def f(x, /, *others, key=0, **rest):"], ids=["rest", "by place"]
)
def test_around_proceeds_with_arguments_that_have_no_name_in_their_places(make_module, source):
    made = make_module("placed", f"{source}\n    return x, others, key, rest")
    with PatchRegistry([patch_of("placed:f", lambda call: call.proceed(x=2 * call["x"]), "around")]).applied():
        assert made.f(1, 5, 6, key=7, new=8) == (2, (5, 6), 7, {"new": 8})
        assert made.f(1) == (2, (), 0, {})


def test_around_a_positional_only_parameter_alone_is_given_in_its_place(make_module):
    made = make_module("placed", "def f(x, /, key=0):\n    return x, key")
    with PatchRegistry([patch_of("placed:f", lambda call: call.proceed(key=1), "around")]).applied():
        assert made.f(4) == (4, 1)


def test_around_a_method_knows_its_object_and_proceeds_with_all_arguments_by_name(toy):
    def doubled(call):
        assert call.instance is call["self"]
        return call.proceed(**{**call.named, "x": 2 * call["x"]})

    with PatchRegistry([patch_of("toy:Child.method", doubled, "around")]).applied():
        assert toy.Child().method(3) == ("method", 6)
