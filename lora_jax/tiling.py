"""Which matrices of a model are laid out in tiles while it writes text, token by token, and the laying out.

See `lift.tiled` for what a tile is good for. A weight with a low-rank update is merged on the way, so text from an
adapted model is written as fast as from its base.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import trees
from lora_jax.errors import UserError
from lora_jax.lift import is_adapted, lift
from lora_jax.lift.tiled import MOST_ROWS, TILE, tiled
from lora_jax.models.base import Base

ENOUGH = 32  # turns; what the layout costs is saved in about ten
LARGEST = 2**30  # bytes of the matrices that may be in memory twice


def choose(base: Base, variables: Mapping[str, Any], rows: int, turns: int) -> tuple[str, ...]:
    """Paths of the matrices to lay out: float32 on one CPU, multiplied with few rows, often enough; () if none.

    Args:
      base: the model.
      variables: its weights, or what `adapter.bind` returned.
      rows: that are computed together.
      turns: how many tokens are written at most.
    """
    leaves = [x for x in jax.tree.leaves(variables) if isinstance(x, jax.Array)]
    one_cpu = all(len(x.devices()) == 1 and next(iter(x.devices())).platform == "cpu" for x in leaves)
    if not one_cpu or rows > MOST_ROWS or turns < ENOUGH:
        return ()
    flat = trees.flatten(variables, is_leaf=is_adapted)
    paths = tuple(path for path, site in base.sites.items() if path in flat and _fits(flat[path], site))
    return paths if sum(4 * math.prod(base.sites[path].shape) for path in paths) <= LARGEST else ()


def lay_out(variables: Mapping[str, Any], paths: Sequence[str]) -> Any:
    """The variables with these matrices in tiles, merged with their updates."""
    flat = trees.flatten(variables, is_leaf=is_adapted)
    new = {path: tiled(_dense(flat[path]), path) for path in paths}
    return trees.replace(variables, new, is_leaf=is_adapted)


def able(apply: Callable, variables: Mapping[str, Any]) -> Callable:
    """The function as it takes tiles; one that is given adapted weights takes them already."""
    held = any(map(is_adapted, jax.tree.leaves(variables, is_leaf=is_adapted)))
    return apply if held else _lifted(apply)


@functools.lru_cache(maxsize=64)
def _lifted(apply: Callable) -> Callable:
    """One function per model, so that it can key the compiled program."""
    return lift(apply, unused="allow")


def _fits(weight: Any, site: Any) -> bool:
    linear = (site.batch, site.fan_in, site.fan_out, set(site.uses)) == ((), (0,), (1,), {"linear"})
    if not linear or site.shape[1] % TILE:
        return False
    if not is_adapted(weight):
        return weight.dtype == jnp.float32
    if is_adapted(weight.base) or weight.base.dtype != jnp.float32:  # quantized, or several adapters
        return False
    try:
        jax.eval_shape(_dense, weight)
    except UserError:  # it acts on the layer's output
        return False
    return True


def _dense(weight: Any) -> jax.Array:
    return weight.dense() if is_adapted(weight) else weight
