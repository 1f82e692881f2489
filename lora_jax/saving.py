"""`save` and `load`: any adapter of any method on any model, as safetensors by path + spec + the base's hash.

    adapter.safetensors   one tensor per array of the delta, named `path:field`
    adapter.json          the spec, each entry's class and static fields, the hash of the base

For the formats of other libraries see `export/`.
"""

import dataclasses
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import trees
from lora_jax.adapters import Adapter, from_spec
from lora_jax.errors import UserError
from lora_jax.lift.weight import Axes

FORMAT = "lora_jax/1"
TENSORS, DESCRIPTION = "adapter.safetensors", "adapter.json"
_HOME = "lora_jax.adapters."


def save(directory: str | Path, adapter: Adapter, delta: Mapping[str, Any], variables: Any) -> None:
    """Writes an adapter.

    Args:
      directory: made if it is not there; files of an earlier `save` are replaced.
      adapter: the adapter.
      delta: its delta.
      variables: the base it belongs to; only its hash is stored.
    """
    from safetensors.numpy import save_file

    entries = {path: _describe(one) for path, one in delta.items()}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # safetensors 0.8 writes wrong values for arrays that are not C-contiguous.
    tensors = {name: np.ascontiguousarray(np.asarray(x)) for name, x in _tensors(delta).items()}
    description = {
        "format": FORMAT,
        "spec": adapter.spec,
        "base": trees.fingerprint(variables),
        "entries": entries,
    }
    save_file(tensors, str(directory / TENSORS), metadata={"format": "pt"})
    (directory / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def load(directory: str | Path, variables: Any) -> tuple[Adapter, dict[str, Any]]:
    """Reads what `save` wrote.

    Args:
      directory: of a saved adapter.
      variables: the base; must be the one that the adapter was made for.

    Returns:
      (adapter, delta).

    Raises:
      UserError: no such adapter, another base, or missing, unexpected or damaged tensors.
    """
    directory = Path(directory)
    description = _read_description(directory)
    given = trees.fingerprint(variables)
    if description["base"] != given:
        raise UserError(
            f"the adapter in {str(directory)!r} was made for the base {description['base'][:16]}, but the "
            "variables given are "
            f"{given[:16]}; load the base it was trained on"
        )
    tensors = _read_tensors(directory / TENSORS)
    delta = {path: _entry(path, one, tensors, directory) for path, one in description["entries"].items()}
    if tensors:
        raise UserError(f"{directory / TENSORS} holds unexpected tensors: {', '.join(sorted(tensors)[:5])}")
    return from_spec(description["spec"]), delta


def _arrays(one: Any) -> list[str]:
    """Names of an entry's array fields."""
    return [f.name for f in dataclasses.fields(one) if isinstance(getattr(one, f.name), (np.ndarray, jnp.ndarray))]


def _tensors(delta: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{path}:{name}": getattr(one, name) for path, one in delta.items() for name in _arrays(one)}


def _describe(one: Any) -> dict[str, Any]:
    module = type(one).__module__
    if not module.startswith(_HOME):
        raise UserError(f"only entries of methods in lora_jax/adapters/ can be saved, not {type(one)}")
    arrays = _arrays(one)
    static = {f.name: getattr(one, f.name) for f in dataclasses.fields(one) if f.name not in arrays}
    static["axes"] = dataclasses.asdict(one.axes)
    return {"class": f"{module.removeprefix(_HOME)}.{type(one).__name__}", "arrays": arrays, "static": static}


def _read_description(directory: Path) -> dict[str, Any]:
    file = directory / DESCRIPTION
    if not file.is_file():
        found = sorted(p.name for p in directory.iterdir())[:8] if directory.is_dir() else "no such directory"
        raise UserError(f"no adapter in {str(directory)!r}: expected {DESCRIPTION} and {TENSORS}, found {found}")
    try:
        description = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    if description.get("format") != FORMAT:
        raise UserError(f"{file} has the format {description.get('format')!r}; this version reads {FORMAT!r}")
    if lost := [name for name in ("spec", "base", "entries") if name not in description]:
        raise UserError(f"{file} lacks the field {lost[0]!r}; the file is damaged")
    return description


def _read_tensors(file: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(str(file))
    except FileNotFoundError:
        raise UserError(f"{file} is missing; the adapter's arrays belong there") from None
    except SafetensorError as error:
        raise UserError(f"{file} cannot be read ({error}); the file is truncated or not safetensors") from None


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _entry(path: str, described: dict, tensors: dict[str, Any], directory: Path) -> Any:
    module, _, name = described["class"].rpartition(".")
    try:
        cls = getattr(importlib.import_module(_HOME + module), name)
    except (ImportError, AttributeError):
        raise UserError(f"{directory / DESCRIPTION}: this version has no entries {described['class']!r}") from None
    fields = {k: _tuples(v) for k, v in described["static"].items()}
    fields["axes"] = Axes(**{k: tuple(v) for k, v in described["static"]["axes"].items()})
    for array in described["arrays"]:
        key = f"{path}:{array}"
        if key not in tensors:
            raise UserError(f"{directory / TENSORS} lacks the tensor {key!r}")
        fields[array] = jnp.asarray(tensors.pop(key))
    return cls(**fields)
