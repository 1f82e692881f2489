"""AdaLoRA: `W + scale * P diag(e) Q`, an update in the form of a singular value decomposition whose rank is allocated.

Zhang, Chen, Bukharin, Karampatziakis, He, Cheng, Chen, Zhao (2023), "AdaLoRA: Adaptive Budget Allocation for
Parameter-Efficient Fine-Tuning", arXiv:2303.10512: eq. 3 (the form), eq. 4 (the penalty that keeps P and Q orthogonal),
eq. 7 to 10 (importance of a triplet), Algorithm 1, and the cubic budget of its appendix.

Here P is `a` (*fan_in, rank), Q is `b` (rank, *fan_out) and e starts at zero. The budget is read as the authors' code
has it: all of it until `tinit`, the target from `total_steps - tfinal` on, and in between a cube that meets both (as
printed, with `t - t_i - t_f` in the numerator, the formula meets neither). Importance is no longer updated in the last
phase, in which the ranks are fixed.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.base import Adapter, batch_dims, draw, entry, json_ready, per_site
from lora_jax.adapters.parts import budget
from lora_jax.adapters.parts.gated import Gated, Plan, choose_parts, gated_weight, live_at_first
from lora_jax.adapters.parts.ranks import check_dropout, check_word
from lora_jax.errors import UserError
from lora_jax.sites import Site

ORTHOGONALITIES = ("squared", "mean")
IMPORTANCES = ("before", "after")


@entry(meta=("ranks", "budget", "scales"))
class AdaLoRA(Gated):
    """One site's triplets: `a` is P, `e` the singular values, `b` Q."""


def adalora(
    rank: Any = 8,
    alpha: Any = 16,
    *,
    init_rank: Any = None,
    targets: Any = None,
    layers: Any = "all",
    dropout: float = 0.0,
    orth_weight: float = 0.1,
    orthogonality: str = "squared",
    importance: str = "before",
    beta1: float = 0.85,
    beta2: float = 0.85,
    tinit: float = 0.1,
    tfinal: float = 0.5,
    interval: int = 10,
    total_steps: int | None = None,
) -> Adapter:
    """Adaptive budget allocation.

    Args:
      rank: triplets per weight at the end of training, on average over the selected weights (PEFT's `target_r`); an
        integer or rules as in `lora`.
      alpha: the scale is alpha over the rank at the start, which it keeps when triplets are pruned.
      init_rank: triplets per weight at the start, an integer or rules; None: 1.5 times `rank`, as far as a weight's
        size allows.
      targets, layers: as in `lora`.
      dropout: of the activation before P, in [0, 1); on where `bind` is given a key.
      orth_weight: of the penalty; 0 is off.
      orthogonality: 'squared', the paper's sum of squared Frobenius norms of P'P - I and QQ' - I over the weights, or
        'mean', PEFT's mean of the norms over all P and Q.
      importance: of the values 'before' the update that the gradient was taken at (Algorithm 1), or 'after' it, as the
        authors' code and PEFT have it.
      beta1, beta2: of the moving averages of sensitivity and uncertainty, from 0 to below 1.
      tinit: steps before the first pruning; below 1 a fraction of all.
      tfinal: steps after the last pruning, likewise.
      interval: steps between prunings; a pruned triplet trains on in between and may come back.
      total_steps: of the run; None: filled in by `fit`.

    Returns:
      An Adapter. Its first output equals the base's exactly. `lora_jax.adapters.parts.gated.rank_pattern(delta)` tells
      which triplets live.

    Raises:
      UserError: as `lora` does; a schedule that leaves no step for pruning.
    """
    check_dropout(dropout)
    check_word("adalora", "orthogonality", orthogonality, ORTHOGONALITIES)
    check_word("adalora", "importance", importance, IMPORTANCES)
    budget.check_numbers({"beta1": beta1, "beta2": beta2}, {"tinit": tinit, "tfinal": tfinal}, interval)
    budget.check_weight("orth_weight", orth_weight)
    spec = json_ready(
        method="adalora", rank=rank, alpha=alpha, init_rank=init_rank, targets=targets, layers=layers, dropout=dropout,
        orth_weight=orth_weight, orthogonality=orthogonality, importance=importance, beta1=beta1, beta2=beta2,
        tinit=tinit, tfinal=tfinal, interval=interval, total_steps=total_steps,
    )  # fmt: skip

    def choose(sites):
        return choose_parts(
            sites, method="adalora", rank=rank, init_rank=init_rank, alpha=alpha, targets=targets, layers=layers
        )

    def weight(base, one, place):
        return gated_weight(base, one, place, dropout)

    def wrap(tx):
        total = budget.check_steps(total_steps, "adalora")
        return budget.allocating(
            tx, lambda delta: schedule(delta, total, tinit, tfinal, interval),
            start=_no_sensitivity, watch=_watch(importance, beta1, beta2), score=_score, revive=True,
        )  # fmt: skip

    def penalty(delta):
        return orth_weight * orthogonal_penalty(delta, orthogonality)

    return per_site(spec, choose=choose, make=_make, weight=weight, penalty=penalty if orth_weight else None, wrap=wrap)


