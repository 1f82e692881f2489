"""IA3: one vector a module, (out, 1), or (1, in) for the modules listed as feed-forward."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import Adapter, get
from lora_jax.adapters.base import bias_axes
from lora_jax.adapters.ia3 import IA3
from lora_jax.export import peft_names as names
from lora_jax.lift.weight import Axes

METHODS = ("ia3",)
VECTOR = ".ia3_l"


def write(adapter: Adapter, delta: Mapping[str, Any], base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fields of the config and the vectors."""
    del adapter
    ours, tensors = names.modules(base), {}
    module = {p: names.module_of(ours[p]) for p in delta}
    for path, one in delta.items():
        value = np.asarray(one.out if one.into is None else one.into, np.float32).reshape(-1)
        tensors[names.PREFIX + module[path] + VECTOR] = value[:, None] if one.into is None else value[None, :]
    inputs = [module[p] for p, one in delta.items() if one.into is not None]
    targets, feedforward = names.targets(list(module.values()), base), names.targets(inputs, base)
    if not {*feedforward} <= {*targets}:  # PEFT asks for a subset, word for word
        targets, feedforward = sorted(module.values()), sorted(inputs)
    return {
        "target_modules": targets,
        "feedforward_modules": feedforward,
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
    }, tensors


def read(config: Mapping, tensors: dict, base: Any, file: Path) -> tuple[Adapter, dict[str, Any]]:
    """The adapter and its delta.

    Raises:
      UserError: tensors that do not fit the config or the base.
    """
    names.need(config, ("target_modules",), file)
    delta, inputs = {}, []
    for path, module in names.targeted_modules(config, base).items():
        site, key = base.sites[path], names.PREFIX + module + VECTOR
        n_in, n_out = names.flat_sizes(site)
        if names.matches(config.get("feedforward_modules"), module):
            value = names.take(tensors, key, (1, n_in), file).reshape(site.dims(site.fan_in))
            delta[path] = IA3(into=jnp.asarray(value), axes=Axes.of(site))
            inputs.append(names.exact(path))
        else:
            value = names.take(tensors, key, (n_out, 1), file).reshape(site.dims(site.fan_out))
            bias, batch = bias_axes(site, base.sites)
            delta[path] = IA3(out=jnp.asarray(value), axes=Axes.of(site), bias=bias, bias_batch=batch)
    targets = [names.exact(p) for p in delta]
    return get("ia3")(targets=targets, feedforward=inputs or "none"), delta
