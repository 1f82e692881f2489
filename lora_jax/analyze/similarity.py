"""Do two adapters use the same directions? Hu et al. (2021), "LoRA", arXiv:2106.09685, section 7.2, eq. 4.

phi(i, j) = ||U_i^T V_j||_F^2 / min(i, j), where U_i holds the first i singular vectors of one and V_j the first j of
the other: 1 when the smaller space lies inside the larger, 0 when they are orthogonal, and max(i, j) / d on average for
random ones in d dimensions.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.adapters import Adapter
from lora_jax.adapters.base import is_shared
from lora_jax.analyze.report import layer_of, place, table, title
from lora_jax.analyze.spectrum import directions
from lora_jax.analyze.updates import SVD, factored, raw_factors, svd
from lora_jax.errors import UserError, did_you_mean
from lora_jax.sites import Sites

SIDES = ("fan_in", "fan_out")


def phi(u_DxI: np.ndarray, v_DxJ: np.ndarray) -> np.ndarray:
    """The grid of similarities of two ordered sets of orthonormal columns.

    Args:
      u_DxI: (D, I), orthonormal columns, the most important first.
      v_DxJ: (D, J), likewise.

    Returns:
      (I, J): entry (i - 1, j - 1) is phi(i, j), between 0 and 1.
    """
    # Every phi(i, j) is a sum over the leading i x j block of the squared cosines.
    sums = np.cumsum(np.cumsum((u_DxI.T @ v_DxJ) ** 2, axis=0), axis=1)
    i, j = np.indices(sums.shape) + 1
    return sums / np.minimum(i, j)


def subspace_similarity(
    delta: Mapping[str, Any], other: Mapping[str, Any], *, side: str = "fan_in"
) -> dict[str, list[np.ndarray]]:
    """Compares the factors of two LoRA deltas, as the paper does.

    Args:
      delta: one delta.
      other: another, for the same base; the ranks may differ.
      side: 'fan_in': singular vectors of A in the input's space (the paper's right-singular ones of its A); 'fan_out':
        of B in the output's space (its left-singular ones of B).

    Returns:
      `{path: grids}` for every site that both adapt with factors: one (rank, other's rank) grid of phi(i, j) for
      every index of the batch axes, a single one for an unstacked site.

    Raises:
      UserError: an unknown side, or no such site. For other methods take `phi` of the directions that `svd` finds.
    """
    if side not in SIDES:
        raise UserError(f"side={side!r}: {did_you_mean(side, SIDES)}")
    shared = [p for p in delta if p in other and factored(delta[p]) and factored(other[p])]
    if not shared:
        raise UserError(
            f"the two deltas ({len(delta)} and {len(other)} sites) share no site with LoRA factors; "
            "compare adapters of one base, with targets that overlap"
        )
    grids = {}
    for path in shared:
        one, two = (_factor_directions(d[path], side) for d in (delta, other))
        if len(one) != len(two) or one[0].shape[0] != two[0].shape[0]:
            raise UserError(f"the two deltas have factors of different shapes at {path!r}: are they for one base?")
        grids[path] = [phi(u, v) for u, v in zip(one, two, strict=True)]
    return grids


def _factor_directions(one: Any, side: str) -> list[np.ndarray]:
    """Left singular vectors of A, or right ones of B: (D, rank) for every batch index."""
    a, b, _ = raw_factors(one)
    value = a if side == "fan_in" else b.swapaxes(1, 2)
    u = np.linalg.svd(value, full_matrices=False)[0]
    return [u[n][:, :rank] for n, rank in enumerate(one.ranks)]


@dataclasses.dataclass(frozen=True)
class Similarity:
    """How alike two updates of one weight are.

    Attributes:
      path: of the site.
      index: position along its batch axes.
      layer: the layer, or None.
      role: the role, or None.
      rank: how many directions of the first update were compared.
      other: how many of the second.
      first_in: phi(1, 1) of the input's directions: the squared cosine of the strongest two.
      all_in: phi(rank, other) there.
      random_in: what random spaces would have there on average: max(rank, other) / fan_in.
      first_out: as first_in, of the output's directions.
      all_out: as all_in, of the output's directions.
      random_out: as random_in, of the output's directions.
    """

    path: str
    index: tuple[int, ...]
    layer: int | None
    role: str | None
    rank: int
    other: int
    first_in: float
    all_in: float
    random_in: float
    first_out: float
    all_out: float
    random_out: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` found; `print` it, or `pandas.DataFrame(found.rows)`."""

    rows: tuple[Similarity, ...]

    def __str__(self) -> str:
        head = ("site", "layer", "rank", "other", "in 1st", "in all", "chance", "out 1st", "out all", "chance")
        body = [
            (title(r.path, r.role, r.layer), "" if r.layer is None else str(r.layer), str(r.rank), str(r.other))
            + tuple(
                f"{x:.3f}"
                for x in (r.first_in, r.all_in, r.random_in, r.first_out, r.all_out, r.random_out)
            )
            for r in self.rows
        ]  # fmt: skip
        return table(head, body, left=1)


def compare(
    one: tuple[Adapter, Mapping[str, Any]], other: tuple[Adapter, Mapping[str, Any]], variables: Any, sites: Sites
) -> Comparison:
    """Compares the updates of two adapters of any methods, by the singular vectors of the updates themselves.

    Args:
      one: (adapter, delta).
      other: (adapter, delta) for the same base.
      variables: the base.
      sites: from `find_sites`.

    Raises:
      UserError: no site in common, or a method that cannot be merged.
    """
    shared = [p for p in one[1] if p in other[1] and not is_shared(p) and sites[p].is_matrix]
    if not shared:
        raise UserError(f"the two adapters have no matrix in common ({len(one[1])} and {len(other[1])} sites)")
    rows = []
    for path in shared:
        pair = [svd(adapter, delta, variables, path) for adapter, delta in (one, other)]
        for n, index in enumerate(place(sites[path])):
            rows.append(_similarity(pair[0], pair[1], n, path, index, sites))
    return Comparison(tuple(rows))


def _similarity(first: SVD, second: SVD, n: int, path: str, index: tuple[int, ...], sites: Sites) -> Similarity:
    i, j = directions(first.s[n], len(first.s[n])), directions(second.s[n], len(second.s[n]))
    values: list[float] = []
    for u, v in ((first.u[n], second.u[n]), (first.v[n], second.v[n])):
        grid = phi(u[:, :i], v[:, :j])
        empty = float("nan")  # a zero update has no directions
        values += [float(grid[0, 0]), float(grid[-1, -1]), max(i, j) / len(u)] if grid.size else [empty] * 3
    site = sites[path]
    return Similarity(path, index, layer_of(site, index), site.role, i, j, *values)
