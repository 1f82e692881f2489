"""How many directions an update has, and how much of the base lies along them.

Effective rank: Roy and Vetterli (2007), "The effective rank: a measure of effective dimensionality", EUSIPCO, eq. 4.
Amplification: Hu et al. (2021), "LoRA", arXiv:2106.09685, section 7.3 and table 7.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax import trees
from lora_jax.adapters import Adapter
from lora_jax.analyze.updates import SVD, dense_float32, factored, matrices, svd, update_ranks
from lora_jax.lift.weight import is_adapted

_NOISE = 1e-6  # singular values below this share of the largest are rounding


def singular_values(adapter: Adapter, delta: Mapping[str, Any], variables: Any, path: str) -> np.ndarray:
    """Singular values of one site's update.

    Returns:
      (*batch, R), descending; zero beyond the rank that a layer of a stack has.

    Raises:
      UserError: the delta has no such site, or the method cannot be merged.
    """
    values = svd(adapter, delta, variables, path).s
    batch = [np.shape(trees.flatten(variables, is_adapted)[path])[i] for i in delta[path].axes.batch]
    return values.reshape(*batch, -1)


def effective_rank(s: np.ndarray) -> float:
    """exp of the entropy of the normalized singular values: R when all are equal, 1 for one direction, 0 for none.

    Args:
      s: (R,) singular values, in any order.
    """
    total = float(np.sum(s))
    if total == 0.0:
        return 0.0
    p = np.asarray(s, np.float64)[np.asarray(s) > 0] / total
    return float(np.exp(-np.sum(p * np.log(p))))


def stable_rank(s: np.ndarray) -> float:
    """||D||_F^2 / ||D||_2^2: never above the rank, and blind to small directions; 0 for a zero update.

    Args:
      s: (R,) singular values, in any order.
    """
    largest = float(np.max(s, initial=0.0))
    return 0.0 if largest == 0.0 else float(np.sum((np.asarray(s, np.float64) / largest) ** 2))


class Amplification(NamedTuple):
    """How strongly an update amplifies what the base hardly uses: one column of table 7.

    Attributes:
      rank: r, how many directions were taken.
      update_norm: ||dW||_F.
      along_update: ||U^T W V||_F with U, V the top r singular vectors of dW.
      along_base: the same with those of W: the most that any r directions can hold.
      along_random: the same with random orthonormal U and V.
      factor: update_norm / along_update; nan for a zero update.
    """

    rank: int
    update_norm: float
    along_update: float
    along_base: float
    along_random: float
    factor: float


def amplification(
    adapter: Adapter, delta: Mapping[str, Any], variables: Any, path: str, *, rank: int | None = None, seed: int = 0
) -> list[Amplification]:
    """The amplification factor of one site, with its two references.

    Args:
      adapter: the adapter.
      delta: its delta.
      variables: the base.
      path: of the site.
      rank: r; None: LoRA's own rank, for any other method the update's effective rank, rounded.
      seed: of the random directions.

    Returns:
      One for every index of the batch axes, in their order; a single one for an unstacked site.

    Raises:
      UserError: the delta has no such site, or the method cannot be merged.
    """
    found = svd(adapter, delta, variables, path)
    leaf = trees.flatten(variables, is_leaf=is_adapted)[path]
    w_NxIxO = matrices(dense_float32(leaf), delta[path].axes)
    own = update_ranks(delta[path]) if factored(delta[path]) else None
    draw = np.random.default_rng([seed, trees.stable_hash(path)])
    out = []
    for n, w in enumerate(w_NxIxO):
        r = directions(found.s[n], rank if rank is not None else None if own is None else own[n])
        along, factor = along_update(w, SVD(*(x[n] for x in found)), r)
        norm = float(np.linalg.norm(found.s[n]))
        out.append(Amplification(r, norm, along, along_base(w, r), along_random(w, r, draw), factor))
    return out


def directions(s: np.ndarray, rank: int | None) -> int:
    """How many singular vectors to take: the rank given, or the rounded effective rank; none that are rounding."""
    live = int(np.sum(s > _NOISE * np.max(s, initial=0.0)))
    return min(live, max(1, round(effective_rank(s))) if rank is None else rank)


def along_update(w_IxO: np.ndarray, found: SVD, r: int) -> tuple[float, float]:
    """(||U^T W V||_F with the top r singular vectors of the update, ||dW||_F over it); nan where there are none."""
    if r == 0:
        return float("nan"), float("nan")
    along = float(np.linalg.norm(found.u[:, :r].T @ w_IxO @ found.v[:, :r]))
    norm = float(np.linalg.norm(found.s))
    return along, norm / along if along > 0 else float("inf")


def along_base(w_IxO: np.ndarray, r: int) -> float:
    """||U^T W V||_F with W's own top r singular vectors: the root of its r largest squared singular values."""
    return float(np.linalg.norm(np.linalg.svd(w_IxO, compute_uv=False)[:r]))


def along_random(w_IxO: np.ndarray, r: int, draw: np.random.Generator) -> float:
    """||U^T W V||_F with random orthonormal U and V of r columns."""
    u, v = (np.linalg.qr(draw.standard_normal((n, r)))[0] for n in w_IxO.shape)
    return float(np.linalg.norm(u.T @ w_IxO @ v))
