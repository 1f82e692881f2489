"""The best group and the next one, example by example: do they differ beyond the choice of examples?

Asked seed by seed, over the predictions that the arms left behind (`comparing.predictions`). Seeds and examples are two
questions: the tests over seeds say what another seed would do on these examples, these tests what the same two trained
adapters would do on others.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax import records
from lora_jax.ablation import results
from lora_jax.ablation.comparing import predictions, statistics, verdicts
from lora_jax.ablation.comparing.groups import Group
from lora_jax.ablation.comparing.statistics import LEVEL
from lora_jax.ablation.results import Row
from lora_jax.errors import UserError

SHOWN = 5  # seeds that the sentence lists


class ByExample(NamedTuple):
    """Two groups.

    Attributes:
      first, second: the best and the next.
      split: whose examples.
      seeds: {seed: first against second}.
    """

    first: Group
    second: Group
    split: str
    seeds: dict[Any, statistics.McNemar | statistics.Bootstrap]


def leaders(made: Sequence[Group], better: str) -> list[Group]:
    """Groups with a result, the best mean first."""
    sign = -1 if better == "max" else 1
    return sorted((g for g in made if g.values), key=lambda g: sign * g.interval().mean)


def compare(folder: Path, rows: Sequence[Row], made: Sequence[Group], metric: str, better: str) -> ByExample | None:
    """The best group against the next one.

    Args:
      folder: of the grid.
      rows: that the groups are made of.
      made: the groups.
      metric: a column of a split, 'dev.accuracy'.
      better: 'max' or 'min'.

    Returns:
      None where fewer than two groups have a result, no seed of both has predictions of the same examples, or these
      have no such metric of single examples.
    """
    first, second, *_ = [*leaders(made, better), None, None]
    split, _, name = metric.partition(".")
    if first is None or second is None or not metric.startswith(results.METRICS):
        return None
    found: dict[Any, Any] = {}
    for seed in [seed for seed in first.values if seed in second.values]:
        lines = [_lines(folder, rows, group.axes, seed, split) for group in (first, second)]
        if all(lines):
            try:
                found[seed] = predictions.compare(*lines, name)
            except UserError:  # a metric of the whole split (bleu), or other data than its sibling's
                continue
    return ByExample(first, second, split, found) if found else None


def sentence(told: ByExample, level: float = LEVEL) -> str:
    """What came of it."""
    adjusted = statistics.holm([one.p for one in told.seeds.values()])
    real = sum(p is not None and p <= level for p in adjusted)
    count, exact = len(told.seeds), isinstance(next(iter(told.seeds.values())), statistics.McNemar)
    test = "McNemar's exact test" if exact else "a paired bootstrap over the examples"
    family = f", Holm over {count} seeds" if count > 1 else ""
    told_apart = f"can be told apart in {real} of {count} seed{'s' * (count > 1)}" if real else "cannot be told apart"
    each = [f"seed {seed}: {_numbers(one, p, level)}"
            for (seed, one), p in zip(told.seeds.items(), adjusted, strict=True)]  # fmt: skip
    more = f"; and {count - SHOWN} more" if count > SHOWN else ""
    return (
        f"Example by example on {told.split}, the best ({told.first.label}) and the next ({told.second.label}) "
        f"{told_apart} ({test}{family}; {'; '.join(each[:SHOWN])}{more}). This asks about other examples, not about "
        "other seeds, and no p knows that the two were picked after looking."
    )


def _numbers(one: Any, p: float | None, level: float) -> str:
    shown = verdicts.p_value(1.0 if p is None else p, level)
    if isinstance(one, statistics.McNemar):
        return f"of {one.n} only the best has {one.only_first} right, only the next {one.only_second}, {shown}"
    half = (one.high - one.low) / 2
    low, high = verdicts.number(one.low, half), verdicts.number(one.high, half)
    return f"difference {verdicts.number(one.difference, half)}, from {low} to {high}, {shown}"


def _lines(
    folder: Path, rows: Sequence[Row], axes: Mapping[str, Any], seed: Any, split: str
) -> list[Mapping[str, Any]]:
    """The predictions of one arm; none where it left none."""
    same = lambda row: all(results.encode(row.get(n)) == results.encode(v) for n, v in axes.items())  # noqa: E731
    arm = next(
        (row["arm"] for row in rows if row.get("seed") == seed and row.get("status") == "done" and same(row)), ""
    )
    path = folder / "runs" / str(arm) / "predictions" / f"{split}.jsonl"
    return list(records.read_jsonl(path)) if arm and path.exists() else []
