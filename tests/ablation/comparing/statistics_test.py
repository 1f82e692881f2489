"""The statistics against scipy on synthetic results with a known effect, and against their own promises."""

import math
import warnings

import numpy as np
import pytest
from scipy import stats

from lora_jax.ablation.comparing import statistics

RNG = np.random.default_rng


@pytest.mark.parametrize("n", [2, 3, 10])
@pytest.mark.parametrize("level", [0.05, 0.2])
def test_the_interval_is_students(n, level):
    x = RNG(n).normal(0.8, 0.02, n)
    over = statistics.interval(x, level)
    low, high = stats.ttest_1samp(x, 0).confidence_interval(1 - level)
    np.testing.assert_allclose([over.mean - over.half, over.mean + over.half], [low, high], rtol=1e-9)
    assert over.n == n and math.isclose(over.sd, x.std(ddof=1))


@pytest.mark.parametrize("n", [2, 3, 10])
@pytest.mark.parametrize("effect", [0.0, 0.03])
def test_the_paired_test_is_scipys(n, effect):
    a, b = RNG(n).normal(0.8, 0.02, (2, n))
    ours, theirs = statistics.paired(a + effect, b), stats.ttest_rel(a + effect, b)
    low, high = theirs.confidence_interval()
    assert math.isclose(ours.p, theirs.pvalue, rel_tol=1e-9) and ours.n == n
    np.testing.assert_allclose([ours.difference - ours.half, ours.difference + ours.half], [low, high], rtol=1e-9)


def test_one_value_has_no_interval_and_none_has_no_mean():
    assert statistics.interval([0.5]) == (0.5, None, None, 1)
    assert statistics.paired([0.5], [0.25]) == (0.25, None, None, 1, None)
    assert math.isnan(statistics.interval([]).mean) and statistics.paired([], []).n == 0
    with pytest.raises(ValueError, match="finite"):
        statistics.interval([0.5, math.nan])
    with pytest.raises(ValueError, match="same seeds"):
        statistics.paired([1.0, 2.0], [1.0])


def test_no_spread_gives_no_p_value_unless_all_is_equal():
    assert statistics.interval([0.1 + 0.2, 0.3, 0.3])[1:] == (0.0, 0.0, 3)
    assert statistics.paired([0.3, 0.6], [0.3, 0.6]) == (0.0, 0.0, 0.0, 2, 1.0)
    constant = statistics.paired([0.852, 0.838, 0.861], [0.840, 0.826, 0.849])  # 0.012 each, but for roundings
    assert constant.p is None and constant.sd == 0 and math.isclose(constant.difference, 0.012)


def test_holm_by_hand_and_what_is_not_known_counts_not():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([None, 0.02, None, 0.9]) == [None, 0.04, None, 0.9]
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]
    assert statistics.holm([]) == []


