"""Batches: pure functions of the step, every row once per epoch, packed rows hold what the examples hold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.data import Batches
from lora_jax.errors import UserError


def lm(sizes):
    rng = np.random.default_rng(0)
    return [
        {
            "tokens": rng.integers(1, 99, n).astype(np.int32),
            "targets": rng.integers(1, 99, n).astype(np.int32),
            "weights": np.ones(n, np.float32),
        }
        for n in sizes
    ]


def classes(sizes):
    return [
        {"tokens": np.full(n, i + 1), "labels": np.asarray(i % 3), "pool_at": np.asarray(n - 1)}
        for i, n in enumerate(sizes)
    ]


SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=40)


def ids(batch):
    return [int(i) for i in batch["ids"].reshape(-1) if i >= 0]


def unpack(batch, key="tokens"):
    """{example: its values}, cut out of a batch by its segments."""
    out = {}
    for b, row in enumerate(batch["ids"]):
        for s, i in enumerate(row):
            if i >= 0:
                out[int(i)] = batch[key][b][batch["segment_ids"][b] == s + 1]
    return out


@settings(deadline=None, max_examples=80)
@given(SIZES, st.integers(1, 9), st.booleans(), st.integers(0, 2))
def test_every_example_once_per_epoch(sizes, batch_size, packing, seed):
    batches = Batches(lm(sizes), batch_size, seed, max_length=30, packing=packing)
    count = len(batches.rows)
    # `batch_size` epochs fill a whole number of batches.
    seen = [i for step in range(count) for i in ids(batches[step])]
    assert sorted(seen) == sorted(list(range(len(sizes))) * batch_size)
    rows = [tuple(ids({"ids": row})) for step in range(count) for row in batches[step]["ids"]]
    for epoch in range(batch_size):
        part = rows[epoch * count : (epoch + 1) * count]
        assert sorted(part) == sorted(batches.rows)
    assert batches.steps_per_epoch == -(-count // batch_size)


@settings(deadline=None, max_examples=80)
@given(SIZES, st.integers(1, 9), st.booleans())
def test_a_batch_holds_its_examples_and_nothing_else(sizes, batch_size, packing):
    examples = lm(sizes)
    batches = Batches(examples, batch_size, 1, max_length=30, packing=packing)
    for batch in (batches[0], *batches.in_order()):
        assert batch["tokens"].shape in {(batch_size, n) for n in batches.lengths}
        assert batch["ids"].shape == (batch_size, batches.segments)
        for key in ("tokens", "targets", "weights"):
            for i, values in unpack(batch, key).items():
                np.testing.assert_array_equal(values, examples[i][key])
            assert not batch[key][batch["segment_ids"] == 0].any()
        for i, values in unpack(batch, "positions").items():
            np.testing.assert_array_equal(values, np.arange(sizes[i]))
        # Segments stand one after the other from the left, padding only at the end.
        for row in batch["segment_ids"]:
            real = row[row > 0]
            assert (np.diff(real) >= 0).all() and not row[len(real) :].any()
        assert sum(sizes[i] for i in ids(batch)) == (batch["segment_ids"] > 0).sum()


@settings(deadline=None, max_examples=40)
@given(SIZES, st.integers(1, 9), st.booleans())
def test_in_order_is_each_example_once_and_the_last_batch_is_filled(sizes, batch_size, packing):
    batches = Batches(lm(sizes), batch_size, packing=packing, max_length=30)
    found = list(batches.in_order())
    assert [i for b in found for i in ids(b)] == [i for row in batches.rows for i in row]
    assert sorted(i for b in found for i in ids(b)) == list(range(len(sizes)))
    empty = -len(batches.rows) % batch_size
    if empty:
        assert (found[-1]["ids"][-empty:] == -1).all() and not found[-1]["weights"][-empty:].any()
        assert not found[-1]["segment_ids"][-empty:].any()


def test_a_batch_depends_on_its_step_alone():
    sizes = np.random.default_rng(3).integers(1, 30, 25).tolist()
    one, two = (Batches(lm(sizes), 4, seed=7) for _ in range(2))
    later = [two[step] for step in (40, 3, 0, 17)]
    for step, batch in zip((40, 3, 0, 17), later):
        for key in batch:
            np.testing.assert_array_equal(one[step][key], batch[key])
    assert ids(one[0]) + ids(one[1]) != list(range(8))  # shuffled
    assert ids(Batches(lm(sizes), 4, seed=8)[0]) != ids(one[0])
    orders = [[i for s in range(25) for i in ids(one[s + 25 * e])] for e in range(2)]
    assert orders[0] != orders[1]  # each epoch has its own order
    with pytest.raises(IndexError):
        one[-1]


def test_an_epoch_smaller_than_a_batch_repeats_itself():
    batches = Batches(lm([3, 4]), 5)
    assert batches.steps_per_epoch == 1
    assert sorted(ids(batches[0]) + ids(batches[1])) == [0] * 5 + [1] * 5
    assert batches[0]["tokens"].shape[0] == 5


def test_pool_at_and_labels_move_with_their_segment():
    batches = Batches(classes([4, 3, 2, 1, 4]), 2, packing=True, max_length=8)
    for batch in batches.in_order():
        for b, s in zip(*np.nonzero(batch["ids"] >= 0)):
            i = batch["ids"][b, s]
            at = batch["pool_at"][b, s]
            assert batch["tokens"][b, at] == i + 1 and batch["segment_ids"][b, at] == s + 1
            assert at == len(batch["tokens"][b]) - 1 or batch["segment_ids"][b, at + 1] != s + 1
            assert batch["labels"][b, s] == i % 3
    plain = next(Batches(classes([4, 3]), 2).in_order())
    assert plain["pool_at"].tolist() == [[3], [2]] and plain["labels"].shape == (2, 1)
    assert plain["labels"].dtype == plain["tokens"].dtype == np.int32


def test_packing_saves_rows_and_bounds_segments():
    examples = lm([5] * 64)
    packed = Batches(examples, 4, packing=True, max_length=64)
    assert (len(packed.rows), packed.segments, packed.lengths) == (6, 12, (64,))
    assert Batches(examples, 4, packing=True, max_length=64, max_segments=3).segments == 3
    assert Batches(lm([1] * 99), 4, packing=True, max_length=64).segments == 32


def test_no_bucket_is_longer_than_max_length():
    assert Batches(lm([50]), 1, max_length=50).lengths == (50,)
    assert Batches(lm([30, 20]), 1, max_length=50, packing=True).lengths == (50,)
    assert Batches(lm([3, 3]), 1, max_length=50, packing=True).lengths == (8,)


def test_fingerprint_changes_with_all_that_changes_a_batch():
    def print_of(sizes=(5, 6, 7), batch_size=2, **options):
        return Batches(lm(sizes), batch_size, **options).fingerprint

    changed = [print_of(), print_of((5, 6, 8)), print_of(batch_size=3), print_of(seed=1), print_of(buckets=[16])]
    changed += [print_of(packing=True), print_of(packing=True, max_length=18)]
    changed += [print_of(packing=True, max_length=32, buckets=[32], max_segments=n) for n in (2, 3)]
    assert len(set(changed)) == len(changed)
    examples = lm((5, 6, 7))
    examples[1]["targets"][0] += 1
    assert Batches(examples, 2).fingerprint != print_of() == print_of()


@pytest.mark.parametrize("share_rows", [False, True])
def test_another_seed_is_as_if_made_with_it(share_rows):
    examples = lm([3, 9, 4, 7, 5, 2, 8, 6, 3])
    make = lambda seed: Batches(examples, 4, seed, max_length=12, share_rows=share_rows)  # noqa: E731
    first, made = make(0), make(7)
    first[0], first.fingerprint
    other = first.with_seed(7)
    assert other.fingerprint == made.fingerprint != first.fingerprint
    for step in range(5):
        pairs = zip(other[step].items(), made[step].items(), strict=True)
        assert all(a == b and np.array_equal(x, y) for (a, x), (b, y) in pairs)
    assert not np.array_equal(ids(first[0]), ids(other[0])) and np.array_equal(ids(first[0]), ids(make(0)[0]))
    with pytest.raises(UserError, match="packing plans its rows by the seed"):
        Batches(examples, 4, packing=True).with_seed(7)


def test_an_example_without_target_is_named():
    examples = lm([3, 4, 5])
    examples[1]["weights"][:] = 0
    with pytest.raises(UserError, match=r"1 of 3 examples have no target token.*: f.jsonl line 2\. .*data.max_length"):
        Batches(examples, 2, names=[f"f.jsonl line {i}" for i in (1, 2, 3)])


def test_bad_input():
    for wrong in (0, -1, 2.0, True, None):
        with pytest.raises(UserError, match="batch_size must be a whole number, at least 1"):
            Batches(lm([3]), wrong)
    with pytest.raises(UserError, match="the split is empty"):
        Batches([], 1)
    with pytest.raises(UserError, match="example 1 has 9 tokens, more than max_length=8"):
        Batches(lm([3, 9]), 1, max_length=8)
    with pytest.raises(UserError, match="example 0 has no tokens"):
        Batches(lm([0]), 1)
    with pytest.raises(UserError, match="max_length must be a whole number"):
        Batches(lm([3]), 1, max_length=0)
    broken = lm([3, 4])
    broken[1]["targets"] = broken[1]["targets"][:2]
    with pytest.raises(UserError, match="example 1: the array 'targets' has 2 values for 4 tokens"):
        Batches(broken, 1)
    del broken[1]["targets"]
    with pytest.raises(UserError, match="example 1 has the arrays"):
        Batches(broken, 1)


@settings(deadline=None, max_examples=60)
@given(SIZES, st.integers(1, 9), st.integers(0, 2), st.integers(1, 3))
def test_shared_rows_hold_the_examples_of_the_step(sizes, batch_size, seed, multiple):
    examples = lm(sizes)
    alone = Batches(examples, batch_size, seed, max_length=30)
    shared = Batches(examples, batch_size, seed, max_length=30, share_rows=True, multiple=multiple)
    for step in range(4):
        batch = shared[step]
        assert sorted(ids(batch)) == sorted(ids(alone[step]))
        assert len(batch["tokens"]) % multiple == 0 and batch["tokens"].shape[1] == shared.lengths[0]
        # An example that comes twice in a step (an epoch smaller than a batch) is there twice.
        assert int(np.sum(batch["weights"])) == int(np.sum(alone[step]["weights"]))
        for i, values in unpack(batch, "targets").items():
            np.testing.assert_array_equal(values, examples[i]["targets"])
    whole = list(shared.in_order())
    assert sorted(i for batch in whole for i in ids(batch)) == list(range(len(sizes)))
    assert len({batch["tokens"].shape for batch in whole}) == 1 and len(whole[0]["tokens"]) % multiple == 0


def test_an_evaluation_shares_rows_over_the_whole_split():
    rng, shapes = np.random.default_rng(1), set()
    for count in (300, 700):  # dev and test of one distribution: 27 tokens on average, 31 rows of 56 for 64 examples
        whole = list(Batches(lm(rng.integers(4, 50, count)), 64, max_length=64, share_rows=True).in_order())
        full = whole[:-1]
        assert sum(np.count_nonzero(b["segment_ids"]) for b in full) > 0.95 * sum(b["tokens"].size for b in full)
        shapes |= {batch["tokens"].shape for batch in whole}
    assert shapes == {(32, 56)}  # one program for both


def test_shared_rows_are_few_and_of_few_shapes():
    rng = np.random.default_rng(0)
    examples = lm(rng.integers(4, 60, 400))
    shared = Batches(examples, 32, max_length=64, share_rows=True)
    shapes = {shared[step]["tokens"].shape for step in range(40)}
    assert len(shared.row_counts) <= 2 and len(shapes) <= 3 and all(rows <= 24 for rows, _ in shapes)
    assert shared.fill > 0.8 > 1.3 * Batches(examples, 32, max_length=64).fill
    other = Batches(examples, 32, seed=1, max_length=64, share_rows=True)
    assert other.row_counts == shared.row_counts and other.fingerprint != shared.fingerprint
    assert shared.fingerprint != Batches(examples, 32, max_length=64).fingerprint


def test_packing_and_shared_rows_exclude_each_other():
    with pytest.raises(UserError, match="packing and share_rows exclude each other"):
        Batches(lm([3, 4]), 2, packing=True, share_rows=True)
