"""What formats with one group of arrays a module share: which modules, and which numbers by pattern."""

import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def usual_and_exceptions(values: Mapping[str, Any], modules: Mapping[str, str]) -> tuple[Any, dict[str, Any]]:
    """The commonest value, and the others as PEFT's pattern: `{module: value}`."""
    usual = collections.Counter(values.values()).most_common(1)[0][0]
    return usual, {names.literal(modules[p]): v for p, v in values.items() if v != usual}


def plain_number(value: float) -> float | int:
    """An alpha as people write it: 16, not 16.0 or 15.999999."""
    near = round(value, 6)
    return int(near) if near == int(near) else near


def selected(config: Mapping[str, Any], base: Any, file: Path) -> dict[str, str]:
    """`{path: module}` of the linear layers that a config's `target_modules` select.

    Raises:
      UserError: it selects none, or an embedding.
    """
    out = names.targeted_modules(config, base)
    for path in out:
        if "embedding" in base.sites[path].uses:
            raise UserError(f"{file} adapts the embedding {path!r}; of this method only linear layers can be read")
    return out


def check_config(config: Mapping[str, Any], file: Path, needed: tuple[str, ...], off: Mapping[str, tuple]) -> None:
    """Raises if a field is missing, or one that changes what the adapter computes is on and not ours."""
    for name in needed:
        if config.get(name) is None:
            raise UserError(f"{file}: the config lacks {name!r}")
    for name, values in off.items():
        if name in config and config[name] not in values:
            raise UserError(f"{file}: {name}={config[name]!r} is not supported; this reader needs {values[0]!r}")


def rank_fields(delta: Mapping[str, Any], own: Mapping[str, str], base: Any) -> dict[str, Any]:
    """`r`, `alpha`, their patterns and the modules, as LoHa and LoKr have them."""
    ranks = {p: one.ranks[0] for p, one in delta.items()}
    r, rank_pattern = usual_and_exceptions(ranks, own)
    alphas = {p: plain_number(one.scales[0] * ranks[p]) for p, one in delta.items()}
    alpha, alpha_pattern = usual_and_exceptions(alphas, own)
    return {
        "r": r, "alpha": alpha, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern,
        "rank_dropout": 0.0, "module_dropout": 0.0, "use_effective_conv2d": False, "init_weights": True,
        "target_modules": names.targets(list(own.values()), base),
    }  # fmt: skip


def numbers(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Rank and alpha of a module."""
    rank = names.pattern_value(config.get("rank_pattern") or {}, module, config["r"])
    return rank, names.pattern_value(config.get("alpha_pattern") or {}, module, config["alpha"])
