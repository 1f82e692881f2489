"""LoKr in PEFT's format: `lokr_w1` or `lokr_w1_a`, `lokr_w1_b`, likewise `lokr_w2`: the transposes of our arrays.

PEFT's w1 is (m_out, m_in), its split w1_a (m_out, r) and w1_b (r, m_in); whether there is a split follows from the
rank and the widths. It flattens (out, in) as we do each of fan_out and fan_in, so nothing is reordered.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import Adapter, get
from lora_jax.adapters.lokr import LoKr, factorization
from lora_jax.errors import UserError
from lora_jax.export import peft_modules as modules
from lora_jax.export import peft_names as names
from lora_jax.lift.weight import Axes

METHODS = ("lokr",)
_OFF = {"use_effective_conv2d": (False,)}  # PEFT's dropouts act in training alone and are not carried over


def write(adapter: Adapter, delta: Mapping[str, LoKr], base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The config's own fields, and the tensors.

    Raises:
      UserError: a stack of layers, or an embedding.
    """
    modules.check_plain(delta, LoKr, base, "lokr")
    own = names.module_keys(delta, base)
    tensors = {}
    for path, one in delta.items():
        for i in "12":
            key = f"{names.PREFIX}{own[path]}.lokr_w{i}"
            # Theirs is the transpose, so their first factor is our second.
            for suffix, name in (("", f"w{i}"), ("_a", f"b{i}"), ("_b", f"a{i}")):
                if getattr(one, name) is not None:
                    tensors[key + suffix] = np.asarray(getattr(one, name)).T
    options = {name: adapter.spec[name] for name in ("decompose_factor", "decompose_both")}
    return {**options, "rank_dropout_scale": False, **modules.rank_fields(delta, own, base)}, tensors


def read(config: Mapping[str, Any], tensors: dict, base: Any, file: Path) -> tuple[Adapter, dict[str, LoKr]]:
    """The adapter and its delta; consumed tensors are removed.

    Raises:
      UserError: an option that we do not have, a missing or misshaped tensor, targets that select nothing.
    """
    modules.check_config(config, file, ("r", "alpha", "target_modules"), _OFF)
    factor, both = config.get("decompose_factor", -1), config.get("decompose_both", False)
    if factor != -1 and (type(factor) is not int or factor < 1):
        raise UserError(f"{file}: decompose_factor={factor!r}: expected -1 or an integer of at least 1")
    delta, alphas = {}, {}
    for path, module in modules.selected(config, base, file).items():
        site = base.sites[path]
        rank, alphas[path] = modules.numbers(config, module)
        widths = (int(np.prod(site.dims(axes))) for axes in (site.fan_in, site.fan_out))
        into, out = (factorization(n, factor) for n in widths)
        key = names.PREFIX + module + ".lokr_w"
        arrays: dict[str, Any] = {}
        for i, own in enumerate(zip(into, out, strict=True)):
            split = rank < max(own) / 2 and (i == 1 or both)
            arrays |= _matrix(tensors, f"{key}{i + 1}", str(i + 1), own, rank if split else None, file)
        delta[path] = LoKr(**arrays, axes=Axes.of(site), ranks=(rank,), scales=(alphas[path] / rank,))
    ranks = {p: one.ranks[0] for p, one in delta.items()}
    adapter = get("lokr")(
        rank=names.uniform(ranks), alpha=names.uniform(alphas), targets=[names.exact(p) for p in delta],
        decompose_factor=factor, decompose_both=both,
    )  # fmt: skip
    return adapter, delta


def _matrix(tensors: dict, key: str, i: str, own: tuple[int, int], rank: int | None, file: Path) -> dict[str, Any]:
    """One of the two matrices, whole or split."""
    n_in, n_out = own
    wanted = {"w" + i: (key, (n_out, n_in))}
    if rank is not None:
        wanted = {"b" + i: (key + "_a", (n_out, rank)), "a" + i: (key + "_b", (rank, n_in))}
    got = {name: names.take(tensors, k, shape, file) for name, (k, shape) in wanted.items()}
    return {name: jnp.asarray(np.ascontiguousarray(value.T)) for name, value in got.items()}
