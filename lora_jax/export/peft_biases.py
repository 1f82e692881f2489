"""PEFT's option `bias`: biases trained beside a LoRA, all of them or those of the adapted modules.

Here that is a chain of `lora` and `bitfit`. The bias of a module that is saved whole (a classifier) goes with it.
"""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.full import Full
from lora_jax.errors import UserError
from lora_jax.export import peft_names as names
from lora_jax.lift.weight import Axes


def paths(base: Any, saved: Collection[str]) -> set[str]:
    """The biases of all modules but those that are saved whole."""
    return {
        path
        for path, name in names.modules(base).items()
        if name.endswith(".bias") and not names.matches(list(saved), names.module_of(name))
    }


def mode(trained: set[str], adapted: Mapping[str, Any], base: Any, saved: Collection[str]) -> str | None:
    """PEFT's word for a set of trained biases, or None: it has none for this one."""
    if not trained:
        return "none"
    if trained == paths(base, saved):
        return "all"
    return "lora_only" if trained == _own(adapted, base) else None


def tensors(trained: Mapping[str, Full], adapted: Mapping[str, Any], base: Any) -> dict[str, np.ndarray]:
    """Trained biases under PEFT's keys."""
    return {_key(base, p, adapted): np.asarray(one.value, np.float32).reshape(-1) for p, one in trained.items()}


def read(
    config: Mapping[str, Any], given: dict[str, np.ndarray], adapted: Mapping[str, Any], base: Any, file: Path
) -> dict[str, Full]:
    """Takes the biases that a config says were trained out of the tensors.

    Raises:
      UserError: an unknown word, a missing tensor.
    """
    word = config.get("bias") or "none"
    if word not in ("none", "all", "lora_only"):
        raise UserError(f"{file.with_name(names.CONFIG)}: bias={word!r}: expected 'none', 'all' or 'lora_only'")
    everything = paths(base, config.get("modules_to_save") or [])
    chosen = {"none": set(), "all": everything, "lora_only": _own(adapted, base)}[word]
    out = {}
    for path in (p for p in base.sites if p in chosen):
        site = base.sites[path]
        value = names.take(given, _key(base, path, adapted), (math.prod(site.shape),), file)
        out[path] = Full(value=jnp.asarray(value.reshape(site.shape)), axes=Axes.of(site))
    if word == "all":
        for name in [k for k in given if k.endswith((".original_module.bias", ".modules_to_save.bias"))]:
            del given[name]  # PEFT writes a saved module's bias twice more
    return out


def _own(adapted: Mapping[str, Any], base: Any) -> set[str]:
    """Biases of the adapted modules."""
    return {base.sites[p].bias for p in adapted if p in base.sites} - {None}


def _key(base: Any, path: str, adapted: Mapping[str, Any]) -> str:
    """PEFT's key of one bias: an adapted module keeps its own inside `base_layer`."""
    module = names.module_of(names.modules(base)[path])
    inside = ".base_layer" if path in _own(adapted, base) else ""
    return f"{names.PREFIX}{module}{inside}.bias"
