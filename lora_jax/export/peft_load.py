"""`load_peft`: reads an adapter that PEFT wrote. Strict where PEFT is silent.

PEFT warns about missing tensors and ignores unexpected ones, so an adapter for another model loads and does nothing.
Here a missing, unexpected or misshaped tensor, a rank that contradicts the config and an option we do not have are
errors.
"""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import trees
from lora_jax.adapters import Adapter, get
from lora_jax.adapters.chain import together
from lora_jax.adapters.full import Full
from lora_jax.errors import UserError, nearest
from lora_jax.export import codecs, peft_biases
from lora_jax.export import peft_names as names
from lora_jax.lift.weight import Axes, is_adapted


def load_peft(directory: str | Path, base: Any) -> tuple[Adapter, dict[str, Any]]:
    """Reads a PEFT adapter directory.

    Args:
      directory: with `adapter_config.json` and `adapter_model.safetensors`.
      base: the `Base` it belongs to.

    Returns:
      (adapter, delta); the adapter is the method of the config, or a chain of it and of what is saved whole.

    Raises:
      UserError: no such files, an unsupported option, or tensors that do not fit the config or the base.
    """
    directory = Path(directory)
    config, tensors = _read_config(directory), _read_tensors(directory)
    file = directory / names.TENSORS
    codec = codecs.by_type(config.get("peft_type", ""), str(directory / names.CONFIG))
    adapter, delta = codec.read(config, tensors, base, file)
    parts = [(adapter, delta)]
    if biases := peft_biases.read(config, tensors, delta, base, file):
        parts.append((_in_place("bitfit", biases), biases))
    if saved := _saved(tensors, base, file, getattr(codec, "PREFIX", names.PREFIX)):
        parts.append((_in_place("full", saved), saved))
    _check_empty(tensors, base, file)
    whole, together_delta = together(parts)
    order = [p for p in together_delta if p.startswith("@")] + list(trees.flatten(base.variables, is_adapted))
    return whole, {p: together_delta[p] for p in order if p in together_delta}


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / names.CONFIG
    if not file.is_file():
        raise UserError(f"no PEFT adapter in {str(directory)!r}: {names.CONFIG} is missing")
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not JSON: {error}") from None


def _read_tensors(directory: Path) -> dict[str, np.ndarray]:
    import safetensors

    file = directory / names.TENSORS
    if not file.is_file():
        hint = f"; convert {names.PICKLED} with PEFT first" if (directory / names.PICKLED).is_file() else ""
        raise UserError(f"{file} is missing{hint}")
    try:
        with safetensors.safe_open(str(file), framework="np") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}); the file is truncated or not safetensors") from None


def _saved(tensors: dict, base: Any, file: Path, prefix: str) -> dict[str, Full]:
    """Modules saved whole."""
    out, leaves = {}, trees.flatten(base.variables, is_adapted)
    for path, tensor in base.family.tensors(base.config, base.num_labels).items():
        if prefix + tensor.name in tensors:
            shape = leaves[path].shape
            value = names.take(tensors, prefix + tensor.name, shape[::-1] if tensor.transpose else shape, file)
            value = value.T if tensor.transpose else value
            if names.tied_head(base.sites[path]):
                _check_tied(tensors, prefix, value, file)
            out[path] = Full(value=jnp.asarray(np.ascontiguousarray(value)), axes=Axes.of(base.sites[path]))
    return out


def _check_tied(tensors: dict, prefix: str, value: np.ndarray, file: Path) -> None:
    """PEFT saves an embedding and the head tied to it apart; here they are one weight."""
    key = f"{prefix}{names.HEAD}.weight"
    if key not in tensors or not np.array_equal(names.take(tensors, key, value.shape, file), value):
        raise UserError(
            f"{file} saves the embedding whole, but not the same values for the head tied to it; this base has one "
            "weight for both. Untie the checkpoint (tie_word_embeddings=false) or train with PEFT's "
            "ensure_weight_tying=True"
        )


def _in_place(method: str, entries: dict[str, Full]) -> Adapter:
    return get(method)(targets=[names.exact(p) for p in entries])


def _check_empty(tensors: dict, base: Any, file: Path) -> None:
    if tensors:
        odd = sorted(tensors)[0]
        known = nearest(odd.removeprefix(names.PREFIX), names.modules(base).values(), 1)[0]
        raise UserError(
            f"{file} holds {len(tensors)} tensor(s) that this base has no place for, the first {odd!r} "
            f"(nearest: {known!r}); is it an adapter for another model?"
        )
