"""What the formats of PEFT's methods with one group of arrays a module share: which modules, which numbers by pattern.

A format is a pair of functions, `write(adapter, delta, base) -> (config, tensors)` and
`read(config, tensors, base, file) -> (adapter, delta)`, which removes from `tensors` what it consumed.
"""

import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.adapters.base import Entry
from lora_jax.errors import UserError
from lora_jax.export import peft_names as names


def check_plain(delta: Mapping[str, Any], cls: type[Entry], base: Any, method: str) -> None:
    """Raises if an entry is of another method, a stack, or at a weight that PEFT's method does not adapt."""
    for path, one in delta.items():
        if not isinstance(one, cls):
            raise UserError(f"PEFT's format for {method!r} cannot hold the {type(one).__name__.lower()} at {path!r}")
        if one.axes.batch:
            raise UserError(f"{path!r} is a stack of layers, which PEFT's format cannot name; unroll the model")
        if "embedding" in base.sites[path].uses:
            raise UserError(f"PEFT's format for {method!r} has no place for the embedding {path!r}")


def module_keys(delta: Mapping[str, Any], base: Any) -> dict[str, str]:
    """`{path: name of the module in transformers}`."""
    ours = names.modules(base)
    return {path: names.module_of(ours[path]) for path in delta}


def usual_and_exceptions(values: Mapping[str, Any], modules: Mapping[str, str]) -> tuple[Any, dict[str, Any]]:
    """The commonest value, and the others as PEFT's pattern: `{module: value}`."""
    usual = collections.Counter(values.values()).most_common(1)[0][0]
    return usual, {modules[p].replace(".", r"\."): v for p, v in values.items() if v != usual}


def plain_number(value: float) -> float | int:
    """An alpha as people write it: 16, not 16.0 or 15.999999."""
    near = round(value, 6)
    return int(near) if near == int(near) else near


def selected(config: Mapping[str, Any], base: Any, file: Path) -> dict[str, str]:
    """`{path: module}` of the weights that a config's `target_modules` select.

    Raises:
      UserError: it selects none.
    """
    out = {}
    for path, name in names.modules(base).items():
        module, site = names.module_of(name), base.sites[path]
        if name.endswith(".weight") and site.is_matrix and names.targeted(config, module):
            out[path] = module
    if not out:
        raise UserError(f"{file}: target_modules={config.get('target_modules')!r} selects no module of this base")
    for path in out:
        if "embedding" in base.sites[path].uses:
            raise UserError(f"{file} adapts the embedding {path!r}; of this method only linear layers can be read")
    return out


def take(tensors: dict, key: str, shape: tuple[int, ...], file: Path) -> np.ndarray:
    """Removes one tensor, checked, as float32."""
    if key not in tensors:
        raise UserError(f"{file} lacks the tensor {key!r}, which its config and this base call for")
    value = tensors.pop(key)
    if tuple(value.shape) != tuple(shape):
        raise UserError(f"{file}: {key!r} has the shape {list(value.shape)}, expected {list(shape)}")
    return np.asarray(value, np.float32)


def check_config(config: Mapping[str, Any], file: Path, needed: tuple[str, ...], off: Mapping[str, tuple]) -> None:
    """Raises if a field is missing, or one that changes what the adapter computes is on and not ours."""
    for name in needed:
        if config.get(name) is None:
            raise UserError(f"{file}: the config lacks {name!r}")
    for name, values in off.items():
        if name in config and config[name] not in values:
            raise UserError(f"{file}: {name}={config[name]!r} is not supported; this reader needs {values[0]!r}")


def uniform(values: Mapping[str, Any]) -> Any:
    """One number where all are equal, else rules by path."""
    distinct = set(values.values())
    return distinct.pop() if len(distinct) == 1 else [(exact(p), v) for p, v in values.items()]


def exact(path: str) -> str:
    """A pattern that matches this path alone."""
    return path.replace(".", r"\.")


def rank_fields(delta: Mapping[str, Any], own: Mapping[str, str]) -> dict[str, Any]:
    """`r`, `alpha`, their patterns and the modules, as LoHa and LoKr have them."""
    ranks = {p: one.ranks[0] for p, one in delta.items()}
    r, rank_pattern = usual_and_exceptions(ranks, own)
    alphas = {p: plain_number(one.scales[0] * ranks[p]) for p, one in delta.items()}
    alpha, alpha_pattern = usual_and_exceptions(alphas, own)
    return {
        "r": r, "alpha": alpha, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern,
        "rank_dropout": 0.0, "module_dropout": 0.0, "use_effective_conv2d": False, "init_weights": True,
        "target_modules": sorted(own.values()),
    }  # fmt: skip


def numbers(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Rank and alpha of a module."""
    rank = names.pattern_value(config.get("rank_pattern") or {}, module, config["r"])
    return rank, names.pattern_value(config.get("alpha_pattern") or {}, module, config["alpha"])
