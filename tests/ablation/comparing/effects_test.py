"""Each axis by itself, averaged over the others: against scipy, against a known effect, and on nulls."""

import math

import numpy as np
from scipy import stats

from lora_jax.ablation.comparing import effects, statistics
from tests.ablation import worlds
from tests.ablation.worlds import M

GRID = worlds.cells(adapter__rank=[1, 4, 16], adapter__layers=["last:1", "all"], seed=range(3))
BASE = {"adapter.rank": 4, "adapter.layers": "all"}


def test_an_effect_is_the_paired_test_of_the_averages():
    rows = worlds.rows(GRID, lambda c: 0.8 + 0.02 * (c["adapter.layers"] == "all"))
    found = effects.compare(rows, M, BASE)
    assert [c.first.label for c in found] == [
        "rank=1, mean over 2 of layers", "rank=16, mean over 2 of layers",
        "layers=last:1, mean over 3 of rank"]  # fmt: skip
    mean = {k: [np.mean([row[M] for row in rows if row["seed"] == s and row["adapter.layers"] == k]) for s in range(3)]
            for k in ("last:1", "all")}  # fmt: skip
    expected = stats.ttest_rel(mean["last:1"], mean["all"])
    assert math.isclose(found[2].paired.p, expected.pvalue, rel_tol=1e-9)
    assert math.isclose(found[2].paired.difference, np.mean(mean["last:1"]) - np.mean(mean["all"]))
    assert all(c.comparisons == 3 for c in found) and found[2].verdict.startswith("worse by 0.0")
    table = effects.table(found)
    assert [(row["axis"], row["value"], row["baseline"]) for row in table] == [
        ("adapter.rank", 1, 4), ("adapter.rank", 16, 4), ("adapter.layers", "last:1", "all")]  # fmt: skip
    assert table[2]["averaged"] == "over 3 of rank" and table[2]["p_holm"] == found[2].p


def test_nulls_are_called_effects_as_often_as_the_level_says():
    rng, single, family = np.random.default_rng(1), 0, 0
    for _ in range(400):
        found = effects.compare(worlds.rows(GRID, lambda c: 0.8, rng=rng), M, BASE)
        single += found[2].paired.p < 0.05
        family += any(c.p < 0.05 for c in found)
    assert stats.binomtest(single, 400, 0.05).pvalue > 0.01
    assert stats.binomtest(family, 400, 0.05, alternative="greater").pvalue > 0.01


def test_averaging_finds_what_single_arms_do_not():
    """An effect of the spread of one arm, over 9 ranks: the averages show it, the single pairs seldom do."""
    rng, averaged, alone = np.random.default_rng(2), 0, 0
    grid = worlds.cells(adapter__rank=list(range(1, 10)), adapter__layers=["last:1", "all"], seed=range(3))
    for _ in range(40):
        rows = worlds.rows(grid, lambda c: 0.8 + 0.01 * (c["adapter.layers"] == "all"), spread=0.01, rng=rng)
        found = [c for c in effects.compare(rows, M, BASE) if c.first.label.startswith("layers=")]
        averaged += found[0].paired.p < 0.05
        one = {
            k: [row[M] for row in rows if (row["adapter.rank"], row["adapter.layers"]) == (4, k)]
            for k in ("all", "last:1")
        }
        alone += stats.ttest_rel(*one.values()).pvalue < 0.05
    for found, spread in ((averaged, 0.01 * math.sqrt(2 / 9)), (alone, 0.01 * math.sqrt(2))):
        assert stats.binomtest(found, 40, statistics.power(0.01, spread, 3)).pvalue > 0.01
    assert averaged > 2 * alone


def test_only_cells_that_all_values_have_with_all_seeds_are_averaged():
    rows = worlds.rows(GRID, lambda c: None if (c["adapter.rank"], c["seed"]) == (16, 2) else 0.8)
    found = effects.compare(rows, M, BASE)
    assert [c.first.label for c in found] == ["layers=last:1, mean over 2 of rank"]
    assert [c.paired.n for c in found] == [3]


def test_one_axis_or_a_settled_one_has_no_averages():
    assert effects.compare(worlds.rows([c for c in GRID if c["adapter.layers"] == "all"], lambda c: 0.8), M, BASE) == []
    zipped = [{**c, "adapter.alpha": 2 * c["adapter.rank"]} for c in GRID if c["adapter.layers"] == "all"]
    assert effects.compare(worlds.rows(zipped, lambda c: 0.8), M, BASE) == []
    cross = [c for c in GRID if c["adapter.layers"] == "all" or c["adapter.rank"] == 4]
    assert effects.compare(worlds.rows(cross, lambda c: 0.8), M, BASE) == []
