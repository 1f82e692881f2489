"""A budget of ranks over all sites: how many parts may live at each update, which do, and the optimizer to enforce it.

All rank-one parts of all sites (`parts.gated`) compete for one budget that falls while training; a part that loses has
its gate set to zero. Layers of a stack and experts count as weights of their own. Everything is traced: the program is
compiled once for the whole schedule, and nothing is read back.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax.adapters.parts.gated import live_at_first
from lora_jax.errors import UserError


def as_steps(value: float, total: int, name: str) -> int:
    """A number of steps, or below 1 a fraction of all steps (rounded down)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise UserError(f"{name}={value!r}: give a number of steps, or a fraction of all steps below 1")
    if value >= 1 and value != int(value):
        raise UserError(f"{name}={value!r}: a number of steps must be whole; a fraction of all steps is below 1")
    return int(value * total + 1e-9) if value < 1 else int(value)


def check_numbers(betas: Mapping[str, Any], steps: Mapping[str, Any], interval: Any) -> None:
    """Raises unless moving averages are from 0 to below 1, steps are steps, and the interval is a whole number."""
    for name, beta in betas.items():
        if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta < 1:
            raise UserError(f"{name}={beta!r}: expected a number from 0 to below 1")
    for name, value in steps.items():
        as_steps(value, 1, name)
    if type(interval) is not int or interval < 1:
        raise UserError(f"interval={interval!r}: expected a whole number of steps, at least 1")


def check_weight(name: str, value: Any) -> None:
    """Raises unless the weight of a penalty is a number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise UserError(f"{name}={value!r}: expected a number of at least 0")


def check_steps(total: Any, method: str) -> int:
    """The length of the run, which only the run itself knows.

    Raises:
      UserError: it is missing or not a whole number.
    """
    if total is None:
        raise UserError(
            f"{method} lowers its budget over the run and has to know how long that is: give {method}(total_steps=...) "
            "(lora_jax.train.fit fills it in by itself)"
        )
    if type(total) is not int or total < 1:
        raise UserError(f"total_steps={total!r}: expected a whole number of at least 1")
    return total


class Schedule(NamedTuple):
    """When parts are pruned; updates are counted from 1.

    Attributes:
      first: before it nothing is pruned.
      last: the last time; what lives then lives to the end.
      origin, interval: in between, whenever `interval` divides the update's number less `origin`.
      watched: the last update whose scores count.
      falls: ascending; at update `falls[i]` the budget becomes smaller than what it was at first, less i.
    """

    first: int
    last: int
    origin: int
    interval: int
    watched: int
    falls: np.ndarray

    def prunes(self, step: jax.Array) -> jax.Array:
        """Whether an update is followed by an allocation."""
        regular = (step >= self.first) & (step < self.last) & ((step - self.origin) % self.interval == 0)
        return regular | (step == self.last)

    def pruned(self, step: jax.Array) -> jax.Array:
        """How many parts are to be dead."""
        return jnp.sum(jnp.asarray(self.falls) <= step)


def falls(budgets: np.ndarray, first: int, most: int) -> np.ndarray:
    """The updates at which a budget falls, from the budget at each update.

    Exact where the cube of a float32 would be off by one, and as small as the number of parts.

    Args:
      budgets: (updates,) falling integers, of the updates from `first` on.
      first: number of the first of them.
      most: the budget before.
    """
    levels = np.arange(most, budgets[-1], -1)
    return (first + np.searchsorted(-budgets, -levels, side="right")).astype(np.int32)


class BudgetState(NamedTuple):
    """State of `allocating`, arrays throughout.

    Attributes:
      inner: of the wrapped optimizer.
      step: updates made.
      live: {path: (*batch, rank) bool}.
      seen: what the method remembers of the parts.
    """

    inner: Any
    step: jax.Array
    live: dict[str, jax.Array]
    seen: Any


def allocating(
    tx: Any,
    schedule: Callable[[Mapping[str, Any]], Schedule],
    *,
    start: Callable[[Any], Any],
    watch: Callable[[Any, Any, Any, Any], Any],
    score: Callable[[Any], Mapping[str, jax.Array]],
    revive: bool,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that only the best parts live.

    Args:
      tx: the optimizer.
      schedule: delta -> Schedule, from its static fields.
      start: delta -> what is remembered at first.
      watch: (gradients, delta, updated delta, remembered) -> remembered.
      score: remembered -> `{path: (*batch, rank)}`; the larger, the better.
      revive: a pruned part goes on training and may come back until the last allocation; else it stays dead.
    """

    def init(params):
        first = {path: jnp.asarray(live_at_first(one.ranks, one.e.shape)) for path, one in params.items()}
        return BudgetState(tx.init(params), jnp.zeros((), jnp.int32), first, start(params))

    def update(grads, state, params=None, **extra):
        updates, inner = tx.update(grads, state.inner, params, **extra)
        when, step = schedule(params), state.step + 1
        new = optax.apply_updates(params, updates)
        seen = watch(grads, params, new, state.seen)
        seen = jax.tree.map(lambda now, old: jnp.where(step <= when.watched, now, old), seen, state.seen)
        able = {path: jnp.asarray(live_at_first(one.ranks, one.e.shape)) for path, one in params.items()}
        total = sum(sum(one.ranks) for one in params.values())
        best = keep_best(score(seen), able if revive else state.live, total - when.pruned(step))
        live = {path: jnp.where(when.prunes(step), best[path], old) for path, old in state.live.items()}
        free = revive & ~(when.prunes(step) | (step >= when.last))
        updates = {path: _without(one, params[path], live[path] | free) for path, one in updates.items()}
        return updates, BudgetState(inner, step, live, seen)

    return optax.GradientTransformationExtraArgs(init, update)


def keep_best(
    scores: Mapping[str, jax.Array], able: Mapping[str, jax.Array], budget: jax.Array
) -> dict[str, jax.Array]:
    """The `budget` best of all parts that are able to live; exactly so many, the earlier ones where scores are equal.

    Returns:
      `{path: bool}` of the scores' shapes.
    """
    flat = jnp.concatenate([jnp.where(able[p], s, -jnp.inf).reshape(-1) for p, s in scores.items()])
    place = jnp.argsort(jnp.argsort(-flat, stable=True))
    parts = jnp.split(place < budget, np.cumsum([s.size for s in scores.values()])[:-1])
    return {p: part.reshape(s.shape) & able[p] for (p, s), part in zip(scores.items(), parts, strict=True)}


def _without(update: Any, one: Any, live: jax.Array) -> Any:
    """The update that takes dead gates to exactly zero."""
    return dataclasses.replace(update, e=jnp.where(live, update.e, -one.e))
