"""Which sites get which rank and which scale: the rules that all methods with a rank share."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import UserError, did_you_mean
from lora_jax.sites import Site, Sites, in_layers, parse_rules, select

SCALINGS = {
    "alpha/r": lambda alpha, r: alpha / r,
    "alpha/sqrt(r)": lambda alpha, r: alpha / math.sqrt(r),
    "alpha": lambda alpha, r: alpha,
}
# What a site is told: one rank and one scale per layer of a stack, or one of each.
Ranks = tuple[list[int], list[float]]


def default_targets(sites: Sites) -> list[str]:
    """Every matrix except embeddings and a task head."""
    return [p for p, s in sites.items() if s.is_matrix and "embedding" not in s.uses and s.role != "head"]


def choose_ranks(
    sites: Sites,
    *,
    method: str,
    targets: Any,
    layers: Any,
    rank: Any,
    alpha: Any,
    scaling: str = "alpha/r",
    bounded: bool = True,
) -> dict[str, Ranks]:
    """Selects sites and gives each its rank and scale.

    Args:
      sites: from `find_sites`.
      method: for messages.
      targets, layers: as in `lora`.
      rank: an integer, or (pattern, rank) rules; 0 leaves a site, or a layer of a stack, out.
      alpha: a number, or rules.
      scaling: a name in `SCALINGS`.
      bounded: whether a rank above min(fan_in, fan_out) is a mistake.

    Returns:
      `{path: (ranks, scales)}` of the sites with a rank.

    Raises:
      UserError: nothing to adapt, a weight that is no matrix, rank 0 everywhere or above min(fan_in, fan_out).
    """
    flags = in_layers(sites, select(sites, targets, default_targets(sites)), layers)
    paths = check_matrices(sites, list(flags), method)
    ranks, alphas = parse_rules(rank, "rank", sites, paths), parse_rules(alpha, "alpha", sites, paths)
    out = {}
    for p in paths:
        spread = flags[p] if len(flags[p]) == len(ranks[p]) else flags[p] * len(ranks[p])
        own = [check_rank(r, sites[p], bounded) if keep else 0 for r, keep in zip(ranks[p], spread, strict=True)]
        scales = [SCALINGS[scaling](_number(a), r) if r else 0.0 for a, r in zip(alphas[p], own, strict=True)]
        out[p] = (own, scales)
    if not any(any(own) for own, _ in out.values()):
        raise UserError(f"rank={rank!r} is 0 at every selected site, so nothing would train; give a rank of at least 1")
    return {p: option for p, option in out.items() if any(option[0])}


def check_matrices(sites: Sites, paths: list[str], method: str) -> list[str]:
    """The paths themselves.

    Raises:
      UserError: there are none, or one of them is no matrix.
    """
    if not paths:
        raise UserError(
            f"{method} finds nothing to adapt by itself: no product and no convolution uses any of the {len(sites)} "
            "weights (embeddings and a head do not count). Give targets"
        )
    wrong = [p for p in paths if not sites[p].is_matrix]
    if wrong:
        raise UserError(
            f"{method} needs weights that a product uses; {wrong[0]!r} of shape {sites[wrong[0]].shape} is not one. "
            "Narrow the targets, for example to '.*/kernel'"
        )
    return paths


def check_rank(rank: Any, site: Site, bounded: bool = True) -> int:
    """The rank itself.

    Raises:
      UserError: not a whole number from 0 to min(fan_in, fan_out), or from 0 where it is not bounded.
    """
    if type(rank) is not int or rank < 0:
        raise UserError(
            f"rank must be an integer of at least 0 (a rule may give it by pattern), got {rank!r} for {site.path!r}"
        )
    if bounded and rank > site.max_rank:
        raise UserError(
            f"rank {rank} is above min(fan_in, fan_out) = {site.max_rank} of {site.path!r} with shape {site.shape}; "
            f"a rank of at most {site.max_rank} says everything there is to say"
        )
    return rank


def check_word(method: str, name: str, value: Any, known: Any) -> None:
    """Raises if an option is not one of the words it may be."""
    if value not in known:
        raise UserError(f"{method}: {name}={value!r} is unknown; {did_you_mean(str(value), map(str, known))}")


def check_number(method: str, name: str, value: Any, least: float = -math.inf) -> None:
    """Raises if an option is not a finite number, or below the least."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
        bound = "" if least == -math.inf else f" of at least {least:g}"
        raise UserError(f"{method}: {name}={value!r}: expected a number{bound}")


def check_dropout(dropout: Any) -> None:
    """Raises if a dropout rate is none, or leaves nothing to train on."""
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
        raise UserError(f"dropout={dropout!r}: expected 0 <= dropout < 1 (at 1 nothing would reach the adapter)")


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"alpha must be a number or (pattern, number) rules, got {value!r}")
    return float(value)


def batch_of(one: Any) -> tuple[int, ...]:
    """Sizes of an entry's batch axes, told by the first of its arrays."""
    first = next(name for name in one.layout if getattr(one, name) is not None)
    return tuple(getattr(one, first).shape[: len(one.axes.batch)])


def scale_at(one: Any, scale: Any) -> jax.Array:
    """The scale at a site, (*batch,) float32: the entry's own, or what `bind` was given instead."""
    own = np.asarray(one.scales, np.float32).reshape(batch_of(one)) if scale is None else scale
    return jnp.broadcast_to(jnp.asarray(own, jnp.float32), batch_of(one))


def keys_at(one: Any, key: Any, dropout: float) -> Any:
    """Random keys of dropout, one per batch index, or None where it is off."""
    return None if key is None or dropout == 0.0 else jax.random.split(key, batch_of(one))


def idle(one: Any) -> int:
    """Leading slices of a stack that nothing acts on: whose `ranks` are zero throughout."""
    batch = batch_of(one)
    if not batch or 0 not in one.axes.batch[:1]:
        return 0
    live = np.asarray(one.ranks).reshape(batch[0], -1).any(axis=1)
    return int(np.argmax(live)) if live.any() else 0


def times(factor: jax.Array, scale: jax.Array) -> jax.Array:
    """An array whose leading dimensions are the batch, times one number per batch index."""
    return factor * scale.reshape(scale.shape + (1,) * (factor.ndim - scale.ndim))
