"""Which matrices of a model are laid out anew while it writes text, token by token, and the laying out.

A weight with a low-rank update is merged, so that text from an adapted model is written as fast as from its base. Where
the CPU gains by it the matrices come in tiles as well; see `lift.tiled` for what these are good for.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
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
ZEN_5 = 26  # the "cpu family" of AMD's processors of 2024
_CPU = Path("/proc/cpuinfo")


@functools.cache
def in_tiles() -> bool:
    """Whether tiles gain anything on this CPU: everywhere but on AMD's Zen 5 and later, by what was measured on two.

    With 2 cores and jax 0.10.2: on Zen 4 a product of 8 x 512 and 512 x 512 takes 44 us in tiles and 96 in rows; Zen 5
    reads rows as fast, and laying out costs a twelfth of a text (30M Llama, 8 rows, 1,235 tokens/s against 1,064).
    """
    try:
        lines = _CPU.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return True
    said = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    family = said.get("cpu family", "")
    return not (said.get("vendor_id") == "AuthenticAMD" and family.isdecimal() and int(family) >= ZEN_5)


def choose(base: Base, variables: Mapping[str, Any], rows: int, turns: int) -> tuple[str, ...]:
    """Paths of the matrices to lay out: float32 on one CPU, multiplied with few rows, often enough; () if none.

    Where there are no tiles, those that have an update to be merged.

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
    """The variables with these matrices merged with their updates, and in tiles if these gain anything."""
    flat = trees.flatten(variables, is_leaf=is_adapted)
    new = {path: tiled(_dense(flat[path]), path) if in_tiles() else _dense(flat[path]) for path in paths}
    return trees.replace(variables, new, is_leaf=is_adapted)


def able(apply: Callable, variables: Mapping[str, Any]) -> Callable:
    """The function as it takes tiles; one that is given adapted weights takes them already."""
    held = any(map(is_adapted, jax.tree.leaves(variables, is_leaf=is_adapted)))
    return apply if held or not in_tiles() else _lifted(apply)


@functools.lru_cache(maxsize=64)
def _lifted(apply: Callable) -> Callable:
    """One function per model, so that it can key the compiled program."""
    return lift(apply, unused="allow")


def _fits(weight: Any, site: Any) -> bool:
    linear = (site.batch, site.fan_in, site.fan_out, set(site.uses)) == ((), (0,), (1,), {"linear"})
    if not linear or (in_tiles() and site.shape[1] % TILE):
        return False
    if not is_adapted(weight):
        return in_tiles() and weight.dtype == jnp.float32
    if is_adapted(weight.base) or weight.base.dtype != jnp.float32:  # quantized, or several adapters
        return False
    try:
        jax.eval_shape(_dense, weight)
    except UserError:  # it acts on the layer's output
        return False
    return True


def _dense(weight: Any) -> jax.Array:
    return weight.dense() if is_adapted(weight) else weight
