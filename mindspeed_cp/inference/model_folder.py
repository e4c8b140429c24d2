"""Folders of models as Hugging Face has them, before anything of them is loaded: config.json, safetensors, a tokenizer.

No pickle is loaded, and no code is run, of a folder or of a place that it names.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_INDEX = "model.safetensors.index.json"
"""Which of several files has which weight."""


def check_folder(folder: Path) -> None:
    """Raise ValueError unless a folder holds a model that can be loaded without running anything of it."""
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"{folder} holds no config.json; give the folder of a Hugging Face model.")
    if not any(folder.glob("*.safetensors")):
        pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(pattern))]
        found = f"{pickles[0]}, a pickle, which may run code" if pickles else "no weights"
        raise ValueError(
            f"{folder} holds {found}, and only safetensors are loaded; get it as safetensors, or convert it "
            f"where you trust it: model.save_pretrained(folder)."
        )
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json), which is not loaded; merge it into the model first: "
            f"model.merge_and_unload(), then save_pretrained."
        )
    said = _object(folder, "config.json")
    if (folder / "generation_config.json").exists():
        _object(folder, "generation_config.json")
    _check_names_of_weights(folder, said.get("transformers_weights"))
    fetched = sorted(_fetched(said))
    if fetched:
        raise ValueError(
            f"{folder} has code fetched from {fetched[0]!r} (an implementation in config.json), which is not run; take "
            f"it out of its config.json."
        )
    if "auto_map" in said:
        raise ValueError(
            f"{folder} comes with code of its own (auto_map in config.json), which is not run; use a model "
            f"whose code is in transformers."
        )


def _object(folder: Path, name: str) -> dict[str, Any]:
    """What a JSON file of a folder says. Raises ValueError where it is none, or no object."""
    try:
        said = json.loads((folder / name).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: its {name} is no JSON ({error}); get it anew.") from error
    if not isinstance(said, dict):
        raise ValueError(f"{folder}: its {name} is a {type(said).__name__}, no JSON object; get it anew.")
    return said


def _fetched(said: object, *, named: bool = False) -> set[str]:
    """Places of kernels that a configuration names, at any depth. named: whether what is looked at is one's name."""
    if isinstance(said, Mapping):
        return set().union(*(_fetched(x, named=named or "_implementation" in key) for key, x in said.items()))
    return {said} if named and isinstance(said, str) and "/" in said else set()


def _check_names_of_weights(folder: Path, named: object) -> None:
    """Raise ValueError unless all files that transformers would load are safetensors, and in the folder.

    named: the file that config.json names, where it does. Otherwise it is model.safetensors, or those of an index.
    """
    alone = (folder / "model.safetensors").is_file()
    index = named if named is not None else None if alone or not (folder / _INDEX).exists() else _INDEX
    if index is None:
        return
    names: list[object] = [index]
    if isinstance(index, str) and index.endswith(".json"):
        found = _object(folder, index).get("weight_map")
        if not isinstance(found, dict) or not found:
            raise ValueError(f"{folder}: its {index} names no weights (weight_map); get it anew.")
        names = list(dict.fromkeys(found.values()))
    for name in names:
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            raise ValueError(
                f"{folder} has its weights in {name!r}, by {'config.json' if names == [named] else index}, and only "
                f"safetensors of the folder itself are loaded; get it as such, or convert it where you trust it: "
                f"model.save_pretrained(folder)."
            )
        if not (folder / name).is_file():
            raise ValueError(f"{folder} lacks {name}, in which {index} has weights; get the folder anew.")
