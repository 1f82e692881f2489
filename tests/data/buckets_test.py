"""Bucket lengths: the best set is found, it holds every row, and it never leaves the model's positions."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.data import buckets
from lora_jax.errors import UserError


def expected(chosen, lengths, batch_size):
    """Expected length of a batch of rows drawn from `lengths`, padded to a bucket: computed the slow way."""
    cost, before = 0.0, 0.0
    for bucket in chosen:
        below = np.mean([n <= bucket for n in lengths]) ** batch_size
        cost += bucket * (below - before)
        before = below
    return cost


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=40), st.sampled_from([1, 2, 8]), st.integers(1, 3))
def test_search_finds_the_best_set(lengths, batch_size, count):
    candidates = sorted({buckets.round_up(n) for n in lengths})
    mass = buckets._batch_mass(np.asarray(lengths), np.asarray(candidates), batch_size)
    found, cost = buckets._search(candidates, mass, count)
    assert cost == pytest.approx(expected(found, lengths, batch_size))
    others = itertools.combinations(candidates[:-1], min(count, len(candidates)) - 1)
    assert cost == pytest.approx(min(expected((*o, candidates[-1]), lengths, batch_size) for o in others))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=300), st.sampled_from([1, 32]))
def test_default_is_few_multiples_that_hold_every_row(lengths, batch_size):
    top = max(lengths) + 3
    chosen = buckets.choose(lengths, batch_size, top)
    assert 1 <= len(chosen) <= 4 and list(chosen) == sorted(set(chosen))
    assert max(lengths) <= chosen[-1] <= top
    assert all(n % 8 == 0 or n == top for n in chosen)


def test_a_bucket_must_pay_for_its_compilation():
    assert buckets.choose([60] * 98 + [50] * 2, 1) == (64,)
    assert buckets.choose([10] * 999 + [500], 1) == (16, 504)


def test_given_buckets():
    assert buckets.choose([5, 9], 2, buckets=[32, 16]) == (16, 32)
    assert buckets.choose([5, 9], 2, buckets="16, 32") == (16, 32)
    assert buckets.choose([10, 500], 1, buckets=1) == (504,)
    with pytest.raises(UserError, match="the longest row has 40 tokens; add a bucket of at least 40"):
        buckets.choose([40], 2, buckets=[16, 32])
    for wrong in (0, [], "a,b", [8, -1], [8.0]):
        with pytest.raises(UserError, match="buckets must be a number"):
            buckets.choose([5], 2, buckets=wrong)
