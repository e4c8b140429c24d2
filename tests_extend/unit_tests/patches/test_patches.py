"""Every patch of the adaptor against the installed Megatron: each changes its target and aliases, and nothing else."""

import ast
import dataclasses
import functools
import importlib
import inspect
import json
import re
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest

from mindspeed_cp.patches.any_length import any_length_patches
from mindspeed_cp.patches.arguments import argument_patches
from mindspeed_cp.patches.attention import attention_patches
from mindspeed_cp.patches.batches import batch_patches
from mindspeed_cp.patches.cpu_device import cpu_device_patches
from mindspeed_cp.patches.dataset_helpers import dataset_helper_patches
from mindspeed_cp.patches.documents import document_patches
from mindspeed_cp.patches.dropout import dropout_patches
from mindspeed_cp.patches.dynamic_schedule import dynamic_schedule_patches
from mindspeed_cp.patches.expert_losses import expert_loss_patches
from mindspeed_cp.patches.latent_attention import latent_attention_patches
from mindspeed_cp.patches.latent_travel import latent_travel_patches
from mindspeed_cp.patches.losses import loss_patches
from mindspeed_cp.patches.micro_batch import micro_batch_patches
from mindspeed_cp.patches.padding import padding_patches
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patches.process_groups import process_group_patches
from mindspeed_cp.patches.recomputation import recomputation_patches
from mindspeed_cp.patches.rotary import rotary_patches
from mindspeed_cp.patches.sft_data import sft_data_patches
from mindspeed_cp.patches.torch_norm import torch_norm_patches
from mindspeed_cp.patching import PatchError, PatchRegistry, can_be_imported

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")

ROOT = Path(__file__).resolve().parents[3]
TE = "megatron.core.extensions.transformer_engine"
TE_MODULES = ("transformer_engine", "transformer_engine.pytorch")
TE_IS_INSTALLED = can_be_imported(TE_MODULES[-1])

# Megatron itself is not imported to collect the tests: which of the patches its release needs is known when they run.
PATCHES = (
    *argument_patches(Plugin(), print),
    *process_group_patches(Plugin()),
    *attention_patches(Plugin()),
    *dropout_patches(),
    *latent_attention_patches(),
    *latent_travel_patches(),
    *loss_patches(Plugin()),
    *micro_batch_patches(Plugin()),
    *recomputation_patches(Plugin()),
    *document_patches(Plugin()),
    *batch_patches(Plugin()),
    *dynamic_schedule_patches(Plugin()),
    *rotary_patches(Plugin()),
    *padding_patches(Plugin()),
    *any_length_patches(Plugin()),
    *expert_loss_patches(Plugin()),
    *sft_data_patches(),
    *torch_norm_patches(),
    *dataset_helper_patches(),
    *cpu_device_patches(),
)
TARGETS = list(dict.fromkeys(patch.target for patch in PATCHES))
# What the engine promises of any patch is tested in test_patching.py; here it is seen at one target of Megatron.
sample = pytest.mark.parametrize("target", ["megatron.core.parallel_state:initialize_model_parallel"])
sample_with_alias = pytest.mark.parametrize(
    "target", ["megatron.core.transformer.moe.moe_utils:maybe_move_tensor_to_cpu"]
)
ABSENT = object()


