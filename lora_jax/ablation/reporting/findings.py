"""What a grid supports and what it does not, in plain sentences."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lora_jax.ablation.comparing import statistics, verdicts
from lora_jax.ablation.comparing.groups import Comparison, Group
from lora_jax.ablation.comparing.search import OVER, Best
from lora_jax.ablation.comparing.statistics import LEVEL
from lora_jax.ablation.reporting import by_example
from lora_jax.ablation.reporting.by_example import ByExample

PROPORTIONS = ("accuracy", "exact_match")


class Told(NamedTuple):
    """What the sentences are about.

    Attributes:
      metric: what the groups' values are.
      better: 'max' or 'min'.
      made: the groups that are judged: at their best learning rate where it was searched.
      base: the one of them that the others are compared with.
      compared: those comparisons.
      found: the search, of which `chosen_by` was the metric; empty without one.
      chosen_by: a column.
      optimism: of `search.optimism`.
      examples: in the split of the metric, if known.
      axes: all that vary.
      effects: each axis by itself, averaged over the others.
      failed: arms without a result.
      missing: arms that have not run.
      by_example: the best group against the next on the examples, where predictions are kept.
    """

    metric: str
    better: str
    made: Sequence[Group]
    base: Group | None
    compared: Sequence[Comparison]
    found: Sequence[Best]
    chosen_by: str
    optimism: float | None
    examples: int | None
    axes: Sequence[str]
    effects: Sequence[Comparison]
    failed: int
    missing: int
    by_example: ByExample | None = None


def supports(told: Told, level: float = LEVEL) -> list[str]:
    """What can be said."""
    out = [best(told.made, told.better, level)]
    if told.by_example is not None:
        out.append(by_example.sentence(told.by_example, level))
    if told.compared and told.base is not None:
        out.append(against(told.compared, told.base, told.better, level))
    if told.effects:
        out.append(by_axis(told.effects, told.better, level))
    if told.base is not None:
        seeds = max(1, len(told.base.values))
        floor = statistics.noise_floor(list(told.base.values.values()), seeds, level)
        if floor.difference is not None:
            out.append(f"Noise floor, from the baseline's seeds: {verdicts.noise(floor, seeds, level)}.")
    return [sentence for sentence in out if sentence]


def best(made: Sequence[Group], better: str, level: float = LEVEL) -> str:
    """The best mean, and how many of the others can be told from it.

    The best was picked after looking, so the family is that of all pairs, any of which could have come up.
    """
    finished = [g for g in made if g.values]
    if len(finished) < 2:
        return ""
    top = by_example.leaders(finished, better)[0]
    pairs = list(itertools.combinations(finished, 2))
    adjusted = statistics.holm([_paired(a, b, level).p for a, b in pairs])
    with_top = [p for (a, b), p in zip(pairs, adjusted) if top in (a, b)]
    told = sum(p is not None and p <= level for p in with_top)
    head = f"The best mean is that of {top.label}: {verdicts.mean(top.interval(level))}. "
    if all(p is None for p in with_top):
        return head + "Whether it differs from any other cannot be told without at least 2 seeds that differ."
    family = f"Holm over all {len(pairs)} pairs, since the best was picked after looking"
    rest = len(with_top) - told
    if len(with_top) == 1:
        return head + ("It can be told from the other." if told else "It cannot be told from the other.")
    return head + f"Of the {len(with_top)} others, {told} can be told from it and {rest} cannot ({family})."


def _paired(a: Group, b: Group, level: float) -> statistics.Paired:
    shared = [seed for seed in a.values if seed in b.values]
    return statistics.paired([a.values[s] for s in shared], [b.values[s] for s in shared], level)


def against(compared: Sequence[Comparison], base: Group, better: str, level: float = LEVEL) -> str:
    """How many are better than the baseline, worse, or cannot be told from it."""
    sign = 1 if better == "max" else -1
    if all(c.p is None for c in compared):
        return ""
    real = [c for c in compared if c.p is not None and c.p <= level]
    up = [c.first.label for c in real if sign * c.paired.difference > 0]
    down = [c.first.label for c in real if sign * c.paired.difference < 0]
    none = sum(not c.first.values for c in compared)
    rest = len(compared) - len(real) - none
    parts = [f"{len(part)} {word} ({_listed(part)})" for part, word in ((up, "better"), (down, "worse")) if part]
    parts += [f"{rest} not distinguishable"] * bool(rest) + [f"{none} without a result"] * bool(none)
    return f"Against the baseline {base.label} (paired over seeds, {_family(compared)}): {', '.join(parts)}."


def by_axis(effects: Sequence[Comparison], better: str, level: float = LEVEL) -> str:
    """What each axis does by itself."""
    if all(c.p is None for c in effects):
        return ""
    sign = 1 if better == "max" else -1
    real = [c for c in effects if c.p is not None and c.p <= level]
    name = lambda g: g.label.partition(", mean ")[0]  # noqa: E731
    parts = [
        f"{name(c.first)} is {'better' if sign * c.paired.difference > 0 else 'worse'} than {name(c.second)}, by "
        f"{verdicts.number(abs(c.paired.difference), c.paired.half)} +- "
        f"{verdicts.number(c.paired.half or 0.0, c.paired.half)}"
        for c in real
    ]
    rest = len(effects) - len(real)
    if rest:
        parts.append(
            f"{rest} more cannot be told from the baseline's value" if parts else f"none of {rest} can be told"
        )
    return f"Each axis averaged over the others (paired over seeds, {_family(effects)}): {'; '.join(parts)}."


def _family(compared: Sequence[Comparison]) -> str:
    count = max(c.comparisons for c in compared)
    return f"Holm over {count} comparisons" if count > 1 else "one comparison"


def _listed(names: Sequence[str], most: int = 6) -> str:
    return "; ".join(names[:most]) + (f"; and {len(names) - most} more" if len(names) > most else "")


def limits(told: Told, level: float = LEVEL) -> list[str]:
    """What cannot be said."""
    out = [_seeds(told, level), _examples(told), _selected(told), _edges(told.found), _one_rate(told)]
    if told.failed:
        out.append(f"{_arms(told.failed)} failed and {_is(told.failed)} in no mean; the reasons are listed below.")
    if told.missing:
        out.append(f"{_arms(told.missing)} of the grid {_has(told.missing)} not run: this is a report on a part of it.")
    out.append(
        "One data set and one base model: another one may order these choices differently."
        if told.made and not any(name.startswith(("data.", "model.")) for name in told.axes)
        else ""
    )
    return [sentence for sentence in out if sentence]


def _seeds(told: Told, level: float) -> str:
    seeds = sorted({len(g.values) for g in told.made if g.values})
    if not seeds:
        return ""
    if seeds[-1] < 2:
        return "One seed a choice: no interval and no test; every difference here may be the seed's."
    spreads = [c.paired.sd for c in told.compared if c.paired.sd]
    shown = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    text = f"{shown} seeds a choice. "
    if spreads and seeds[0] > 1:
        spread = math.sqrt(np.mean(np.square(spreads)))
        count = max(c.comparisons for c in told.compared)
        size = statistics.smallest_found(spread, seeds[0], level / count)
        family = f", corrected for {count} comparisons" if count > 1 else ""
        text += (
            f"With these and the spread of the differences seen here ({verdicts.number(spread, spread)}), a true "
            f"difference below about {verdicts.number(size, size)} is missed in more than 20 of 100 such "
            f"experiments{family}: 'not distinguishable' is no proof of equality. "
        )
    return text + "Bands and bars in the figures are of single means; the verdicts test paired differences."


def _examples(told: Told) -> str:
    split, _, name = told.metric.partition(".")
    means = [g.interval().mean for g in told.made if g.values]
    if not means or not name.endswith(PROPORTIONS):
        return ""
    seeds_only = (
        f"All arms share the {split} examples, so intervals over seeds say what other seeds would do on these "
        "examples, not what other examples would"
    )
    if not told.examples:
        return f"{seeds_only}; how many there are is not known."
    rate = float(np.clip(np.median(means), 0, 1))
    error = math.sqrt(rate * (1 - rate) / told.examples)
    return (
        f"{seeds_only}: of {told.examples} examples one is {1 / told.examples:.2g}, and the binomial standard error at "
        f"the median of the means, {rate:.3f}, is {verdicts.number(error, error)}."
    )


def _selected(told: Told) -> str:
    if not told.found:
        return ""
    best_of = max(len(one.tried) for one in told.found)
    size = f" (by up to about {verdicts.number(told.optimism, told.optimism)} here)" if told.optimism else ""
    text = f"The learning rate of each choice is the best of {best_of} by the mean of {told.chosen_by}"
    if told.metric == told.chosen_by:
        return (
            f"{text}, and the same numbers are compared: the means are too good{size}, alike for choices with searches "
            "of one size. Fresh seeds or a test split at the chosen rates would settle it."
        )
    return f"{text}; that metric is too good{size}, so choices are compared by {told.metric}, which had no part in it."


def _edges(found: Sequence[Best]) -> str:
    edge = [f"{one.group.label} ({one.value:g})" for one in found if one.edge in ("lowest", "highest")]
    if not edge:
        return ""
    return f"WARNING: the best learning rate is at the edge of the search for {_listed(edge, 30)}: too narrow a search."


def _one_rate(told: Told) -> str:
    if not told.made or OVER in told.axes or not any(name.startswith("adapter.") for name in told.axes):
        return ""
    return "Every choice had the same learning rate; one that wants another is at a disadvantage here."


def _arms(n: int) -> str:
    return f"{n} arm{'s' * (n > 1)}"


def _is(n: int) -> str:
    return "are" if n > 1 else "is"


def _has(n: int) -> str:
    return "have" if n > 1 else "has"
