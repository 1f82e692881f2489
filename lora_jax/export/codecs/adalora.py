"""ADALORA: A, B and the singular values of the live triplets, and flags that say which those are.

Described from files written by PEFT 0.21.2. A module has `lora_A` (rank, in), `lora_B` (out, rank) and `lora_E`
(rank, 1), without `.weight`. Only live triplets are stored; `rank_pattern` says by one flag per triplet of the start
which those are. PEFT's scale is `lora_alpha / (init_r + 1e-5)` for all modules, whatever was pruned, so what a site's
own scale differs by goes into its `lora_E`. `r`, `alpha_pattern` and `use_rslora` mean nothing to this type.
"""

import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import Adapter, get
from lora_jax.adapters.adalora import AdaLoRA
from lora_jax.adapters.parts.gated import rank_pattern
from lora_jax.errors import UserError
from lora_jax.export import peft_names as names
from lora_jax.lift.weight import Axes

METHODS = ("adalora",)
SUFFIXES = {"a": ".lora_A", "e": ".lora_E", "b": ".lora_B"}
_EPSILON = 1e-5  # PEFT adds it to the rank it divides by


def write(adapter: Adapter, delta: Mapping[str, Any], base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """An AdaLoRA delta as PEFT has it.

    Args:
      adapter: `adalora`.
      delta: its delta.
      base: the `Base` it belongs to; names the modules.

    Returns:
      (what adapter_config.json holds besides what every type has, tensors by key).

    Raises:
      UserError: an embedding, which PEFT's AdaLoRA does not have.
    """
    module = {path: names.module_of(names.modules(base)[path]) for path in delta}
    for path in delta:
        _check(path, base)
    init_r = max(one.ranks[0] for one in delta.values())
    alphas = {path: one.scales[0] * one.ranks[0] for path, one in delta.items()}
    alpha = collections.Counter(alphas.values()).most_common(1)[0][0]
    live = {path: _kept(pattern, delta) for path, pattern in rank_pattern(delta).items()}
    tensors = {}
    for path, one in delta.items():
        ratio = one.scales[0] * (init_r + _EPSILON) / alpha
        a, b = one.a.reshape(-1, one.a.shape[-1]), one.b.reshape(one.b.shape[0], -1)
        own = {"a": np.asarray(a).T, "e": np.asarray(one.e)[:, None] * np.float32(ratio), "b": np.asarray(b)}
        for field, suffix in SUFFIXES.items():
            kept = own[field][live[path]]
            tensors[names.PREFIX + module[path] + suffix] = kept.T if field == "b" else kept
    config = _config(adapter, delta, module, live, init_r, alpha)
    return config | {"target_modules": names.targets(list(module.values()), base)}, tensors


def _check(path: str, base: Any) -> None:
    if "embedding" in base.sites[path].uses:
        raise UserError(
            f"PEFT's AdaLoRA has no embeddings, and {path!r} is one; leave it out of the targets, or save this adapter "
            "with lora_jax.save"
        )


def _kept(pattern: np.ndarray, delta: Mapping[str, AdaLoRA]) -> np.ndarray:
    """Flags of the triplets to store; before training no gate is open, and all are stored."""
    fresh = not any(np.any(one.e) for one in delta.values())
    return pattern | fresh


def _config(adapter: Adapter, delta: Mapping, module: Mapping, live: Mapping, init_r: int, alpha: float) -> dict:
    spec, total = adapter.spec, adapter.spec["total_steps"]
    steps = lambda name: int(spec[name] * total) if spec[name] < 1 else int(spec[name])  # noqa: E731
    flags = {f"{module[p]}.lora_E": [bool(v) for v in f] + [False] * (init_r - len(f)) for p, f in live.items()}
    return {
        "init_r": init_r,
        "target_r": max(1, round(float(np.mean([one.budget[0] for one in delta.values()])))),
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": spec["dropout"],
        "rank_pattern": None if all(all(f) for f in flags.values()) else flags,
        "beta1": spec["beta1"],
        "beta2": spec["beta2"],
        "orth_reg_weight": spec["orth_weight"],
        "deltaT": spec["interval"],
        # PEFT demands a schedule to train on with; where the run's length is not known, the shortest there is.
        "tinit": steps("tinit") if total else 0,
        "tfinal": steps("tfinal") if total else 0,
        "total_step": total or 1,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def read(config: Mapping[str, Any], tensors: dict, base: Any, file: Path) -> tuple[Adapter, dict[str, AdaLoRA]]:
    """PEFT's AdaLoRA as ours. Pruned triplets come back as zeros.

    Args:
      config: adapter_config.json.
      tensors: by key; those that belong to AdaLoRA are removed.
      base: the `Base` it belongs to.
      file: for messages.

    Returns:
      (adapter, delta), the adapter with PEFT's penalty and order of importance.

    Raises:
      UserError: a missing or misshaped tensor, a rank pattern that does not fit, no module of this base.
    """
    names.need(config, ("init_r", "target_r", "lora_alpha", "target_modules"), file)
    init_r, alpha = int(config["init_r"]), float(config["lora_alpha"])
    alpha = alpha if alpha > 0 else float(init_r)  # as PEFT reads it
    target = min(int(config["target_r"]), init_r)
    patterns = dict(config.get("rank_pattern") or {})
    delta = {}
    for path, module in names.targeted_modules(config, base).items():
        site = base.sites[path]
        if "embedding" in site.uses:
            raise UserError(f"{file}: target_modules selects the embedding {module!r}, which PEFT's AdaLoRA lacks")
        live = _flags(patterns, module, init_r, file)
        n_in, n_out = names.flat_sizes(site)
        n = int(live.sum())
        shapes = {"a": (n, n_in), "e": (n, 1), "b": (n_out, n)}
        own = {f: names.take(tensors, names.PREFIX + module + s, shapes[f], file) for f, s in SUFFIXES.items()}
        a, e, b = (np.zeros((init_r, size), np.float32) for size in (n_in, 1, n_out))
        a[live], e[live], b[live] = own["a"], own["e"] * np.float32(init_r / (init_r + _EPSILON)), own["b"].T
        delta[path] = AdaLoRA(
            a=jnp.asarray(a.T.reshape(*site.dims(site.fan_in), init_r)), e=jnp.asarray(e[:, 0]),
            b=jnp.asarray(b.reshape(init_r, *site.dims(site.fan_out))), axes=Axes.of(site),
            ranks=(init_r,), budget=(target,), scales=(alpha / init_r,),
        )  # fmt: skip
    if patterns:
        raise UserError(f"{file}: rank_pattern names {sorted(patterns)[0]!r}, which is no adapted module of this base")
    return _adapter(config, list(delta), init_r, target, alpha), delta


def _flags(patterns: dict, module: str, init_r: int, file: Path) -> np.ndarray:
    """Which triplets of a module are stored; removes the entry. PEFT keys it by the name of `lora_E`."""
    given = patterns.pop(f"{module}.lora_E", None)
    flags = np.ones(init_r, bool) if given is None else np.asarray(given)
    if flags.shape != (init_r,) or flags.dtype != bool:
        raise UserError(f"{file}: the rank_pattern of {module!r} must be {init_r} booleans (init_r), got {given!r}")
    return flags


def _adapter(config: Mapping, paths: list[str], init_r: int, target: int, alpha: float) -> Adapter:
    given = {"beta1": "beta1", "beta2": "beta2", "orth_weight": "orth_reg_weight", "interval": "deltaT"}
    given |= {"tinit": "tinit", "tfinal": "tfinal", "total_steps": "total_step"}
    return get("adalora")(
        rank=target, init_rank=init_r, alpha=int(alpha) if alpha == int(alpha) else alpha,
        targets=[names.exact(path) for path in paths], dropout=config.get("lora_dropout") or 0.0,
        orthogonality="mean", importance="after",
        **{ours: config[theirs] for ours, theirs in given.items() if config.get(theirs) is not None},
    )  # fmt: skip