@pytest.fixture(scope="module")
def patches(adaptor):
    """The adaptor's patches by target that the installed Megatron needs, none of them applied."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if not TE_IS_INSTALLED:
            for name in TE_MODULES:
                monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
            monkeypatch.setitem(sys.modules, TE, transformer_engine_stub())
        records = (*adaptor.registry.patches, *adaptor.cpu_registry.patches)
        needed = [patch for patch in records if patch.skip_reason() is None]
        by_target = {patch.target: patch for patch in needed}
        assert len(by_target) == len(needed), "a target is patched twice"
        for target in by_target:
            importlib.import_module(target.partition(":")[0])
        yield by_target


@pytest.fixture
def patch(patches, target):
    """The patch of this target."""
    if target not in patches:
        pytest.skip("; ".join(str(record.skip_reason()) for record in PATCHES if record.target == target))
    return patches[target]


def transformer_engine_stub():
    """The module of TEDotProductAttention with that class alone, its methods as Megatron declares them, but empty."""
    tree = ast.parse(Path(find_spec(TE).origin).read_text())
    stub = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TEDotProductAttention")
    stub.bases = []
    stub.body = [node for node in stub.body if isinstance(node, ast.FunctionDef)]
    for method in stub.body:
        method.body, method.decorator_list, method.returns = [ast.Pass()], [], None
        for argument in (*method.args.posonlyargs, *method.args.args, *method.args.kwonlyargs):
            argument.annotation = None
    module = types.ModuleType(TE)
    exec(ast.unparse(stub), vars(module))
    return module


def paths_of(patch):
    """The target and its aliases, but for those in megatron.training where that is not installed."""
    absent = "megatron.training" if find_spec("megatron.training") is None else "nothing"
    return [path for path in (patch.target, *patch.aliases) if not path.startswith(absent)]


def owners_of(patch):
    """The module, and the class if any, that hold the target, then the modules of its aliases; without repetition."""
    owners = []
    for path in paths_of(patch):
        module, _, attribute = path.partition(":")
        owners.append(importlib.import_module(module))
        for parent in attribute.split(".")[:-1]:
            owners.append(getattr(owners[-1], parent))
    return list(dict.fromkeys(owners))


def stored(path):
    """What the owner of a target or alias stores under its name."""
    module, _, attribute = path.partition(":")
    *parents, name = attribute.split(".")
    owner = importlib.import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)
    return vars(owner).get(name, ABSENT)


def identities(owners):
    """What each owner stores, by identity."""
    return {(owner.__name__, name): id(value) for owner in owners for name, value in list(vars(owner).items())}


def names_of(patch):
    """The places that the patch changes, as `identities` names them."""
    places = set()
    for path in paths_of(patch):
        module, _, attribute = path.partition(":")
        *parents, name = attribute.split(".")
        places.add((parents[-1] if parents else module, name))
    return places


def test_every_patch_of_the_adaptor_is_tested_here(adaptor):
    assert [patch.target for patch in (*adaptor.registry.patches, *adaptor.cpu_registry.patches)] == [
        patch.target for patch in PATCHES
    ]


def test_every_argument_that_a_patch_reads_by_name_is_one_that_it_refuses_to_do_without():
    for patch in PATCHES:
        function = patch.function
        while isinstance(function, functools.partial):
            function = function.func
        if patch.kind == "around":
            read = set(re.findall(r'\bcall\["(\w+)"\]', inspect.getsource(function)))
            assert read <= set(patch.parameters), f"{patch.target}: {function.__name__}"


@pytest.mark.parametrize("target", TARGETS)
def test_patch_replaces_its_target_and_aliases_and_nothing_beside_them_and_restores_exactly(patch, target):
    owners, left = owners_of(patch), stored(target)
    before = identities(owners)
    with PatchRegistry([patch]).applied():
        put_there, after = stored(target), identities(owners)
    assert put_there is not left
    if inspect.isfunction(patch.function) or patch.kind != "replace":
        assert patch in vars(getattr(put_there, "__func__", put_there)).values()
    else:
        assert put_there is patch.function
    assert {place for place in before.keys() | after.keys() if before.get(place) != after.get(place)} == names_of(patch)
    assert identities(owners) == before


@sample
def test_patch_raises_when_its_target_is_missing(patch):
    gone = f"{patch.target}_gone"
    registry = PatchRegistry([dataclasses.replace(patch, target=gone)])
    with pytest.raises(PatchError) as refusal:
        registry.apply()
    assert str(refusal.value).startswith(f"cannot patch {gone}: ")
    assert str(refusal.value).endswith(f" Has it moved in {release_of(patch)}?")


@sample
def test_patch_raises_when_a_parameter_is_missing(patch, target):
    before = stored(target)
    registry = PatchRegistry([dataclasses.replace(patch, parameters=(*patch.parameters, "gone"))])
    with pytest.raises(PatchError) as refusal:
        registry.apply()
    assert str(refusal.value).startswith(f"cannot patch {target}: it has no parameter gone in {release_of(patch)}; ")
    assert stored(target) is before


def put(target, value):
    """Put a function of another plugin's at a target."""
    module, _, attribute = target.partition(":")
    *parents, name = attribute.split(".")
    owner = importlib.import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name, value


@sample
def test_patch_goes_around_another_plugin_s_wrapper_and_leaves_it_there(patch, monkeypatch, target):
    original = stored(target)

    @functools.wraps(original)
    def theirs(*args, **kwargs):
        return original(*args, **kwargs)

    monkeypatch.setattr(*put(target, theirs))
    left = stored(target)
    with PatchRegistry([patch]).applied():
        assert stored(target) is not left
        assert inspect.unwrap(stored(target), stop=lambda function: function is theirs) is theirs
    assert stored(target) is left


