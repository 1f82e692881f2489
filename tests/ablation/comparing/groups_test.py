"""From rows of arms to groups.csv: who is in a group, what is left out, and how often a null grid cries wolf."""

import math

import numpy as np
import pytest
from scipy import stats

from lora_jax.ablation import results
from lora_jax.ablation.comparing import groups
from lora_jax.errors import UserError

M = "dev.accuracy"


def arm(rank, seed, value, status="done", layers="all", **extra):
    return {"arm": f"{rank}{layers}{seed}", "status": status, "reason": None, "adapter.rank": rank,
            "adapter.layers": layers, "seed": seed, "trainable_params": 100 * rank, M: value, **extra}  # fmt: skip


def grid(rng, effects, seeds, spread=0.01, common=0.02):
    """Accuracies with what a seed does to every arm alike, what it does to each, and each rank's true effect."""
    shared = rng.normal(0.8, common, seeds)
    noise = rng.normal(0, spread, (len(effects), seeds))
    return [arm(2**i, s, shared[s] + e + noise[i, s]) for i, e in enumerate(effects) for s in range(seeds)]


def compared(rows, baseline):
    made = groups.grouped(rows, M)
    base = groups.find(made, baseline)
    return groups.compare([(g, base) for g in made if g is not base], M)


def test_a_group_is_what_differs_in_the_seed_only():
    rows = [arm(r, s, 0.1 * r + s, layers=k) for r in (1, 2) for k in ("all", "last:1") for s in (0, 1)]
    made = groups.grouped(rows, M)
    assert [g.label for g in made] == ["rank=1, layers=all", "rank=1, layers=last:1", "rank=2, layers=all",
                                      "rank=2, layers=last:1"]  # fmt: skip
    assert made[2].values == {0: 0.2, 1: 1.2} and made[2].trainable_params == 200
    assert made[2].axes == {"adapter.rank": 2, "adapter.layers": "all"}
    assert groups.find(made, {"adapter.rank": 2, "adapter.layers": "all"}) is made[2]
    assert [g.label for g in groups.grouped(rows[:2], M)] == ["all arms"]
    assert [g.label for g in groups.grouped(rows[::2], M, axes=["adapter.layers", "adapter.rank"])][
        0
    ] == "layers=all, rank=1"
    clash = [{"arm": i, "status": "done", "a.rank": i, "b.rank": i, "seed": 0, M: 0.5} for i in (1, 2)]
    assert groups.grouped(clash, M)[0].label == "a.rank=1, b.rank=1"


def test_the_paired_test_uses_what_a_seed_does_to_both():
    rows = grid(np.random.default_rng(0), [0, 0.02], 8, common=0.1)
    [found] = compared(rows, "rank=1")
    values = {r: [row[M] for row in rows if row["adapter.rank"] == r] for r in (1, 2)}
    expected = stats.ttest_rel(values[2], values[1])
    assert math.isclose(found.p, expected.pvalue, rel_tol=1e-9)
    assert math.isclose(found.paired.difference, np.mean(values[2]) - np.mean(values[1]))
    assert found.p < 0.05 < stats.ttest_ind(values[2], values[1]).pvalue
    assert found.verdict.startswith("better by 0.0")
    shuffled = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    assert math.isclose(compared(shuffled, "rank=1")[0].p, found.p, rel_tol=1e-9)  # by seed, not by order


def test_null_grids_cry_wolf_as_often_as_they_say():
    """400 grids in which nothing differs. Holm keeps 'any comparison of the grid is significant' at the level."""
    rng, single, family = np.random.default_rng(1), 0, 0
    for _ in range(400):
        found = compared(grid(rng, [0.0] * 5, 3), "rank=1")
        single += found[0].paired.p < 0.05
        family += any(c.p < 0.05 for c in found)
        assert all(c.verdict.startswith("not distinguishable with 3 seeds; ") == (c.p > 0.05) for c in found)
        assert all(c.needed is None or c.needed > 3 for c in found if c.p > 0.05)
    assert stats.binomtest(single, 400, 0.05).pvalue > 0.01
    assert stats.binomtest(family, 400, 0.05, alternative="greater").pvalue > 0.01


def test_a_known_effect_is_found_as_often_as_its_power_says():
    rng, found = np.random.default_rng(2), 0
    truth = groups.statistics.power(0.02, 0.01 * math.sqrt(2), 6)
    for _ in range(400):
        found += compared(grid(rng, [0, 0.02], 6), "rank=1")[0].p < 0.05
    assert 0.6 < truth < 0.9 and stats.binomtest(found, 400, truth).pvalue > 0.01


def test_failed_and_nan_arms_are_left_out_and_said():
    rows = [arm(1, s, 0.8 + 0.001 * s) for s in range(3)]
    rows += [arm(2, 0, 0.9), arm(2, 1, math.nan), arm(2, 2, 0.99, status="failed", reason="NaN at step 7")]
    [found] = compared(rows, "rank=1")
    assert found.first.left_out == ("2all1 (seed 1): dev.accuracy is nan", "2all2 (seed 2): failed, NaN at step 7")
    assert found.first.values == {0: 0.9} and found.paired.n == 1
    assert found.verdict == (
        "cannot be told from 1 seed (better by 0.1, no interval): at least 2 seeds are needed; "
        "arms left out: 2 failed or not finite, 2 without a partner"
    )
    nothing = [arm(1, 0, 0.8), arm(2, 0, None, status="failed")]
    assert compared(nothing, "rank=1")[0].verdict.startswith("no seed in common: nothing to compare; arms left out: 1")


