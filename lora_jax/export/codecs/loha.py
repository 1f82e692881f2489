"""LoHa in PEFT's format: `hada_w1_a`, `hada_w2_a` (out, r) and `hada_w1_b`, `hada_w2_b` (r, in), without `.weight`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import Adapter, get
from lora_jax.adapters.loha import LoHa
from lora_jax.export import peft_modules as modules
from lora_jax.export import peft_names as names
from lora_jax.lift.weight import Axes

METHODS = ("loha",)
_OFF = {"use_effective_conv2d": (False,)}  # PEFT's dropouts act in training alone and are not carried over


def write(adapter: Adapter, delta: Mapping[str, LoHa], base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The config's own fields, and the tensors.

    Raises:
      UserError: a stack of layers, or an embedding.
    """
    del adapter
    modules.check_plain(delta, LoHa, base, "loha")
    own = names.module_keys(delta, base)
    tensors = {}
    for path, one in delta.items():
        rank = one.ranks[0]
        for i, (a, b) in enumerate(((one.a, one.b), (one.a2, one.b2)), start=1):
            key = f"{names.PREFIX}{own[path]}.hada_w{i}"
            tensors[key + "_a"] = np.asarray(b).reshape(b.shape[0], -1)[:rank].T
            tensors[key + "_b"] = np.asarray(a).reshape(-1, a.shape[-1])[:, :rank].T
    return {**modules.rank_fields(delta, own, base)}, tensors


def read(config: Mapping[str, Any], tensors: dict, base: Any, file: Path) -> tuple[Adapter, dict[str, LoHa]]:
    """The adapter and its delta; consumed tensors are removed.

    Raises:
      UserError: an option that we do not have, a missing or misshaped tensor, targets that select nothing.
    """
    modules.check_config(config, file, ("r", "alpha", "target_modules"), _OFF)
    delta, alphas = {}, {}
    for path, module in modules.selected(config, base, file).items():
        site = base.sites[path]
        rank, alphas[path] = modules.numbers(config, module)
        fan_in, fan_out = site.dims(site.fan_in), site.dims(site.fan_out)
        key = names.PREFIX + module + ".hada_w"
        arrays: dict[str, Any] = {}
        for i, ours in (("1", ""), ("2", "2")):
            b = names.take(tensors, f"{key}{i}_a", (int(np.prod(fan_out)), rank), file).T
            a = names.take(tensors, f"{key}{i}_b", (rank, int(np.prod(fan_in))), file).T
            arrays["a" + ours] = jnp.asarray(a.reshape(*fan_in, rank))
            arrays["b" + ours] = jnp.asarray(b.reshape(rank, *fan_out))
        delta[path] = LoHa(**arrays, axes=Axes.of(site), ranks=(rank,), scales=(alphas[path] / rank,))
    ranks = {p: one.ranks[0] for p, one in delta.items()}
    adapter = get("loha")(
        rank=names.uniform(ranks), alpha=names.uniform(alphas), targets=[names.exact(p) for p in delta]
    )
    return adapter, delta
