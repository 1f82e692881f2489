"""The packing plan: every example once, nothing over length, few rows, the same everywhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.data import packing
from lora_jax.errors import UserError

GOLDEN = [7, 4, 5, 1, 6, 2, 0, 3]
CASES = st.integers(4, 60).flatmap(
    lambda capacity: st.tuples(
        st.just(capacity),
        st.lists(st.integers(1, capacity), min_size=1, max_size=80),
        st.one_of(st.none(), st.integers(1, 5)),
        st.integers(0, 3),
    )
)


@settings(deadline=None, max_examples=150)
@given(CASES)
def test_plan(case):
    capacity, lengths, bound, seed = case
    rows = packing.plan(lengths, capacity, seed, bound)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= capacity for row in rows)
    assert all(len(row) <= (bound or len(lengths)) for row in rows)
    assert rows == packing.plan(np.asarray(lengths), capacity, seed, bound)
    if bound is None:
        # Two rows that fit into one would never both have been opened.
        totals = sorted(sum(lengths[i] for i in row) for row in rows)
        assert len(totals) < 2 or totals[0] + totals[1] > capacity


def test_perfect_fit_is_found():
    lengths = [7, 3, 6, 4, 5, 5, 9, 1, 8, 2]
    rows = packing.plan(lengths, 10)
    assert len(rows) == 5 and packing.fill(lengths, rows, 10) == 1.0


def test_long_examples_come_first():
    # In any order that lets two 4s meet, a 6 is left alone.
    assert len(packing.plan([4, 6] * 20, 10)) == 20


def test_the_fullest_row_that_fits_is_taken():
    assert packing.plan([7, 6, 3, 1], 10) == ((0, 2), (1, 3))


def test_seed_orders_examples_of_equal_length():
    assert packing.plan([5] * 20, 10, 0) != packing.plan([5] * 20, 10, 1)
    assert packing.fingerprint(packing.plan([5] * 20, 10, 0)) != packing.fingerprint(packing.plan([5] * 20, 10, 1))


def test_permutation_is_the_same_on_every_machine():
    # Values of this function; numpy promises that the streams of its bit generators never change.
    assert packing.permutation(8, 0, 1).tolist() == GOLDEN
    assert packing.permutation(8, 0, 0).tolist() != packing.permutation(8, 0, 1).tolist()
    assert packing.permutation(8, 1, 1).tolist() != GOLDEN
    assert sorted(packing.permutation(8, -1, 5)) == list(range(8))


def test_errors():
    with pytest.raises(UserError, match="example 1 has 11 tokens; a packed row holds 1 to 10"):
        packing.plan([3, 11], 10)
    with pytest.raises(UserError, match="example 0 has 0 tokens"):
        packing.plan([0], 10)
    with pytest.raises(UserError, match="max_segments=0"):
        packing.plan([1], 10, max_segments=0)
