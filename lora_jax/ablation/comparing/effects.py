"""What each axis does by itself, averaged over the others: the answer that a full grid gives and single arms do not.

In a grid of ranks x layers every rank was trained with every choice of layers. The mean over layers of one rank is less
noisy than any of its arms, and there are few ranks to compare, so few seeds say more. It is an average: where one axis
changes what another does, the cells themselves are the answer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.ablation import results
from lora_jax.ablation.comparing import axes, groups
from lora_jax.ablation.comparing.groups import Comparison, Group
from lora_jax.ablation.comparing.statistics import LEVEL
from lora_jax.ablation.results import Row

Cells = Mapping[str, Mapping[tuple[str, ...], Mapping[Any, float]]]


def compare(
    rows: Sequence[Row], metric: str, base: Mapping[str, Any], better: str | None = None, level: float = LEVEL
) -> list[Comparison]:
    """Every value of every axis against the baseline's value of it; all of them are one family for Holm's method.

    Args:
      rows: of `results.read_results`.
      metric: a column.
      base: the baseline's axes.
      better: 'max' or 'min' where the metric's name does not say.
      level: of significance.

    Returns:
      Comparisons of averages, whose groups hold one mean per seed; none where less than two axes vary.
    """
    names = axes.free(rows)
    made = groups.grouped(rows, metric)
    pairs = []
    for name in names if len(names) > 1 else []:
        averages = _averages(made, name, [other for other in names if other != name])
        own = averages.get(results.encode(base.get(name)))
        if own is not None:
            pairs += [(group, own) for group in averages.values() if group is not own]
    return groups.compare(pairs, metric, better, level) if pairs else []


def _averages(made: Sequence[Group], name: str, others: Sequence[str]) -> dict[str, Group]:
    """For each value of the axis its mean per seed, over the cells that every value of it has with every seed."""
    cells: dict[str, dict[tuple[str, ...], Group]] = {}
    for group in made:
        rest = tuple(results.encode(group.axes[other]) for other in others)
        cells.setdefault(results.encode(group.axes[name]), {})[rest] = group
    seeds = list(dict.fromkeys(seed for group in made for seed in group.values))
    combos = [
        combo for combo in next(iter(cells.values())) if all(_whole(own.get(combo), seeds) for own in cells.values())
    ]
    if len(combos) < 2 or not seeds:  # the average of one cell is that cell
        return {}
    out = {}
    for value, own in cells.items():
        chosen = [own[combo] for combo in combos]
        means = {seed: float(np.mean([group.values[seed] for group in chosen])) for seed in seeds}
        first = chosen[0].axes[name]
        note = f"over {len(combos)} of {axes.title(others[0])}" if len(others) == 1 else f"over {len(combos)} cells"
        out[value] = Group(f"{axes.title(name)}={axes.text(first)}, mean {note}", {name: first}, means)
    return out


def _whole(group: Group | None, seeds: Sequence[Any]) -> bool:
    return group is not None and all(seed in group.values for seed in seeds)


def table(compared: Sequence[Comparison]) -> list[Row]:
    """One row per comparison, for effects.csv."""
    out = []
    for one in compared:
        test, over = one.paired, one.first.interval()
        [(axis, value)] = one.first.axes.items()
        row: Row = {"axis": axis, "value": value, "baseline": one.second.axes[axis], "mean": over.mean, "n": over.n}
        row |= {"difference": test.difference, "half": test.half, "p": test.p, "p_holm": one.p, "verdict": one.verdict}
        out.append({**row, "averaged": one.first.label.partition(", mean ")[2]})
    return out
