"""The statistics as one plain sentence, which may be that nothing can be told."""

import math

from lora_jax.ablation.comparing.statistics import LEVEL, MOST_SEEDS, Interval, NoiseFloor, Paired
from lora_jax.errors import UserError

SMALLER = ("loss", "perplexity", "error", "seconds", "mb")
LARGER = ("accuracy", "f1", "exact_match", "bleu", "rouge", "per_second", "score")


def better_is(metric: str, given: str | None = None) -> str:
    """Returns 'max' or 'min': what `given` says, else what the metric's name says.

    Raises:
      UserError: neither does. A guess could print "better" where it is worse.
    """
    if given in ("max", "min"):
        return given
    if given is None:
        name = metric.rsplit(".", 1)[-1]
        for direction, words in (("min", SMALLER), ("max", LARGER)):
            if any(word in name for word in words):
                return direction
    raise UserError(f"is more of {metric!r} better or worse? Say better='max' or better='min', got {given!r}")


def number(value: float, half: float | None = None) -> str:
    """A number with the digits that its half width leaves: one digit of that, two where it starts with 1 or 2."""
    if not math.isfinite(value) or not half or not math.isfinite(half):
        return f"{value:.4g}"
    digits = -math.floor(math.log10(half))
    return f"{value:.{max(0, digits + (half * 10**digits < 3))}f}"


def p_value(p: float, level: float = LEVEL) -> str:
    """'p = 0.013'; more digits where rounding would move it onto the level."""
    if p < 0.001:
        return "p < 0.001"
    short = f"{p:.2g}"
    return f"p = {short if (float(short) <= level) == (p <= level) and float(short) != level else f'{p:.3g}'}"


def mean(over: Interval) -> str:
    """'0.844 +- 0.012 (3 seeds)', or why there is no interval."""
    if over.n == 0:
        return "no result"
    if over.half is None:
        return f"{number(over.mean)} (1 seed: no interval)"
    if over.half == 0:
        return f"{number(over.mean)} in all {over.n} seeds"
    return f"{number(over.mean, over.half)} +- {number(over.half, over.half)} ({over.n} seeds)"


def noise(floor: NoiseFloor, seeds: int, level: float = LEVEL) -> str:
    """What seeds alone do."""
    if floor.difference is None:
        return f"no noise floor: it needs at least 2 seeds of one configuration, there {_are(floor.n)}"
    return (
        f"seeds alone let two means of {_seeds(seeds)} differ by up to {number(floor.difference, floor.difference)} "
        f"in {100 * (1 - level):g} of 100 comparisons ({_seeds(floor.n)} measured)"
    )


def difference(
    pair: Paired, *, p: float | None, comparisons: int, needed: int | None, better: str, level: float = LEVEL
) -> str:
    """'better by 0.012 +- 0.005 (p = 0.01 after Holm over 5 comparisons, 3 seeds)', or that it cannot be told.

    Args:
      pair: the paired difference.
      p: after Holm's method.
      comparisons: in the family.
      needed: from `seeds_needed`; None = more than MOST_SEEDS.
      better: 'max' or 'min', from `better_is`.
      level: of significance.
    """
    word = "better" if (pair.difference > 0) == (better == "max") else "worse"
    amount = number(abs(pair.difference), pair.half)
    if pair.n == 0:
        return "no seed in common: nothing to compare"
    if pair.n == 1:
        return f"cannot be told from 1 seed ({word} by {amount}, no interval): at least 2 seeds are needed"
    if pair.sd == 0 and pair.difference == 0:
        return f"equal in each of {pair.n} seeds"
    if p is None:
        return f"{word} by {amount} in each of {pair.n} seeds: without spread there is no test"
    family = f" after Holm over {comparisons} comparisons" if comparisons > 1 else ""
    spread = f"{word} by {amount} +- {number(pair.half or 0.0, pair.half)}"
    if p <= level:
        return f"{spread} ({p_value(p, level)}{family}, {pair.n} seeds)"
    want = f"more than {MOST_SEEDS}" if needed is None else f"about {needed}"
    return f"not distinguishable with {pair.n} seeds; {want} would be needed ({spread}, {p_value(p, level)}{family})"


def _seeds(n: int) -> str:
    return "1 seed" if n == 1 else f"{n} seeds"


def _are(n: int) -> str:
    return "is 1" if n == 1 else f"are {n}"
