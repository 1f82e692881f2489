"""Choices at their best learning rate: the right one is taken, edges are noticed, and nulls stay nulls."""

import math

import numpy as np
from scipy import stats

from lora_jax.ablation.comparing import groups, search
from tests.ablation import worlds
from tests.ablation.worlds import M, T

RATES = [1e-4, 1e-3, 1e-2]


def table(best, seeds=3, spread=0.0, **options):
    """Methods whose accuracy falls by 0.1 a decade away from their best rate."""
    grid = worlds.cells(adapter__method=list(best), train__learning_rate=RATES, seed=range(seeds))
    effect = lambda c: 0.9 - 0.1 * abs(math.log10(c["train.learning_rate"] / best[c["adapter.method"]]))  # noqa: E731
    return worlds.rows(grid, effect, spread=spread, **options)


def test_each_choice_is_taken_at_its_best_rate():
    rows = table({"lora": 1e-3, "full": 1e-4, "head": 1e-2})
    found = search.search(rows, M, "max")
    assert [(one.group.label, one.value, one.tried) for one in found] == [
        ("method=lora", 1e-3, (1e-4, 1e-3, 1e-2)), ("method=full", 1e-4, (1e-4, 1e-3, 1e-2)),
        ("method=head", 1e-2, (1e-4, 1e-3, 1e-2))]  # fmt: skip
    assert [one.edge for one in found] == ["", "lowest", "highest"]
    assert search.search([row for row in rows if row["train.learning_rate"] == 1e-3], M, "max")[0].edge == "only"
    for row in rows:
        row["dev.loss"] = row[M]
    assert [one.value for one in search.search(rows, "dev.loss", "min")] == [1e-4, 1e-2, 1e-4]


def test_the_rows_at_the_best_have_every_seed_once_and_no_rate():
    rows = table({"lora": 1e-3, "full": 1e-4}, spread=0.001, test=True)
    found = search.search(rows, M, "max")
    kept = search.at_best(rows, found)
    assert len(kept) == 6 and all("train.learning_rate" not in row for row in kept)
    made = groups.grouped(kept, M)
    assert [g.values for g in made] == [one.group.values for one in found]


def test_a_rate_at_which_seeds_failed_is_not_the_best():
    rows = table({"lora": 1e-3})
    lucky = [row for row in rows if row["train.learning_rate"] == 1e-2]
    lucky[0] |= {"status": "failed", M: None}
    lucky[1][M] = lucky[2][M] = 0.99
    [one] = search.search(rows, M, "max")
    assert one.value == 1e-3 and one.failed == (1e-2,)
    for row in rows:
        if row["train.learning_rate"] != 1e-2:
            row |= {"status": "failed", M: None}
    assert search.search(rows, M, "max")[0].value == 1e-2  # better than nothing
    for row in rows:
        row |= {"status": "failed", M: None}
    assert search.search(rows, M, "max") == []


def test_the_largest_of_some_normals():
    assert math.isclose(search.largest_of(1), 0, abs_tol=1e-9)
    assert math.isclose(search.largest_of(2), 1 / math.sqrt(math.pi), rel_tol=1e-6)
    drawn = np.random.default_rng(0).normal(size=(20000, 4)).max(axis=1).mean()
    assert abs(search.largest_of(4) - drawn) < 0.03


def test_the_optimism_is_what_choosing_adds_when_all_rates_are_equal():
    rng, added, said = np.random.default_rng(1), [], []
    grid = worlds.cells(adapter__method=["a", "b"], train__learning_rate=RATES, seed=range(3))
    for _ in range(100):
        rows = worlds.rows(grid, lambda c: 0.8, spread=0.01, common=0.0, rng=rng)
        found = search.search(rows, M, "max")
        added += [one.group.interval().mean - 0.8 for one in found]
        said.append(search.optimism(found, rows, M))
    assert abs(np.mean(added) - np.mean(said)) < 4 * np.std(added) / math.sqrt(len(added))
    assert np.mean(added) > 0.003  # and the test metric, which had no part in the choice, is not raised


def test_choices_that_do_not_differ_are_called_different_as_often_as_the_level_says():
    """On the test split: choosing by dev does not raise the false positives."""
    rng, wrong = np.random.default_rng(2), 0
    grid = worlds.cells(adapter__method=["a", "b", "c"], train__learning_rate=RATES, seed=range(3))
    for _ in range(200):
        rows = worlds.rows(grid, lambda c: 0.8, rng=rng, test=True)
        assert search.test_metric(rows, M) == T
        made = groups.grouped(search.at_best(rows, search.search(rows, M, "max")), T)
        wrong += any(c.p < 0.05 for c in groups.compare([(g, made[0]) for g in made[1:]], T))
    assert stats.binomtest(wrong, 200, 0.05, alternative="greater").pvalue > 0.01


def test_without_a_test_column_there_is_no_test_metric():
    assert search.test_metric(table({"lora": 1e-3}), M) is None
    assert search.test_metric(table({"lora": 1e-3}, test=True), T) is None
