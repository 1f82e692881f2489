"""Several adapters of one base as one: `cat` (exact), `linear` (same rank), `recombine` (best at a given rank).

    wanted update = sum_i weight_i * update_i

PEFT has these as `add_weighted_adapter` with `combination_type` 'cat', 'linear' and 'svd'. Weights trained in place (a
head) are combined exactly beside the factors: base + sum_i weight_i (trained_i - base).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import trees
from lora_jax.adapters import Adapter, get
from lora_jax.adapters.full import Full
from lora_jax.adapters.lora import LoRA
from lora_jax.analyze import parts
from lora_jax.analyze.truncate import check_rank
from lora_jax.analyze.updates import dense_float32, factors, raw_factors, widest
from lora_jax.errors import UserError
from lora_jax.lift.weight import is_adapted

Pairs = Sequence[tuple[Adapter, Mapping[str, Any]]]
Weighted = list[tuple[float, Any]]


def cat(pairs: Pairs, weights: Sequence[float] | None = None, *, variables: Any = None) -> parts.Pair:
    """The weighted sum of adapters, exactly: factors side by side, ranks add.

    Where the ranks add to more than min(fan_in, fan_out), the sum is written at that rank, which still holds all of it.

    Args:
      pairs: (adapter, delta) pairs of `lora`, alone or chained with parts trained in place; all for one base.
      weights: one number for each; None: 1 for each, the plain sum.
      variables: the base; needed where weights trained in place do not cancel it (their weights do not sum to 1).

    Returns:
      (adapter, delta), a plain lora with scale 1, chained with `full` where something was trained in place.

    Raises:
      UserError: other methods, deltas of different bases, or a base that is needed and not given.
    """
    return _combine(pairs, weights, variables, _cat)


def linear(
    pairs: Pairs, weights: Sequence[float] | None = None, *, variables: Any = None, exact: bool = False
) -> parts.Pair:
    """The weighted sum of the factors themselves, at the rank they share.

    Exact at a site where one adapter alone has factors, or where all have the same A (frozen, or shared) or the same B:
    then only the other factor is summed. Elsewhere it is PEFT's 'linear', A = sum_i sqrt(|w_i| s_i) A_i and
    B = sum_i sign(w_i) sqrt(|w_i| s_i) B_i, which adds the cross terms A_i B_j to the wanted update.

    Args:
      pairs: as of `cat`, with equal ranks wherever sites are shared.
      weights: as of `cat`.
      variables: as of `cat`.
      exact: raise where the result would not be exact.

    Returns:
      (adapter, delta) as of `cat`.

    Raises:
      UserError: as of `cat`; different ranks; with `exact`, a site without a shared factor.
    """
    return _combine(pairs, weights, variables, lambda path, items: _linear(path, items, exact))


def recombine(pairs: Pairs, rank: int, weights: Sequence[float] | None = None, *, variables: Any = None) -> parts.Pair:
    """The best approximation of the weighted sum by updates of a given rank (see `truncate`).

    Args:
      pairs: as of `cat`.
      rank: of the result, at least 1; exact at every site where the adapters' ranks add to no more.
      weights: as of `cat`.
      variables: as of `cat`.

    Returns:
      (adapter, delta) as of `cat`.

    Raises:
      UserError: as of `cat`, or a rank below 1.
    """
    check_rank(rank)
    return _combine(pairs, weights, variables, lambda path, items: parts.shorten(_cat(path, items), rank))


def _combine(pairs: Pairs, weights: Sequence[float] | None, variables: Any, how: Callable) -> parts.Pair:
    weights = _check(pairs, weights)
    low_rank: dict[str, Weighted] = {}
    in_place: dict[str, Weighted] = {}
    for weight, (adapter, delta) in zip(weights, pairs, strict=True):
        own, rest = parts.split(adapter, delta)
        for path, one in own.items():
            low_rank.setdefault(path, []).append((weight, one))
        for other, entries in rest:
            for path, one in entries.items():
                if type(one) is not Full:
                    raise UserError(
                        f"adapters of the method {other.spec['method']!r} cannot be combined (at {path!r}): only LoRA "
                        "factors and weights trained in place can. Merge them into the base one after the other instead"
                    )
                in_place.setdefault(path, []).append((weight, one))
    if both := sorted(low_rank.keys() & in_place.keys()):
        raise UserError(f"{both[0]!r} has LoRA factors in one adapter and is trained in place in another")
    combined = {path: how(path, _same_shapes(path, items)) for path, items in low_rank.items()}
    trained = {path: _in_place(path, items, variables) for path, items in in_place.items()}
    rest = [(get("full")(targets=[parts.exact(p) for p in trained]), trained)] if trained else []
    return parts.join(combined, rest, parts.dropout_of([a for a, _ in pairs]))


def _check(pairs: Pairs, weights: Sequence[float] | None) -> list[float]:
    if not pairs or not all(isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], Adapter) for p in pairs):
        raise UserError("give a list of (adapter, delta) pairs, at least one")
    chosen = [1.0] * len(pairs) if weights is None else [float(w) for w in weights]
    if len(chosen) != len(pairs):
        raise UserError(f"{len(chosen)} weights for {len(pairs)} adapters; give one for each")
    if not any(delta for _, delta in pairs):
        raise UserError("all of the deltas are empty: there is nothing to combine")
    return chosen


def _same_shapes(path: str, items: Weighted) -> Weighted:
    shapes = {(one.axes, one.a.shape[:-1], one.b.shape[len(one.axes.batch) + 1 :]) for _, one in items}
    if len(shapes) > 1:
        raise UserError(f"the adapters have factors of different shapes at {path!r}: are they for one base?")
    return items


def _cat(path: str, items: Weighted) -> LoRA:
    del path
    found = [(weight, one, *factors(one)) for weight, one in items]
    a, b = [], []
    for n in range(len(items[0][1].ranks)):
        live = [(w, x[n][:, : one.ranks[n]], y[n][: one.ranks[n]]) for w, one, x, y in found]
        a.append(np.concatenate([x for _, x, _ in live], axis=1))
        b.append(np.concatenate([w * y for w, _, y in live], axis=0))
    whole = parts.entry(a, b, items[0][1])
    most = widest(whole)
    return whole if max(whole.ranks) <= most else parts.shorten(whole, most)


def _linear(path: str, items: Weighted, exact: bool) -> LoRA:
    ranks = {one.ranks for _, one in items}
    if len(ranks) > 1:
        raise UserError(
            f"the adapters have the ranks {sorted(ranks)} at {path!r}; a linear sum needs equal ones: use cat"
        )
    one = items[0][1]
    raw = [(weight, *raw_factors(other)) for weight, other in items]
    found = [(weight * scale, a, b) for weight, a, b, scale in raw]
    a, b = found[0][1:]
    if all(np.array_equal(a, x) for _, x, _ in found):
        b = np.sum([w * y for w, _, y in found], axis=0)
    elif all(np.array_equal(b, y) for _, _, y in found):
        a = np.sum([w * x for w, x, _ in found], axis=0)
    elif exact:
        raise UserError(f"the linear sum is not exact at {path!r}: the adapters share neither A nor B; use cat")
    else:
        a = np.sum([np.sqrt(np.abs(w)) * x for w, x, _ in found], axis=0)
        b = np.sum([np.sign(w) * np.sqrt(np.abs(w)) * y for w, _, y in found], axis=0)
    return parts.entry([x[:, :r] for x, r in zip(a, one.ranks)], [y[:r] for y, r in zip(b, one.ranks)], one)


def _in_place(path: str, items: Weighted, variables: Any) -> Full:
    """base + sum of weight * (trained - base)."""
    total = sum(weight for weight, _ in items)
    whole = all(one.kept is None for _, one in items)
    base: Any = 0.0
    if not whole or abs(total - 1.0) > 1e-9:
        if variables is None:
            raise UserError(
                f"{path!r} was trained in place, and "
                + (f"its weights sum to {total:g}, not 1" if whole else "in some of its layers only")
                + ": the sum needs the base, give variables="
            )
        base = np.asarray(dense_float32(trees.flatten(variables, is_leaf=is_adapted)[path]), np.float64)
    value = (1.0 - total) * base + sum(weight * _value(one, base) for weight, one in items)
    return Full(value=jnp.asarray(value, jnp.float32), axes=items[0][1].axes)


def _value(one: Full, base: Any) -> np.ndarray:
    """A trained copy of the whole weight."""
    value = np.asarray(one.value, np.float64)
    if one.kept is None:
        return value
    whole = np.array(base)
    whole[(slice(None),) * int(one.layer_axis or 0) + (np.asarray(one.kept),)] = value
    return whole
