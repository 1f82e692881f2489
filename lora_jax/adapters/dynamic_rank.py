"""Dynamic rank distribution, the other method called DoRA: `W + scale * sum_i c_i A_i B_i`, pruned part by part.

Mao, Huang, Guan, Bao, Mo, Xu (2024), "DoRA: Enhancing Parameter-Efficient Fine-Tuning with Dynamic Rank Distribution",
ACL 2024, arXiv:2405.17357. Each rank-one part has a coefficient c_i that starts at zero. A part's score is its share of
the update's Frobenius norm, averaged over time, and the parts with the lowest scores of all sites are pruned by setting
their coefficients to zero. (Weight decomposition, which is called DoRA as well, is another method.)

Where we differ from the authors' code: a pruned part stays pruned (`revive` lets it train on and come back, as there),
the number of parts at the end is met exactly, and the penalty stays on after the last pruning.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.base import Adapter, batch_dims, draw, entry, json_ready, per_site
from lora_jax.adapters.parts import budget
from lora_jax.adapters.parts.gated import Gated, Plan, choose_parts, gated_weight, live_at_first
from lora_jax.adapters.parts.ranks import check_dropout, check_word
from lora_jax.errors import UserError
from lora_jax.sites import Site

_TINY = 1e-12  # below any norm that matters; the first update's norm is zero


@entry(meta=("ranks", "budget", "scales"))
class DynamicRank(Gated):
    """One site's parts: `e` are the coefficients c."""


def dynamic_rank(
    rank: Any = 8,
    alpha: Any = 8,
    *,
    init_rank: Any = None,
    targets: Any = None,
    layers: Any = "all",
    dropout: float = 0.0,
    penalty_weight: float = 0.1,
    beta: float = 0.9,
    start: float = 0.15,
    end: float = 0.5,
    interval: int = 100,
    revive: bool = False,
    total_steps: int | None = None,
) -> Adapter:
    """Low-rank adaptation whose rank-one parts are pruned during training.

    Args:
      rank: parts per weight at the end of training, on average over the selected weights; an integer or rules.
      alpha: the scale is alpha over the rank at the start.
      init_rank: parts per weight at the start, likewise; None: 1.5 times `rank`, rounded up, as far as a weight's size
        allows.
      targets, layers: as in `lora`.
      dropout: of the activation before A, in [0, 1); on where `bind` is given a key.
      penalty_weight: of the mean variance within the columns of A and the rows of B (eta of the 'dimensional
        equilibrium modulator'); 0 is off.
      beta: of the scores' moving average, from 0 to below 1.
      start: steps before the first pruning; below 1 a fraction of all (rounded down).
      end: the step of the last pruning, likewise.
      interval: steps between prunings.
      revive: a pruned part goes on training and may come back until the last pruning, as in the authors' code.
      total_steps: of the run; None: filled in by `fit`.

    Returns:
      An Adapter. Its first output equals the base's exactly. `lora_jax.adapters.parts.gated.rank_pattern(delta)` tells
      which parts live.

    Raises:
      UserError: as `lora` does; a schedule that leaves no step for pruning.
    """
    check_dropout(dropout)
    check_word("dynamic_rank", "revive", revive, (True, False))
    budget.check_numbers({"beta": beta}, {"start": start, "end": end}, interval)
    budget.check_weight("penalty_weight", penalty_weight)
    spec = json_ready(
        method="dynamic_rank", rank=rank, alpha=alpha, init_rank=init_rank, targets=targets, layers=layers,
        dropout=dropout, penalty_weight=penalty_weight, beta=beta, start=start, end=end, interval=interval,
        revive=revive, total_steps=total_steps,
    )  # fmt: skip

    def choose(sites):
        return choose_parts(
            sites, method="dynamic_rank", rank=rank, init_rank=init_rank, alpha=alpha, targets=targets, layers=layers
        )

    def weight(base, one, place):
        return gated_weight(base, one, place, dropout)

    def wrap(tx):
        total = budget.check_steps(total_steps, "dynamic_rank")

        def watch(grads, delta, updated, seen):
            del grads, delta
            now = scores(updated)
            return {path: beta * old + (1 - beta) * now[path] for path, old in seen.items()}

        return budget.allocating(
            tx, lambda delta: schedule(delta, total, start, end, interval),
            start=lambda delta: {path: jnp.zeros_like(one.e) for path, one in delta.items()},
            watch=watch, score=lambda seen: seen, revive=revive,
        )  # fmt: skip

    def penalty(delta):
        return penalty_weight * mean_variance(delta)

    return per_site(
        spec, choose=choose, make=_make, weight=weight, penalty=penalty if penalty_weight else None, wrap=wrap
    )


