"""OFT in PEFT's format: `oft_R.weight` (blocks, b (b - 1) / 2), the entries above the diagonals row by row, as ours.

PEFT's two forms turn opposite ways: its polynomial approaches (I + Q)(I - Q)^-1, as the paper and we have it, but its
exact form is (I - Q)(I + Q)^-1. So the exact form is stored with the opposite sign.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import Adapter, get
from lora_jax.adapters.oft import OFT, USUAL_TERMS, terms_of
from lora_jax.errors import UserError
from lora_jax.export import peft_modules as modules
from lora_jax.export import peft_names as names
from lora_jax.lift.weight import Axes

METHODS = ("oft",)
KEY = ".oft_R.weight"
_OFF = {"coft": (False,), "bias": ("none",), "fan_in_fan_out": (False,)}


def write(adapter: Adapter, delta: Mapping[str, OFT], base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The config's own fields, and the tensors.

    Raises:
      UserError: a stack of layers, an embedding, or blocks of which neither the size nor the number is one for all.
    """
    modules.check_plain(delta, OFT, base, "oft")
    own, terms = names.module_keys(delta, base), terms_of(adapter.spec["cayley"])
    sign = 1 if terms else -1
    tensors = {names.PREFIX + own[p] + KEY: sign * np.asarray(one.q) for p, one in delta.items()}
    config = {
        **_blocks(delta, base), "block_share": adapter.spec["share_blocks"],
        "use_cayley_neumann": bool(terms), "num_cayley_neumann_terms": terms or USUAL_TERMS,
        "coft": False, "bias": "none", "fan_in_fan_out": False, "module_dropout": 0.0, "init_weights": True,
        "target_modules": names.targets(list(own.values()), base),
    }  # fmt: skip
    return config, tensors


def _blocks(delta: Mapping[str, OFT], base: Any) -> dict[str, int]:
    """PEFT has one size or one number for all modules."""
    sizes = {path: one.size for path, one in delta.items()}
    counts = {path: _width(base.sites[path]) // size for path, size in sizes.items()}
    if len(set(sizes.values())) == 1:
        return {"oft_block_size": next(iter(sizes.values())), "r": 0}
    if len(set(counts.values())) == 1:
        return {"oft_block_size": 0, "r": next(iter(counts.values()))}
    raise UserError(
        f"PEFT's oft has one block size or one number of blocks for all modules; these have sizes "
        f"{sorted(set(sizes.values()))} and numbers {sorted(set(counts.values()))}. Give block_size or blocks to train "
        "such an adapter, or save it with lora_jax.save"
    )


def read(config: Mapping[str, Any], tensors: dict, base: Any, file: Path) -> tuple[Adapter, dict[str, OFT]]:
    """The adapter and its delta; consumed tensors are removed.

    Raises:
      UserError: an option that we do not have, a missing or misshaped tensor, targets that select nothing.
    """
    # `module_dropout` acts in training alone (PEFT 0.21.2 makes the layer and never calls it) and is not carried over.
    modules.check_config(config, file, ("target_modules", "oft_block_size", "r", "use_cayley_neumann"), _OFF)
    terms = config.get("num_cayley_neumann_terms", USUAL_TERMS) if config["use_cayley_neumann"] else 0
    shared = config.get("block_share", False)
    delta, counts = {}, {}
    for path, module in modules.selected(config, base, file).items():
        width = _width(base.sites[path])
        size = _size(config, width, path, file)
        counts[path] = width // size
        shape = (1 if shared else counts[path], size * (size - 1) // 2)
        q = names.take(tensors, names.PREFIX + module + KEY, shape, file)
        delta[path] = OFT(q=jnp.asarray(q if terms else -q), axes=Axes.of(base.sites[path]), size=size, live=(True,))
    sizes = {path: one.size for path, one in delta.items()}
    adapter = get("oft")(
        block_size=names.uniform(sizes), targets=[names.exact(p) for p in delta], share_blocks=shared,
        cayley=f"neumann:{terms}" if terms else "exact",
    )  # fmt: skip
    return adapter, delta


def _width(site: Any) -> int:
    return math.prod(site.dims(site.fan_in))


def _size(config: Mapping[str, Any], width: int, path: str, file: Path) -> int:
    """The size of a module's blocks: what the config says, or the nearest that divides, as PEFT takes it."""
    wanted = config["oft_block_size"] or config["r"]
    if type(wanted) is not int or wanted < 1 or bool(config["oft_block_size"]) == bool(config["r"]):
        raise UserError(f"{file}: expected one of oft_block_size and r, got {config['oft_block_size']}, {config['r']}")
    divisors = [d for d in range(1, width + 1) if width % d == 0]
    near = min(divisors, key=lambda d: (abs(d - wanted), d))  # of two as near the smaller
    size = near if config["oft_block_size"] else width // near
    if size < 2:
        raise UserError(f"{file}: {path!r} of fan_in {width} would have blocks of 1, which have no parameters")
    return size