@sample
def test_patch_says_who_was_there_when_another_plugin_hides_the_parameters(patch, monkeypatch, target):
    def theirs(*args, **kwargs):
        return None

    monkeypatch.setattr(*put(target, theirs))
    with pytest.raises(PatchError) as refusal:
        PatchRegistry([patch]).apply()
    assert f"another plugin may have been there first, it is {__name__}." in str(refusal.value)
    assert f"({__file__}:" in str(refusal.value)


@sample_with_alias
def test_patch_raises_when_an_alias_is_missing(patch):
    if len(paths_of(patch)) == 1:
        pytest.skip(f"it has no alias in {release_of(patch)} as installed")
    gone = f"{patch.aliases[0]}_gone"
    registry = PatchRegistry([dataclasses.replace(patch, aliases=(gone,))])
    with pytest.raises(PatchError) as refusal:
        registry.apply()
    assert str(refusal.value).startswith(f"cannot patch {gone}: ")


def release_of(patch):
    """Name and version of the package that the target belongs to, found without the library."""
    package = "torch" if patch.target.startswith("torch") else "megatron.core"
    return f"{package} {sys.modules[package].__version__}"


def test_no_patch_is_there_while_its_registry_is_off(adaptor, patches):
    off = {state for registry in (adaptor.registry, adaptor.cpu_registry) for _, state in registry.status()}
    assert {state for state in off if not state.startswith("skipped: ")} == {"not applied"}
    held = [stored(path) for patch in patches.values() for path in paths_of(patch)]
    assert not any("mindspeed_cp" in str(getattr(value, "__module__", "")) for value in held)
    assert not any(hasattr(value, "__mindspeed_cp_patch__") for value in held)


def test_all_patches_together_restore_exactly(adaptor, patches):
    owners = list(dict.fromkeys(owner for patch in patches.values() for owner in owners_of(patch)))
    before = identities(owners)
    with adaptor.registry.applied(), adaptor.cpu_registry.applied():
        states = (*adaptor.registry.status(), *adaptor.cpu_registry.status())
        assert [patch.target for patch, state in states if state == "applied"] == list(patches)
        assert identities(owners) != before
    assert identities(owners) == before


@pytest.fixture(scope="module")
def import_orders(programs):
    """What the two programs find, by the place of Megatron's import."""
    return {order: json.loads(done.stdout.partition("== bindings\n")[2]) for order, done in programs.items()}


def test_import_order_of_megatron_and_adaptor_is_irrelevant(import_orders):
    assert import_orders["first"] == import_orders["last"]


@pytest.fixture
def without_stand_in(monkeypatch):
    """TransformerEngine as the programs have it: where it is installed."""
    if not TE_IS_INSTALLED:
        for name in TE_MODULES:
            monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize("order", ["first", "last"])
def test_import_of_the_adaptor_applies_its_patches_and_not_those_for_the_cpu(
    adaptor, import_orders, without_stand_in, order
):
    expected = [(patch, "applied") for patch in adaptor.registry.patches]
    expected += [(patch, "not applied") for patch in adaptor.cpu_registry.patches]
    for (patch, state), found in zip(expected, import_orders[order]["states"], strict=True):
        reason = patch.skip_reason()
        # Megatron's version ends in the commit of the repository around it, which may move meanwhile.
        expected_state = state if reason is None else f"skipped: {reason}"
        assert [each.partition("+")[0] for each in found] == [patch.target, expected_state.partition("+")[0]]


@pytest.mark.parametrize("order", ["first", "last"])
def test_every_patch_is_seen_at_target_and_aliases(adaptor, import_orders, without_stand_in, order):
    found, records = import_orders[order], (*adaptor.registry.patches, *adaptor.cpu_registry.patches)
    assert found["changed"] == [patch.target for patch in records if patch.skip_reason() is None]
    assert found["apart"] == []


@pytest.mark.parametrize("order", ["first", "last"])
def test_no_module_of_megatron_keeps_an_original(import_orders, order):
    assert import_orders[order]["stale"] == []


@pytest.mark.parametrize("order", ["first", "last"])
def test_no_module_of_megatron_keeps_a_patched_function_after_restore(import_orders, order):
    assert import_orders[order]["left"] == []
