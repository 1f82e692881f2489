"""lora_jax: parameter-efficient fine-tuning in JAX, built for finding out what is worth adapting.

    sites   = lj.find_sites(model.apply, variables, tokens)       what the axes of every weight mean
    adapter = lj.lora(rank=8, targets=r".*/(query|value)/kernel") a method with its hyper-parameters
    delta   = adapter.init(key, variables, sites)                 what trains
    apply   = lj.lift(model.apply)                                the same function, taking adapted weights
    logits  = apply(adapter.bind(variables, delta), tokens)

The heavier stations (models, checkpoints, PEFT files) are imported when their name is first used.
"""

import importlib
from typing import Any

from lora_jax import adapters as _adapters
from lora_jax.adapters import Adapter, from_spec, methods
from lora_jax.analyze import (
    amplification,
    analyze,
    cat,
    compare,
    effective_rank,
    linear,
    recombine,
    singular_values,
    stable_rank,
    subspace_similarity,
    truncate,
    update,
    without,
)
from lora_jax.audit import audit
from lora_jax.errors import UserError
from lora_jax.lift import AdaptedWeight, find_sites, input_moments, lift
from lora_jax.saving import load, save
from lora_jax.sites import Site

__version__ = "0.1.0"

_LATE = {
    "load_pretrained": "models",
    "from_config": "models",
    "save_pretrained": "models",
    "save_peft": "export",
    "load_peft": "export",
    "quantize": "quant",
}

__all__ = [
    "AdaptedWeight", "Adapter", "Site", "UserError", "audit", "find_sites", "from_spec", "input_moments", "lift",
    "load",    "methods", "save",
    "amplification", "analyze", "cat", "compare", "effective_rank", "linear", "recombine", "singular_values",
    "stable_rank", "subspace_similarity", "truncate", "update", "without",
    *_LATE, *methods(),
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """A method of `adapters/` by its name, or a name of a station that is imported late."""
    if name in _LATE:
        value = getattr(importlib.import_module(f"lora_jax.{_LATE[name]}"), name)
    elif name in methods():
        value = _adapters.get(name)
    else:
        raise AttributeError(f"module 'lora_jax' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
