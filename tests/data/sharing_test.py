"""Shared rows: every example of a step once, and few numbers of rows."""

from lora_jax.data import sharing


def test_rows_hold_the_given_examples_where_one_may_come_twice():
    rows = sharing.rows_of([7, 3, 7, 5], {3: 6, 5: 2, 7: 4}, capacity=8, bound=2)
    assert sorted(i for row in rows for i in row) == [3, 5, 7, 7]
    assert len(rows) == 2 and all(len(row) <= 2 for row in rows)


def test_a_second_number_of_rows_has_to_be_worth_it():
    assert sharing.choose_counts([12] * 9 + [16]) == (12, 16)
    assert sharing.choose_counts([16] * 9 + [12]) == (16,), "one step in ten would be a quarter shorter: 2.5 %"
    assert sharing.choose_counts([9, 10, 12], multiple=4) == (12,)


def test_a_step_above_all_that_was_seen_is_filled_up_to_the_next():
    assert sharing.filled_up(11, (12, 16)) == 12 and sharing.filled_up(13, (12, 16)) == 16
    assert sharing.filled_up(17, (12, 16)) == 18 and sharing.filled_up(19, (12, 16)) == 20
    assert sharing.filled_up(17, (16,), multiple=4) == 20
