"""What a program finds that imports Megatron before the adaptor or after it, and then wants to train on a CPU too."""

import importlib
import importlib.util
import json
import sys
import types


def print_states_and_report() -> None:
    """Every patch with its state and reason, and the report of `python -m mindspeed_cp`."""
    from mindspeed_cp import megatron_adaptor
    from mindspeed_cp.__main__ import report

    print("== states")
    for patch, state in (*megatron_adaptor.registry.status(), *megatron_adaptor.cpu_registry.status()):
        print(patch.target, state, patch.why, sep="|")
    print("== report")
    print(report())


def print_bindings(*, megatron_first: bool) -> None:
    """As JSON: the states of all patches, and where patched and original functions are bound in Megatron's modules."""
    if megatron_first:
        import_megatron()
    from mindspeed_cp import megatron_adaptor

    registries = megatron_adaptor.registry, megatron_adaptor.cpu_registry
    states = [(patch.target, state) for registry in registries for patch, state in registry.status()]
    registries[1].apply()
    if not megatron_first:
        import_megatron()
    patches = [patch for registry in registries for patch, state in registry.status() if state == "applied"]
    patched = {patch.target: held(patch.target) for patch in patches}
    aliases = [(patch.target, path) for patch in patches for path in patch.aliases if is_installed(path)]
    apart = [path for target, path in aliases if held(path) is not patched[target]]
    while_applied = bindings()
    registries[1].restore()
    registries[0].restore()
    original = {patch.target: held(patch.target) for patch in patches}
    changed = [target for target in patched if patched[target] is not original[target]]
    print("== bindings")
    stale, left = find(original, while_applied), find(patched, bindings())
    print(json.dumps({"states": states, "apart": apart, "changed": changed, "stale": stale, "left": left}))


def import_megatron() -> None:
    for module in ("megatron.training", "megatron.core.models.gpt.gpt_layer_specs", "megatron.core.datasets.utils"):
        if is_installed(module):
            importlib.import_module(module)


def is_installed(module: str) -> bool:
    return not module.startswith("megatron.training") or importlib.util.find_spec("megatron.training") is not None


def held(path: str) -> object:
    module, _, attribute = path.partition(":")
    value: object = importlib.import_module(module)
    for name in attribute.split("."):
        value = getattr(value, name)
    return value


def bindings() -> list[tuple[str, str, object]]:
    modules = [module for name, module in sys.modules.items() if name.startswith("megatron")]
    modules = [module for module in modules if isinstance(module, types.ModuleType)]
    return [(module.__name__, key, value) for module in modules for key, value in list(vars(module).items())]


def find(values: dict[str, object], found: list[tuple[str, str, object]]) -> list[str]:
    """Where the values are bound, those that their own module has made: others may have imported the rest too."""
    own = {target: v for target, v in values.items() if getattr(v, "__module__", None) == target.partition(":")[0]}
    return [f"{module}:{key}" for module, key, value in found for v in own.values() if value is v]