def test_unequal_seeds_are_paired_where_both_have_them():
    rows = [arm(1, s, 0.8 + 0.01 * s) for s in range(4)] + [arm(2, s, 0.85 + 0.012 * s) for s in (1, 3, 5)]
    [found] = compared(rows, "rank=1")
    assert found.paired.n == 2
    assert math.isclose(found.paired.difference, (0.862 - 0.81 + 0.886 - 0.83) / 2)
    assert found.verdict.endswith("arms left out: 3 without a partner")
    table = groups.table(rows, [M], "rank=1")
    assert [(row["n"], row["shared_seeds"]) for row in table] == [(4, None), (3, 2)]


def test_the_family_is_every_comparison_of_a_metric():
    rows = grid(np.random.default_rng(3), [0, 0.03, 0.03, 0.0], 3, spread=0.003)
    found = compared(rows, "rank=1")
    assert [c.comparisons for c in found] == [3, 3, 3]
    assert [c.p for c in found] == groups.statistics.holm([c.paired.p for c in found])
    assert "after Holm over 3 comparisons" in found[0].verdict
    alone = compared([row for row in rows if row["adapter.rank"] in (1, 8)], "rank=1")[0]
    assert alone.p == alone.paired.p and alone.needed < found[2].needed and "Holm" not in alone.verdict


def test_less_loss_is_better():
    rows = [{**arm(r, s, 0.5), "dev.loss": 0.5 - 0.01 * r + 0.0001 * s * r} for r in (1, 2) for s in range(3)]
    made = groups.grouped(rows, "dev.loss")
    assert groups.compare([(made[1], made[0])], "dev.loss")[0].verdict.startswith("better by 0.00")
    assert groups.compare([(made[1], made[0])], "dev.loss", better="max")[0].verdict.startswith("worse by 0.00")


def test_groups_csv_has_means_differences_and_verdicts(tmp_path):
    rows = grid(np.random.default_rng(4), [0, 0.05], 4)
    for row in rows:
        row["dev.loss"] = 1 - row[M]
    written = groups.write_groups(tmp_path / "groups.csv", rows, [M, "dev.loss"], baseline={"adapter.rank": 1})
    text = (tmp_path / "groups.csv").read_text().splitlines()
    names = text[0].split(",")
    assert names == ["group", "adapter.rank", "adapter.layers", "trainable_params", "metric", "n", "seeds", "mean",
                     "sd", "low", "high", "left_out", "baseline", "difference", "difference_low", "difference_high",
                     "shared_seeds", "p", "p_holm", "seeds_needed", "noise_floor", "verdict"]  # fmt: skip
    assert len(text) == 5 and [row["group"] for row in written] == ["rank=1", "rank=2"] * 2
    base, other = written[:2]
    values = [row[M] for row in rows if row["adapter.rank"] == 2]
    low, high = stats.ttest_1samp(values, 0).confidence_interval()
    np.testing.assert_allclose([other["low"], other["high"]], [low, high], rtol=1e-9)
    assert base["verdict"].startswith("the baseline; seeds alone let two means of 4 seeds differ by up to 0.0")
    assert base["noise_floor"] > 0 and base["difference"] is None and other["baseline"] == "rank=1"
    assert other["difference_low"] < other["difference"] < other["difference_high"]
    assert math.isclose(written[3]["difference"], -other["difference"]) and written[3]["verdict"].startswith("better")
    alone = groups.table(rows, [M])
    assert all(row["p"] is None and "(4 seeds)" in row["verdict"] for row in alone)


def test_user_mistakes_are_named():
    rows = [arm(1, 0, 0.5), arm(2, 0, 0.5)]
    with pytest.raises(UserError, match="no arm has the metric 'dev.acuracy'; did you mean 'dev.accuracy'"):
        groups.grouped(rows, "dev.acuracy")
    with pytest.raises(UserError, match="the arms 1all0 and again .* both have the seed 0"):
        groups.grouped([*rows, {**rows[0], "arm": "again"}], M)
    with pytest.raises(UserError, match="no groups are 'rank=3', one was expected; did you mean 'rank="):
        groups.find(groups.grouped(rows, M), "rank=3")
    with pytest.raises(UserError, match="2 groups are {'adapter.layers': 'all'}, one was expected; rank=1, rank=2"):
        groups.find(groups.grouped(rows, M), {"adapter.layers": "all"})


def test_what_was_read_from_results_csv_groups_as_what_was_written(tmp_path):
    rows = [{**arm(1, s, 0.5 + s), "adapter.targets": t} for s in (0, 1) for t in (["q", "v"], None)]
    for i, row in enumerate(rows):
        row["arm"] = str(i)
    results.write_results(tmp_path / "r.csv", rows)
    assert groups.grouped(results.read_results(tmp_path / "r.csv"), M) == groups.grouped(rows, M)
