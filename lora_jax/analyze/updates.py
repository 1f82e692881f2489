"""What an adapter adds to each weight, as matrices, and their singular value decomposition.

An update is seen as N matrices of shape (fan_in, fan_out): one for each index of the site's batch axes (stacked layers,
experts), a single one elsewhere. LoRA's is decomposed from its factors: with A = Q_A R_A and B^T = Q_B R_B, the
singular values of s A B are those of the small core s R_A R_B^T, so no matrix of the weight's size is formed. Every
other method's update is merge - base, both in float32.

Everything here runs on the host, in numpy: the factors in float64, dense updates in float32.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax import trees
from lora_jax.adapters import Adapter
from lora_jax.adapters.base import check_paths
from lora_jax.adapters.lora import LoRA
from lora_jax.errors import UserError, did_you_mean
from lora_jax.lift.weight import AdaptedWeight, Axes, is_adapted


class SVD(NamedTuple):
    """`u diag(s) v^T` of N matrices.

    Attributes:
      u: (N, fan_in, R), orthonormal columns: directions of the input that the update reads.
      s: (N, R), descending.
      v: (N, fan_out, R), orthonormal columns: directions of the output that it writes.
    """

    u: np.ndarray
    s: np.ndarray
    v: np.ndarray


def update(adapter: Adapter, delta: Mapping[str, Any], variables: Any, path: str) -> np.ndarray:
    """What the adapter adds to one weight: merge - base in float32 (what it adds to the layer's bias is not in it).

    Args:
      adapter: the adapter.
      delta: its delta.
      variables: the base.
      path: of the site.

    Returns:
      float32 of the weight's shape.

    Raises:
      UserError: the delta has no such site, or the method cannot be merged.
    """
    _check_site(delta, path)
    return dense_updates(adapter, delta, variables, [path])[path]


def svd(adapter: Adapter, delta: Mapping[str, Any], variables: Any, path: str) -> SVD:
    """The singular value decomposition of one site's update; arguments and errors as of `update`."""
    _check_site(delta, path)
    one = delta[path]
    if factored(one):
        return thin_svd(*factors(one))
    return dense_svd(matrices(update(adapter, delta, variables, path), one.axes))


def dense_updates(
    adapter: Adapter, delta: Mapping[str, Any], variables: Any, paths: list[str]
) -> dict[str, np.ndarray]:
    """The updates of several sites with a single merge, which holds two float32 copies of these weights."""
    leaves = trees.flatten(variables, is_leaf=is_adapted)
    check_paths(paths, leaves)
    # In float32, whatever the base's dtype: else a small update would be lost in the rounding of the sum.
    base = {path: dense_float32(leaves[path]) for path in paths}
    merged = trees.flatten(adapter.merge(trees.replace(variables, base, is_leaf=is_adapted), dict(delta)), is_adapted)
    return {path: np.asarray(merged[path], np.float32) - np.asarray(base[path]) for path in paths}


def dense_float32(leaf: Any) -> Any:
    """A weight, quantized or not, as a float32 array."""
    return jnp.asarray(leaf.dense() if isinstance(leaf, AdaptedWeight) else leaf, jnp.float32)


def factored(one: Any) -> bool:
    """True for an entry whose update is its scale times A B - A0 B0, and nothing else."""
    arrays = {f.name for f in dataclasses.fields(one) if hasattr(getattr(one, f.name), "dtype")}
    return type(one) is LoRA and arrays <= {"a", "b", "a0", "b0"}


def factors(one: LoRA) -> tuple[np.ndarray, np.ndarray]:
    """A as (N, fan_in, R) and scale * B as (N, R, fan_out), float64; a start that is subtracted stands behind them."""
    a, b, scale = raw_factors(one)
    if one.a0 is not None:
        a0, b0, _ = raw_factors(dataclasses.replace(one, a=one.a0, b=one.b0))
        a, b = np.concatenate([a, a0], axis=2), np.concatenate([b, -b0], axis=1)
    return a, scale * b


def raw_factors(one: LoRA) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A as (N, fan_in, rank), B as (N, rank, fan_out) and the scale as (N, 1, 1), float64."""
    depth = len(one.axes.batch)
    count = math.prod(one.a.shape[:depth])
    a = np.asarray(one.a, np.float64).reshape(count, -1, one.a.shape[-1])
    b = np.asarray(one.b, np.float64).reshape(count, one.b.shape[depth], -1)
    return a, b, np.asarray(one.scales, np.float64).reshape(count, 1, 1)


def widest(one: LoRA) -> int:
    """min(fan_in, fan_out): a larger rank says nothing more."""
    depth = len(one.axes.batch)
    return min(math.prod(one.a.shape[depth:-1]), math.prod(one.b.shape[depth + 1 :]))


def update_ranks(one: LoRA) -> tuple[int, ...]:
    """The rank that each of the N updates can have: twice the factors' where a start is subtracted (PiSSA, OLoRA)."""
    return one.ranks if one.a0 is None else tuple(min(2 * r, widest(one)) for r in one.ranks)


def thin_svd(a_NxIxR: np.ndarray, b_NxRxO: np.ndarray) -> SVD:
    """The decomposition of A B from the factors alone."""
    _check_finite(a_NxIxR, b_NxRxO)
    left, core_a = np.linalg.qr(a_NxIxR)
    right, core_b = np.linalg.qr(b_NxRxO.swapaxes(1, 2))
    u, s, vt = np.linalg.svd(core_a @ core_b.swapaxes(1, 2), full_matrices=False)
    return SVD(left @ u, s, right @ vt.swapaxes(1, 2))


def dense_svd(w_NxIxO: np.ndarray) -> SVD:
    """The decomposition of dense matrices."""
    _check_finite(w_NxIxO)
    u, s, vt = np.linalg.svd(w_NxIxO, full_matrices=False)
    return SVD(u, s, vt.swapaxes(1, 2))


def matrices(weight: Any, axes: Axes) -> np.ndarray:
    """A weight of any number of axes as (N, fan_in, fan_out); one that no product uses (a bias) has fan_in 1."""
    weight = np.asarray(weight, np.float32)
    named = (*axes.batch, *axes.fan_in, *axes.fan_out)
    rest = tuple(i for i in range(weight.ndim) if i not in named)
    count, rows = (math.prod(weight.shape[i] for i in part) for part in (axes.batch, axes.fan_in))
    return weight.transpose(*named, *rest).reshape(count, rows, -1)


def _check_site(delta: Mapping[str, Any], path: str) -> None:
    if path not in delta:
        raise UserError(f"the delta has no site {path!r}; {did_you_mean(path, delta)}")


def _check_finite(*arrays: np.ndarray) -> None:
    if not all(np.isfinite(x).all() for x in arrays):
        raise UserError("an update holds NaN or infinite values, so it has no spectrum: did the training diverge?")