@pytest.mark.parametrize("effect", [0.5, 1.0, 2.5])
def test_the_seeds_needed_have_the_power_that_simulation_finds(effect):
    n = statistics.seeds_needed(effect, 1.0)
    draws = RNG(1).normal(effect, 1.0, (4000, n))
    found = (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean()
    within = 4 * math.sqrt(0.2 * 0.8 / 4000)
    assert abs(found - statistics.power(effect, 1.0, n)) < within
    assert found > 0.8 - within and statistics.power(effect, 1.0, n - 1) < 0.8


@pytest.mark.parametrize(
    "n, effect, level", [(2, 1.0, 0.05), (3, 0.0, 0.05), (3, 2.0, 0.01), (9, 0.4, 0.05), (34, 0.5, 0.2)]
)
def test_power_is_that_of_the_noncentral_t(n, effect, level):
    c, shift = stats.t.isf(level / 2, n - 1), math.sqrt(n) * effect
    expected = stats.nct.sf(c, n - 1, shift) + stats.nct.cdf(-c, n - 1, shift)
    assert math.isclose(statistics.power(-2 * effect, 2.0, n, level), expected, abs_tol=1e-4)


def test_the_smallest_difference_found_has_that_power():
    size = statistics.smallest_found(0.02, 5, level=0.01, chance=0.8)
    assert math.isclose(statistics.power(size, 0.02, 5, 0.01), 0.8, abs_tol=1e-3)
    few = statistics.smallest_found(1.0, 2)  # far above the spread
    assert few > 8 and math.isclose(statistics.power(few, 1.0, 2), 0.8, abs_tol=1e-3)
    assert statistics.smallest_found(0.02, 20) < statistics.smallest_found(0.02, 5) < size
    assert statistics.seeds_needed(statistics.smallest_found(1.0, 9) * 1.001, 1.0) == 9


def test_known_numbers_of_seeds():
    """34 pairs for an effect of half a standard deviation: Cohen, and G*Power's manual."""
    assert statistics.seeds_needed(0.5, 1.0) == 34
    assert statistics.seeds_needed(-0.5, 1.0) == 34
    assert statistics.seeds_needed(0.5, 1.0, level=0.01) > 34
    assert statistics.seeds_needed(0.0, 1.0) is None and statistics.seeds_needed(1e-4, 1.0) is None
    assert statistics.seeds_needed(1e6, 1.0) == 2


def test_intervals_cover_the_truth_as_often_as_they_say():
    draws, level = RNG(2).normal(0.8, 0.02, (2000, 3)), 0.1
    intervals = [statistics.interval(x, level) for x in draws]
    misses = sum(abs(over.mean - 0.8) > over.half for over in intervals)
    assert stats.binomtest(misses, 2000, level).pvalue > 0.001


def test_seeds_alone_exceed_the_noise_floor_as_often_as_it_says():
    draws, beyond = RNG(3).normal(0, 1, (2000, 4 + 3 + 3)), 0
    for x in draws:
        floor = statistics.noise_floor(x[:4], seeds=3)
        beyond += abs(x[4:7].mean() - x[7:].mean()) > floor.difference
    assert stats.binomtest(beyond, 2000, 0.05).pvalue > 0.001
    assert statistics.noise_floor([0.5], seeds=3) == (None, None, 1)


@pytest.mark.parametrize("shift", [0.0, 0.2])
def test_mcnemar_is_the_binomial_test_of_what_only_one_got_right(shift):
    rng = RNG(4)
    a, b = rng.random(300) < 0.6 + shift, rng.random(300) < 0.6
    ours = statistics.mcnemar(a, b)
    only_a, only_b = (a & ~b).sum(), (b & ~a).sum()
    assert math.isclose(ours.p, stats.binomtest(only_a, only_a + only_b).pvalue, rel_tol=1e-9)
    assert ours.p < 0.001 if shift else ours.p > 0.05
    assert math.isclose(ours.difference, a.mean() - b.mean()) and (ours.only_first, ours.only_second) == (
        only_a,
        only_b,
    )


def test_mcnemar_of_equal_models_and_of_a_tie():
    assert statistics.mcnemar([True, False], [True, False]).p == 1.0
    assert statistics.mcnemar([True, False], [False, True]).p == 1.0
    with pytest.raises(ValueError, match="same examples"):
        statistics.mcnemar([True], [True, False])


def test_the_bootstrap_agrees_with_the_t_test_on_means():
    rng = RNG(5)
    common = rng.normal(0, 1, 400)
    a, b = common + rng.normal(0.07, 0.3, 400), common + rng.normal(0, 0.3, 400)
    ours, theirs = statistics.paired_bootstrap(a, b, seed=1), stats.ttest_rel(a, b)
    low, high = theirs.confidence_interval()
    np.testing.assert_allclose([ours.low, ours.high], [low, high], atol=0.1 * (high - low))
    assert 0.001 < ours.p < 0.05 and abs(ours.p - theirs.pvalue) < 0.01
    assert statistics.paired_bootstrap(a, b, seed=1) == ours != statistics.paired_bootstrap(a, b, seed=2)
    assert statistics.paired_bootstrap(a, a).p == 1.0


def test_the_bootstrap_is_wrong_as_often_as_it_says():
    """On nulls: 200 pairs of equal models whose examples differ by noise alone."""
    rng, found = RNG(6), 0
    for _ in range(200):
        a, b = rng.normal(0, 1, (2, 60))
        found += statistics.paired_bootstrap(a, b, resamples=200).p < 0.05
    assert stats.binomtest(found, 200, 0.05).pvalue > 0.001


def test_nothing_here_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        statistics.paired([0.3, 0.6], [0.3, 0.6])
        statistics.seeds_needed(1e6, 1e-6)
        statistics.interval([])
