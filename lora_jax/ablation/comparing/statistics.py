"""Is the difference real? Intervals over seeds, paired tests, Holm's method, the seeds that would be needed.

Runs that share a seed share the order of the data and the initial values of the sites that both adapt, so two groups
are compared seed by seed: what a seed does to both cancels. The tests on predictions say something else: whether two
trained adapters differ beyond the choice of test examples. They know nothing of seeds. A difference is always
first - second.

Everything is two-sided. `level` is the false-positive rate that one accepts, 1 - confidence.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

Numbers = Sequence[float] | np.ndarray

LEVEL = 0.05
MOST_SEEDS = 1000


class Interval(NamedTuple):
    """A mean over n seeds. `sd` and `half`, the half width of the interval, are None where n < 2."""

    mean: float
    sd: float | None
    half: float | None
    n: int


class Paired(NamedTuple):
    """A mean difference over n shared seeds. `p` is None where there is nothing to test with: n < 2, or no spread."""

    difference: float
    sd: float | None
    half: float | None
    n: int
    p: float | None


class NoiseFloor(NamedTuple):
    """What seeds alone do: their spread, and the difference of two means that seeds alone exceed at the given level."""

    sd: float | None
    difference: float | None
    n: int


class McNemar(NamedTuple):
    """Two classifiers on the same n examples: how often only one of them was right, and the exact test of that."""

    difference: float
    only_first: int
    only_second: int
    n: int
    p: float


class Bootstrap(NamedTuple):
    """A metric of two models on the same n examples: the difference, its percentile interval, p."""

    difference: float
    low: float
    high: float
    n: int
    p: float


def interval(values: Numbers, level: float = LEVEL) -> Interval:
    """Mean and Student t interval (Student, 1908): mean +- t(1 - level/2; n - 1) sd / sqrt(n).

    Args:
      values: finite, one per seed.
      level: 1 - confidence.

    Raises:
      ValueError: a value that is not finite: leave it out before, and say so.
    """
    x = np.asarray(values, np.float64)
    if not np.isfinite(x).all():
        raise ValueError(f"an interval needs finite values, got {list(values)}")
    if x.size < 2:
        return Interval(float(x[0]) if x.size else math.nan, None, None, x.size)
    sd = float(x.std(ddof=1))
    # 0.1 + 0.2 against 0.3: a spread of a few roundings is none.
    sd = 0.0 if sd <= 8 * np.finfo(np.float64).eps * np.abs(x).max() else sd
    return Interval(float(x.mean()), sd, _t(level, x.size - 1) * sd / math.sqrt(x.size), x.size)


def _t(level: float, df: int) -> float:
    """Two-sided critical value of Student's t."""
    return float(special.stdtrit(df, 1 - level / 2))


def paired(first: Numbers, second: Numbers, level: float = LEVEL) -> Paired:
    """Paired t test of first - second, as `scipy.stats.ttest_rel`.

    It differs without spread: equal values everywhere give p = 1, and one and the same difference in every seed gives
    no p (scipy: 0), since no spread can be estimated from it.

    Args:
      first: finite, one per shared seed.
      second: of the same seeds in the same order.
      level: 1 - confidence of the interval.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"a paired test needs the same seeds on both sides, got {a.size} and {b.size} values")
    over = interval(a - b, level)
    if over.sd is None or over.half is None:
        return Paired(over.mean, None, None, over.n, None)
    scale = 8 * np.finfo(np.float64).eps * max(np.abs(a).max(), np.abs(b).max())
    if over.sd <= scale:
        same = abs(over.mean) <= scale
        return Paired(0.0 if same else over.mean, 0.0, 0.0, over.n, 1.0 if same else None)
    t = abs(over.mean) / (over.sd / math.sqrt(over.n))
    return Paired(over.mean, over.sd, over.half, over.n, float(2 * special.stdtr(over.n - 1, -t)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p values that keep the chance of any false positive in the family at the level (Holm, 1979).

    The k-th smallest of m becomes the largest of (m - j + 1) p_j over j <= k, at most 1. None stays None, uncounted.
    """
    known = [p for p in p_values if p is not None]
    order = sorted(range(len(known)), key=known.__getitem__)
    adjusted, largest = [0.0] * len(known), 0.0
    for k, i in enumerate(order):
        largest = max(largest, min(1.0, (len(known) - k) * known[i]))
        adjusted[i] = largest
    rest = iter(adjusted)
    return [None if p is None else next(rest) for p in p_values]


