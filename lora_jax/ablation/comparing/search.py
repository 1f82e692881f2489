"""Methods at their best: where a grid searches the learning rate too, each other choice is judged at its own best one.

The best learning rate is that with the best mean over seeds. The mean it was chosen by is too good for that reason
(Cawley & Talbot, 2010, JMLR 11: over-fitting in model selection), the more so the more rates were tried and the wider
the spread, so the report says by how much, and judges by the test split where the arms have it.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from lora_jax.ablation import results
from lora_jax.ablation.comparing import groups
from lora_jax.ablation.comparing.groups import Group
from lora_jax.ablation.results import Row

OVER = "train.learning_rate"


class Best(NamedTuple):
    """One choice at the best value of its search: the group there, what was tried, at which values arms failed.

    `edge` is 'lowest' or 'highest' where the best value is at an end of the search, 'only' where there was no search.
    """

    group: Group
    value: Any
    tried: tuple[Any, ...]
    edge: str = ""
    failed: tuple[Any, ...] = ()


def search(rows: Sequence[Row], metric: str, better: str, over: str = OVER) -> list[Best]:
    """The best value of `over` for every choice of the other axes; choices without a result are left out.

    A value with which every seed finished goes before one where some failed, however good those left are.

    Args:
      rows: of `results.read_results`.
      metric: to choose by; of the dev split.
      better: 'max' or 'min'.
      over: the column that was searched.
    """
    rest = [name for name in results.columns(rows) if results.is_axis(name) and name not in ("seed", over)]
    tried: dict[tuple, list[Group]] = {}
    for group in groups.grouped(rows, metric):
        tried.setdefault(_key(group.axes, rest), []).append(group)
    chosen = {key: found for key, made in tried.items() if (found := _choose(made, better)) is not None}
    kept = [row for row in rows if (c := chosen.get(_key(row, rest))) and _same(row.get(over), c.axes[over])]
    return [_best(group, chosen[key], tried[key], over)
            for group in (groups.grouped(kept, metric, rest) if kept else [])
            for key in [_key(group.axes, rest)]]  # fmt: skip


def at_best(rows: Sequence[Row], found: Sequence[Best], over: str = OVER) -> list[Row]:
    """The rows of the arms at their choice's best value, the searched column left out."""
    best = {_key({**one.group.axes, over: one.value}, [*one.group.axes, over]) for one in found}
    rest = list(found[0].group.axes) if found else []
    kept = [row for row in rows if _key(row, [*rest, over]) in best]
    return [{name: value for name, value in row.items() if name != over} for row in kept]


def optimism(found: Sequence[Best], rows: Sequence[Row], metric: str) -> float | None:
    """By how much choosing alone would raise a mean, were all tried values of a choice equally good.

    E[max of k standard normals] s / sqrt(n), with s the spread over seeds (root mean square over the groups), n the
    seeds and k the number of tried values: an upper bound, since what a seed does to all values alike cancels.

    Returns:
      None where no group has a spread.
    """
    over = [g.interval() for g in groups.grouped(rows, metric)]
    spread = [o.sd for o in over if o.sd is not None]
    if not spread or not found:
        return None
    seeds = min(one.group.interval().n for one in found)
    tries = max(len(one.tried) for one in found)
    return largest_of(tries) * math.sqrt(np.mean(np.square(spread))) / math.sqrt(max(1, seeds))


def largest_of(k: int) -> float:
    """The expectation of the largest of k standard normals: the integral of z k phi(z) Phi(z)^(k-1)."""
    z = np.linspace(-9.0, 9.0, 4001)
    density = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return float(np.trapezoid(z * k * density * special.ndtr(z) ** (k - 1), z))


def test_metric(rows: Sequence[Row], metric: str) -> str | None:
    """'test.accuracy' for 'dev.accuracy', if the arms have it: what the choice has not seen."""
    split, _, name = metric.partition(".")
    other = f"test.{name}"
    return other if split == "dev" and any(row.get(other) is not None for row in rows) else None


def _choose(made: Sequence[Group], better: str) -> Group | None:
    finished = [g for g in made if g.values]
    whole = [g for g in finished if not g.left_out]
    sign = 1 if better == "max" else -1
    return max(whole or finished, key=lambda g: sign * g.interval().mean, default=None)


def _best(group: Group, chosen: Group, made: Sequence[Group], over: str) -> Best:
    values = [g.axes[over] for g in made]
    ordered = all(isinstance(v, (int, float)) for v in values)
    tried = tuple(sorted(values) if ordered else values)
    value, edge = chosen.axes[over], ""
    if len(tried) < 2:
        edge = "only"
    elif ordered and value in (tried[0], tried[-1]):
        edge = "lowest" if value == tried[0] else "highest"
    return Best(group, value, tried, edge, tuple(g.axes[over] for g in made if g.left_out))


def _key(row: Any, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(results.encode(row.get(name)) for name in names)


def _same(a: Any, b: Any) -> bool:
    return results.encode(a) == results.encode(b)