def _make(key: jax.Array, leaf: Any, site: Site, plan: Plan) -> DynamicRank:
    """A and B uniform within sqrt(6 / fan), where B's fan is the rank at the start, as the authors' code draws them."""
    del leaf
    batch, r = batch_dims(site), max(plan.ranks)
    key_a, key_b = jax.random.split(key)
    fan_in = site.dims(site.fan_in)
    own = np.maximum(np.asarray(plan.ranks, np.float32), 1).reshape(batch)
    a = draw(key_a, batch, r, _uniform, fan_in) * float(np.sqrt(6.0 / np.prod(fan_in)))
    b = draw(key_b, batch, r, _uniform, site.dims(site.fan_out))
    b = b * np.sqrt(6.0 / own).astype(np.float32).reshape(own.shape + (1,) * (b.ndim - own.ndim))
    return DynamicRank.of(a, b, site, plan)


def _uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return (jax.random.uniform(key, shape) - 0.5) * 2.0


def _flat(one: DynamicRank) -> tuple[jax.Array, jax.Array]:
    """Both factors with a part per row: (n, rank, fan_in) and (n, rank, fan_out)."""
    r = one.e.shape[-1]
    a_NxRxI = jnp.swapaxes(one.a.reshape(len(one.ranks), -1, r), 1, 2)
    return a_NxRxI, one.b.reshape(len(one.ranks), r, -1)


def scores(delta: Mapping[str, DynamicRank]) -> dict[str, jax.Array]:
    """Each part's share of its update's norm, `||c_i A_i B_i|| / ||sum_j c_j A_j B_j||` (Frobenius), nothing formed.

    Returns:
      `{path: (*batch, rank)}`.
    """
    out = {}
    for path, one in delta.items():
        (a, b), e_NxR = _flat(one), one.e.reshape(len(one.ranks), -1)
        inner_NxRxR = jnp.einsum("nri,nsi->nrs", a, a) * jnp.einsum("nro,nso->nrs", b, b)
        whole_N = jnp.sqrt(jnp.maximum(jnp.einsum("nr,ns,nrs->n", e_NxR, e_NxR, inner_NxRxR), 0.0))
        parts_NxR = jnp.abs(e_NxR) * jnp.linalg.norm(a, axis=2) * jnp.linalg.norm(b, axis=2)
        out[path] = (parts_NxR / (whole_N[:, None] + _TINY)).reshape(one.e.shape)
    return out


def mean_variance(delta: Mapping[str, DynamicRank]) -> jax.Array:
    """The mean over all parts of the variance of a column of A and of a row of B (n - 1 in the denominator)."""
    total, count = jnp.zeros(()), 0
    for one in delta.values():
        live = live_at_first(one.ranks, one.e.shape).reshape(len(one.ranks), -1)
        for factor in _flat(one):
            n = factor.shape[-1]
            total = total + jnp.sum(jnp.where(live, jnp.var(factor, axis=2) * (n / max(1, n - 1)), 0.0))
            count += int(live.sum())
    return total / count


def schedule(delta: Mapping[str, Any], total: int, start: float, end: float, interval: int) -> budget.Schedule:
    """The pruning of a delta over a run: of `b0 - bT` parts the share `((t - start) / (end - start))**3` is dead.

    Args:
      delta: of `dynamic_rank`; only its static fields are read.
      total: steps of the run.
      start, end, interval: as in `dynamic_rank`.

    Raises:
      UserError: no step is left between `start` and `end`.
    """
    first = max(1, budget.as_steps(start, total, "start"))
    last = min(budget.as_steps(end, total, "end"), total)
    if first >= last:
        raise UserError(
            f"start={start!r} and end={end!r} leave none of the run's {total} steps for pruning; move them apart or "
            "train longer"
        )
    begun, left = (sum(sum(getattr(one, f)) for one in delta.values()) for f in ("ranks", "budget"))
    done = (np.arange(first, last + 1) - first) / (last - first)
    budgets = begun - ((begun - left) * done**3).astype(int)
    return budget.Schedule(first, last, first, interval, last, budget.falls(budgets, first, begun))
