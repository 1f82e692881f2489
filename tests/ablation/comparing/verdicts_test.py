"""The sentences, word by word."""

import math

import pytest

from lora_jax.ablation.comparing import statistics, verdicts
from lora_jax.ablation.comparing.statistics import Interval, NoiseFloor, Paired
from lora_jax.errors import UserError


def sentence(pair, p=None, comparisons=1, needed=None, better="max", level=0.05):
    return verdicts.difference(pair, p=p, comparisons=comparisons, needed=needed, better=better, level=level)


def test_a_difference_is_told_with_its_interval_and_its_family():
    pair = Paired(0.0123, 0.002, 0.0049, 3, 0.002)
    assert sentence(pair, 0.01, 5) == "better by 0.012 +- 0.005 (p = 0.01 after Holm over 5 comparisons, 3 seeds)"
    assert sentence(pair, 0.002) == "better by 0.012 +- 0.005 (p = 0.002, 3 seeds)"
    assert sentence(pair, 0.0002, better="min") == "worse by 0.012 +- 0.005 (p < 0.001, 3 seeds)"
    assert sentence(pair._replace(difference=-0.0123), 0.01, better="min").startswith("better by 0.012")
    assert sentence(pair._replace(difference=-0.0123), 0.01).startswith("worse by 0.012")


def test_what_cannot_be_told_says_what_would_be_needed():
    pair = Paired(0.004, 0.004, 0.0101, 3, 0.2)
    assert sentence(pair, 0.6, 5, 9) == (
        "not distinguishable with 3 seeds; about 9 would be needed "
        "(better by 0.004 +- 0.010, p = 0.6 after Holm over 5 comparisons)"
    )
    assert "; more than 1000 would be needed (" in sentence(pair, 0.6)
    assert sentence(pair, 0.05).startswith("better") and sentence(pair, 0.0501, needed=4).startswith("not")
    assert "p = 0.0501)" in sentence(pair, 0.0501, needed=4)


def test_one_seed_no_seed_and_no_spread_are_said():
    assert sentence(Paired(0.012, None, None, 1, None)) == (
        "cannot be told from 1 seed (better by 0.012, no interval): at least 2 seeds are needed"
    )
    assert sentence(Paired(math.nan, None, None, 0, None)) == "no seed in common: nothing to compare"
    assert sentence(Paired(0.0, 0.0, 0.0, 3, 1.0), 1.0) == "equal in each of 3 seeds"
    assert (
        sentence(Paired(-0.012, 0.0, 0.0, 3, None))
        == "worse by 0.012 in each of 3 seeds: without spread there is no test"
    )


def test_means():
    assert verdicts.mean(Interval(0.84412, 0.005, 0.0123, 3)) == "0.844 +- 0.012 (3 seeds)"
    assert verdicts.mean(Interval(0.84412, None, None, 1)) == "0.8441 (1 seed: no interval)"
    assert verdicts.mean(Interval(0.5, 0.0, 0.0, 4)) == "0.5 in all 4 seeds"
    assert verdicts.mean(Interval(math.nan, None, None, 0)) == "no result"
    assert verdicts.mean(Interval(1234.5, 90.0, 99.0, 3)) == "1234 +- 99 (3 seeds)"


def test_noise():
    assert verdicts.noise(NoiseFloor(0.004, 0.0102, 3), 3) == (
        "seeds alone let two means of 3 seeds differ by up to 0.010 in 95 of 100 comparisons (3 seeds measured)"
    )
    assert verdicts.noise(NoiseFloor(None, None, 1), 1) == (
        "no noise floor: it needs at least 2 seeds of one configuration, there is 1"
    )


@pytest.mark.parametrize(
    "metric, direction",
    [("dev.accuracy", "max"), ("test.loss", "min"), ("dev.macro_f1", "max"), ("seconds", "min"),
     ("tokens_per_second", "max"), ("peak_memory_mb", "min"), ("test.bleu", "max"), ("dev.perplexity", "min")],
)  # fmt: skip
def test_the_name_of_a_metric_says_what_is_better(metric, direction):
    assert verdicts.better_is(metric) == direction
    assert verdicts.better_is(metric, "max") == "max"


def test_a_metric_whose_name_does_not_say_is_asked_for():
    with pytest.raises(UserError, match=r"is more of 'dev.depth' better or worse\? Say better='max'"):
        verdicts.better_is("dev.depth")
    with pytest.raises(UserError, match="got 'up'"):
        verdicts.better_is("dev.loss", "up")


def test_the_digits_follow_the_half_width():
    assert [verdicts.number(0.123456, half) for half in (0.5, 0.02, 0.0051, 0.0001)] == [
        "0.1",
        "0.123",
        "0.123",
        "0.12346",
    ]
    assert statistics.LEVEL == 0.05
