"""VERA: two vectors a module, and the shared projections, always written: torch's random numbers are not ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import Adapter, get
from lora_jax.adapters.base import SHARED
from lora_jax.adapters.vera import PROJECTIONS, Projections, VeRA
from lora_jax.errors import UserError
from lora_jax.export import peft_names as names
from lora_jax.lift.weight import Axes

METHODS = ("vera",)
A, B, LAMBDA_D, LAMBDA_B = "base_model.vera_A", "base_model.vera_B", ".vera_lambda_d", ".vera_lambda_b"


def write(adapter: Adapter, delta: Mapping[str, Any], base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fields of the config, the vectors and the projections."""
    shared = delta[SHARED + PROJECTIONS]
    tensors = {A: np.asarray(shared.a, np.float32).T, B: np.asarray(shared.b, np.float32).T}
    ours = names.modules(base)
    module = {p: names.module_of(ours[p]) for p in delta if not p.startswith(SHARED)}
    for path, name in module.items():
        tensors[names.PREFIX + name + LAMBDA_D] = np.asarray(delta[path].lambda_d, np.float32)
        tensors[names.PREFIX + name + LAMBDA_B] = np.asarray(delta[path].lambda_b, np.float32).reshape(-1)
    spec = adapter.spec
    return {
        "r": spec["rank"],
        "d_initial": spec["d_initial"],
        "vera_dropout": spec["dropout"],
        "projection_prng_key": 0,
        "save_projection": True,
        "target_modules": names.targets(list(module.values()), base),
        "fan_in_fan_out": False,
        "bias": "none",
        "init_weights": True,
    }, tensors


def read(config: Mapping, tensors: dict, base: Any, file: Path) -> tuple[Adapter, dict[str, Any]]:
    """The adapter and its delta.

    Raises:
      UserError: projections that were not saved, tensors that do not fit the config or the base.
    """
    names.need(config, ("r", "target_modules"), file)
    if A not in tensors or B not in tensors:
        raise UserError(
            f"{file} holds no projections ({A}, {B}), and nobody but torch can draw them again; save the adapter with "
            "save_projection=True"
        )
    rank, modules = config["r"], names.targeted_modules(config, base)
    sizes = [names.flat_sizes(base.sites[p]) for p in modules]
    a = names.take(tensors, A, (rank, None), file)
    b = names.take(tensors, B, (None, rank), file)
    if a.shape[1] < max(n for n, _ in sizes) or b.shape[0] < max(n for _, n in sizes):
        raise UserError(
            f"{file}: the projections of {a.shape[1]} and {b.shape[0]} are narrower than the modules of this base; the "
            "adapter was made for another one"
        )
    delta: dict[str, Any] = {SHARED + PROJECTIONS: Projections(a=jnp.asarray(a.T), b=jnp.asarray(b.T))}
    for (path, module), (_, n_out) in zip(modules.items(), sizes, strict=True):
        site, key = base.sites[path], names.PREFIX + module
        lambda_b = names.take(tensors, key + LAMBDA_B, (n_out,), file).reshape(site.dims(site.fan_out))
        delta[path] = VeRA(
            lambda_d=jnp.asarray(names.take(tensors, key + LAMBDA_D, (rank,), file)),
            lambda_b=jnp.asarray(lambda_b), axes=Axes.of(site),
        )  # fmt: skip
    adapter = get("vera")(
        rank=rank, targets=[names.exact(p) for p in modules], dropout=config.get("vera_dropout") or 0.0,
        d_initial=config.get("d_initial", 0.1),
    )  # fmt: skip
    return adapter, delta