def power(difference: float, sd: float, n: int, level: float = LEVEL) -> float:
    """The chance that a paired t test over n seeds finds a true `difference` whose spread over seeds is `sd`.

    T = sqrt(n) D / s is noncentral t with n - 1 degrees of freedom and noncentrality d = sqrt(n) difference / sd, so
    the power is P(T > c) + P(T < -c), c = t(1 - level/2; n - 1) (Cohen, 1988, Statistical Power Analysis, chapter 2).
    T is (Z + d) / r, Z normal and r^2 = chi2 / (n - 1), so this is the mean over r of Phi(d - c r) + Phi(-d - c r),
    taken here at the quantiles of r: scipy.stats.nct (1.17) is NaN where d is large.
    """
    shift, c = math.sqrt(n) * abs(difference) / sd, _t(level, n - 1)
    cr = c * _chi_quantiles(n - 1)
    return float(np.mean(special.ndtr(shift - cr) + special.ndtr(-shift - cr)))


@functools.lru_cache(maxsize=1024)
def _chi_quantiles(df: int, count: int = 1000) -> np.ndarray:
    """(count,) equally likely values of sqrt(chi2 / df)."""
    return np.sqrt(special.gammaincinv(df / 2, (np.arange(count) + 0.5) / count) * 2 / df)


def seeds_needed(difference: float, sd: float, level: float = LEVEL, chance: float = 0.8) -> int | None:
    """The fewest seeds at which `power` reaches `chance`, if the observed difference and spread are the true ones.

    They are estimates from few seeds, so this is the order of magnitude to plan with, not a promise. In a family of m
    comparisons give level / m: what is under that passes Holm's method whatever the other comparisons say.

    Returns:
      At least 2; None for more than MOST_SEEDS.
    """
    if difference == 0 or power(difference, sd, MOST_SEEDS, level) < chance:
        return None
    low, high = 1, MOST_SEEDS  # power rises with n
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(difference, sd, middle, level) >= chance else (middle, high)
    return high


def smallest_found(sd: float, n: int, level: float = LEVEL, chance: float = 0.8) -> float:
    """The smallest true difference that a paired t test over n >= 2 seeds finds with this `chance`; see `power`."""
    low, high = 0.0, sd
    while power(high, sd, n, level) < chance:
        low, high = high, 2 * high
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle, sd, n, level) >= chance else (middle, high)
    return high


def noise_floor(replicates: Sequence[float], seeds: int, level: float = LEVEL) -> NoiseFloor:
    """The difference between two means of `seeds` runs each that one configuration shows against itself.

    t(1 - level/2; n - 1) sd sqrt(2 / seeds), from n replicates that differ in the seed only. Not paired, thus the
    measure for numbers of other people, other machines and other data orders.
    """
    over = interval(replicates, level)
    if over.sd is None or seeds < 1:
        return NoiseFloor(None, None, over.n)
    return NoiseFloor(over.sd, _t(level, over.n - 1) * over.sd * math.sqrt(2 / seeds), over.n)


def mcnemar(first: Sequence[bool] | np.ndarray, second: Sequence[bool] | np.ndarray) -> McNemar:
    """The exact test of McNemar (1947): of the examples that only one got right, each is a fair coin under the null.

    Args:
      first: whether each example was right.
      second: of the same examples in the same order.
    """
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    if a.shape != b.shape or not a.size:
        raise ValueError(f"a paired test needs the same examples on both sides, got {a.size} and {b.size}")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p = min(1.0, 2 * float(special.bdtr(min(only_a, only_b), only_a + only_b, 0.5))) if only_a + only_b else 1.0
    return McNemar((only_a - only_b) / a.size, only_a, only_b, a.size, p)


def paired_bootstrap(
    first: np.ndarray,
    second: np.ndarray,
    metric: Callable[[np.ndarray], float] = lambda x: float(x.mean()),
    seed: int = 0,
    resamples: int = 2000,
    level: float = LEVEL,
) -> Bootstrap:
    """Resamples examples, the same for both (Efron & Tibshirani, 1993, chapters 13 and 16; Koehn, 2004, is one-sided).

    Args:
      first: (N, ...) what the metric needs of each example.
      second: of the same examples.
      metric: (N, ...) -> number.
      seed: of the resampling; the same seed gives the same answer.
      resamples: how many; p cannot be smaller than 1 / (resamples + 1).
      level: 1 - confidence of the percentile interval.

    Returns:
      p is the share of resampled differences, moved to mean zero, that are at least as large as the observed one.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"a paired test needs the same examples on both sides, got {len(first)} and {len(second)}")
    rng, n = np.random.default_rng(seed), len(first)
    observed = metric(first) - metric(second)
    drawn = np.empty(resamples)
    for i in range(resamples):
        chosen = rng.integers(0, n, n)
        drawn[i] = metric(first[chosen]) - metric(second[chosen])
    low, high = np.quantile(drawn, [level / 2, 1 - level / 2])
    beyond = int((np.abs(drawn - observed) >= abs(observed) * (1 - 1e-9)).sum())  # as large, up to rounding
    return Bootstrap(float(observed), float(low), float(high), n, (1 + beyond) / (resamples + 1))