def _make(key: jax.Array, leaf: Any, site: Site, plan: Plan) -> AdaLoRA:
    del leaf
    batch, r = batch_dims(site), max(plan.ranks)
    key_a, key_b = jax.random.split(key)
    a = draw(key_a, batch, r, jax.random.normal, site.dims(site.fan_in))
    b = draw(key_b, batch, r, jax.random.normal, site.dims(site.fan_out))
    return AdaLoRA.of(0.02 * a, 0.02 * b, site, plan)


def orthogonal_penalty(delta: Mapping[str, AdaLoRA], form: str = "squared") -> jax.Array:
    """How far P and Q are from orthogonal (eq. 4), a scalar.

    Args:
      delta: of `adalora`.
      form: 'squared' or 'mean', as in `adalora`. Weights of rank 0 do not count.
    """
    squares = []
    for one in delta.values():
        live = live_at_first(one.ranks, one.e.shape).reshape(-1, one.e.shape[-1])
        n, r = live.shape
        a_NxIxR, b_NxRxO = one.a.reshape(n, -1, r), one.b.reshape(n, r, -1)
        eye_NxRxR = live[:, None, :] * np.eye(r, dtype=np.float32)
        for gram_NxRxR in (jnp.einsum("nir,nis->nrs", a_NxIxR, a_NxIxR), jnp.einsum("nro,nso->nrs", b_NxRxO, b_NxRxO)):
            squares.append(jnp.sum((gram_NxRxR - eye_NxRxR) ** 2, axis=(1, 2))[live.any(axis=1)])
    square = jnp.concatenate(squares)
    # The root has no derivative where a factor is exactly orthogonal.
    return jnp.sum(square) if form == "squared" else jnp.mean(jnp.sqrt(jnp.maximum(square, 1e-30)))


def schedule(delta: Mapping[str, Any], total: int, tinit: float, tfinal: float, interval: int) -> budget.Schedule:
    """The cubic budget of a delta over a run.

    Args:
      delta: of `adalora`; only its static fields are read.
      total: steps of the run.
      tinit, tfinal, interval: as in `adalora`.

    Raises:
      UserError: no step is left between `tinit` and `tfinal`.
    """
    begin, last = budget.as_steps(tinit, total, "tinit"), total - budget.as_steps(tfinal, total, "tfinal")
    if begin >= last:
        raise UserError(
            f"tinit={tinit!r} and tfinal={tfinal!r} leave none of the run's {total} steps for pruning; lower one of "
            "them or train longer"
        )
    first = sum(sum(one.ranks) for one in delta.values())
    end = sum(sum(one.budget) for one in delta.values())
    left = 1 - (np.arange(begin + 1, last + 1) - begin) / (last - begin)
    budgets = ((first - end) * left**3 + end).astype(int)
    return budget.Schedule(begin + 1, last, 0, interval, last - 1, budget.falls(budgets, begin + 1, first))


class Sensitivity(NamedTuple):
    """Moving averages, each of the delta's structure: of |w dL/dw| (eq. 9) and of its distance from that (eq. 10)."""

    mean: Any
    spread: Any


def _no_sensitivity(delta: Any) -> Sensitivity:
    return Sensitivity(jax.tree.map(jnp.zeros_like, delta), jax.tree.map(jnp.zeros_like, delta))


def _watch(importance: str, beta1: float, beta2: float) -> Any:
    def watch(grads, delta, updated, seen):
        values = delta if importance == "before" else updated
        now = jax.tree.map(lambda w, g: jnp.abs(w * g), values, grads)
        mean = jax.tree.map(lambda old, i: beta1 * old + (1 - beta1) * i, seen.mean, now)
        away = jax.tree.map(lambda i, m: jnp.abs(i - m), now, mean)
        return Sensitivity(mean, jax.tree.map(lambda old, u: beta2 * old + (1 - beta2) * u, seen.spread, away))

    return watch


def _score(seen: Sensitivity) -> dict[str, jax.Array]:
    """Importance of every triplet (eq. 7): of its e, and the means over its column of P and its row of Q."""
    out = {}
    for path, one in jax.tree.map(jnp.multiply, seen.mean, seen.spread).items():
        n_batch, n = one.e.ndim - 1, one.e.ndim
        of_a = jnp.mean(one.a, axis=tuple(range(n_batch, one.a.ndim - 1)))
        of_b = jnp.mean(one.b, axis=tuple(range(n, one.b.ndim)))
        out[path] = one.e + of_a + of_b
    return out
