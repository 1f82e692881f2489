"""LN_TUNING: norms trained in place, each module saved whole under `ln_tuning_layers`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import trees
from lora_jax.adapters import Adapter, get
from lora_jax.adapters.full import Full
from lora_jax.adapters.layernorm import is_norm
from lora_jax.errors import UserError
from lora_jax.export import peft_names as names
from lora_jax.lift.weight import Axes

METHODS = ("layernorm",)
LAYER = ".ln_tuning_layers."


def write(adapter: Adapter, delta: Mapping[str, Any], base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fields of the config, and the modules: what was not trained of them as it is in the base."""
    del adapter
    ours, leaves, tensors = names.modules(base), trees.flatten(base.variables), {}
    modules = dict.fromkeys(names.module_of(ours[p]) for p in delta)
    for path, name in ours.items():
        module, _, field = name.rpartition(".")
        if module in modules:
            value = delta[path].value if path in delta else leaves[path]
            tensors[names.PREFIX + module + LAYER + field] = np.asarray(value, np.float32)
    return {"target_modules": names.targets(list(modules), base)}, tensors


def read(config: Mapping, tensors: dict, base: Any, file: Path) -> tuple[Adapter, dict[str, Any]]:
    """The adapter and its delta.

    Raises:
      UserError: tensors that do not fit the config or the base.
    """
    names.need(config, ("target_modules",), file)
    delta = {}
    for path, name in names.modules(base).items():
        module, _, field = name.rpartition(".")
        site = base.sites[path]
        if is_norm(site) and names.targeted(config, module):
            value = names.take(tensors, names.PREFIX + module + LAYER + field, site.shape, file)
            delta[path] = Full(value=jnp.asarray(value), axes=Axes.of(site))
    if not delta:
        raise UserError(f"{file}: target_modules={config['target_modules']!r} selects no norm of this base")
    return get("layernorm")(targets=[names.exact(p) for p in delta]), delta
