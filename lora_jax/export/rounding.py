"""Merging for export, and what it costs: a dense weight in bfloat16 cannot hold every update exactly.

A bfloat16 weight has 8 significant bits, so an update below a 256th of a weight may be rounded away whole. The adapter
kept beside its base has no such loss.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import trees
from lora_jax.adapters import Adapter
from lora_jax.analyze.updates import dense_float32
from lora_jax.errors import UserError
from lora_jax.lift.weight import is_adapted


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How much of each update the number format of the weights changed.

    Attributes:
      sites: `{path: ||round(W + d) - (W + d)||_F / ||d||_F}` for every site whose update d is not zero.
      dtype: of the merged weights (of several, that of the worst site).
    """

    sites: dict[str, float]
    dtype: str

    @property
    def largest(self) -> float:
        """Of the worst site; 0 where nothing was changed."""
        return max(self.sites.values(), default=0.0)

    @property
    def mean(self) -> float:
        """Over the sites."""
        return sum(self.sites.values()) / max(len(self.sites), 1)

    @property
    def worst(self) -> str | None:
        """Path of the site that lost most."""
        return max(self.sites, key=lambda path: self.sites[path], default=None)

    def __str__(self) -> str:
        if self.largest == 0.0:
            return f"merged in {self.dtype} without loss"
        return (
            f"merging into {self.dtype} changed the updates by {self.mean:.2%} of their norm on average, by "
            f"{self.largest:.2%} at most ({self.worst})"
        )


def merge(adapter: Adapter, delta: Mapping[str, Any], variables: Any) -> Any:
    """The dense variables of an adapted base, for a checkpoint.

    Args:
      adapter: the adapter.
      delta: its delta.
      variables: the base.

    Returns:
      The merged tree, in the base's dtypes.

    Raises:
      UserError: the method changes more than weights, so that no dense weight can stand for it.
    """
    method = adapter.spec.get("method")
    advice = "keep the base and the adapter apart: --format=peft where PEFT has the method, or the run's own adapter/"
    try:
        merged = adapter.merge(variables, dict(delta))
    except NotImplementedError:
        raise UserError(f"the method {method!r} cannot be merged into the weights of its base; {advice}") from None
    except UserError as error:
        raise UserError(
            f"the method {method!r} cannot be merged into the weights of its base: {error}; {advice}"
        ) from None
    left = [path for path, leaf in trees.flatten(merged, is_leaf=is_adapted).items() if is_adapted(leaf)]
    if found := [path for path in left if path in delta]:
        raise UserError(f"the method {method!r} left {found[0]!r} unmerged; {advice}")
    return merged


def rounding(adapter: Adapter, delta: Mapping[str, Any], variables: Any, merged: Any = None) -> Rounding:
    """Compares merged weights with the exact sums.

    Args:
      adapter: the adapter.
      delta: its delta.
      variables: the base.
      merged: what `merge` returned; None: merged here.

    Returns:
      A Rounding. Sums are taken in float32, so for a float32 base every entry is 0: that rounding is training's own.

    Raises:
      UserError: as of `merge`.
    """
    merged = merge(adapter, delta, variables) if merged is None else merged
    leaves, rounded = (trees.flatten(tree, is_leaf=is_adapted) for tree in (variables, merged))
    base = {path: dense_float32(leaf) for path, leaf in leaves.items() if rounded[path] is not leaf}
    sums = trees.flatten(merge(adapter, delta, trees.replace(variables, base, is_leaf=is_adapted)), is_leaf=is_adapted)
    sites = {}
    for path, weight in base.items():
        exact = np.asarray(sums[path], np.float32)
        size = _norm(exact - np.asarray(weight))
        if size > 0.0:
            sites[path] = _norm(np.asarray(rounded[path], np.float32) - exact) / size
    named = max(sites, key=lambda path: sites[path], default=next(iter(base), None))
    dtype = "float32" if named is None else jnp.dtype(rounded[named].dtype).name
    return Rounding(sites, dtype)


def _norm(x: np.ndarray) -> float:
    return math.sqrt(float(np.sum(np.square(x, dtype=np.float64))))
