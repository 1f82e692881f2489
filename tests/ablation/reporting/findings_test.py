"""The sentences on what a grid supports, and that no more is claimed than the numbers allow."""

import math

import numpy as np
import pytest
from scipy import stats

from lora_jax.ablation.comparing import effects, groups, search
from lora_jax.ablation.reporting import findings
from lora_jax.ablation.reporting.findings import Told
from tests.ablation import worlds
from tests.ablation.worlds import M

RANKS = worlds.cells(adapter__rank=[1, 2, 4, 8], seed=range(3))


def told(rows, base=None, **changed):
    made = groups.grouped(rows, M)
    base = groups.find(made, base) if base else made[0]
    compared = groups.compare([(g, base) for g in made if g is not base], M)
    given = dict(metric=M, better="max", made=made, base=base, compared=compared, found=[], chosen_by=M, optimism=None,
                 examples=872, axes=["adapter.rank"], effects=[], failed=0, missing=0)  # fmt: skip
    return Told(**{**given, **changed})


def sentence(sentences, word):
    [found] = [s for s in sentences if word in s]
    return found


def test_a_known_effect_is_told_and_the_rest_is_not():
    rows = worlds.rows(RANKS, lambda c: 0.7 if c["adapter.rank"] == 1 else 0.85, spread=0.002)
    says = findings.supports(told(rows, "rank=8"))
    assert sentence(says, "Against the baseline") == (
        "Against the baseline rank=8 (paired over seeds, Holm over 3 comparisons): 1 worse (rank=1), "
        "2 not distinguishable."
    )
    assert "Of the 3 others, 1 can be told from it and 2 cannot (Holm over all 6 pairs, since" in sentence(
        says, "best mean"
    )
    assert sentence(says, "Noise floor").startswith("Noise floor, from the baseline's seeds: seeds alone let two means")


def test_the_best_of_equals_is_told_from_the_others_as_seldom_as_the_level_says():
    """Picked after looking: tested against each other as if it had been named before, it would be wrong more often."""
    rng, wrong, naive = np.random.default_rng(0), 0, 0
    for _ in range(300):
        made = groups.grouped(worlds.rows(RANKS, lambda c: 0.8, rng=rng), M)
        wrong += ", 0 can be told" not in findings.best(made, "max")
        top = max(made, key=lambda g: g.interval().mean)
        naive += any(findings._paired(g, top, 0.05).p < 0.05 for g in made if g is not top)
    assert stats.binomtest(wrong, 300, 0.05, alternative="greater").pvalue > 0.01
    assert naive > 45


def test_one_seed_supports_no_comparison():
    rows = worlds.rows([c for c in RANKS if c["seed"] == 0], lambda c: 0.8)
    says = findings.supports(told(rows))
    assert len(says) == 1 and "cannot be told without at least 2 seeds" in says[0]
    assert sentence(findings.limits(told(rows)), "One seed a choice").endswith("may be the seed's.")


def test_less_loss_is_the_best():
    rows = worlds.rows(RANKS, lambda c: 0.5 + 0.1 * (c["adapter.rank"] == 2), spread=0.001)
    made = groups.grouped(rows, M)
    assert "that of rank=2:" in findings.best(made, "max") and "that of rank=2:" not in findings.best(made, "min")
    text = findings.against(groups.compare([(made[1], made[0])], M, "min"), made[0], "min")
    assert text.endswith("(paired over seeds, one comparison): 1 worse (rank=2).")


def test_the_grain_of_the_examples_is_the_binomial_error():
    text = sentence(findings.limits(told(worlds.rows(RANKS, lambda c: 0.8, spread=0, common=0))), "binomial")
    error = math.sqrt(0.8 * 0.2 / 872)
    assert "of 872 examples one is 0.0011" in text and f"0.800, is {error:.3f}" in text and f"{error:.3f}" == "0.014"
    rows = worlds.rows(RANKS, lambda c: 0.8)
    assert "how many there are is not known" in sentence(findings.limits(told(rows, examples=None)), "share the dev")
    assert not any("binomial" in s for s in findings.limits(told(rows, metric="dev.loss")))


def test_what_is_too_small_to_be_seen_is_said():
    rows = worlds.rows(RANKS, lambda c: 0.8)
    one = told(rows)
    spread = math.sqrt(np.mean([c.paired.sd**2 for c in one.compared]))
    size = findings.statistics.smallest_found(spread, 3, 0.05 / 3)
    text = sentence(findings.limits(one), "3 seeds a choice")
    assert f"below about {findings.verdicts.number(size, size)} is missed in more than 20 of 100" in text
    assert "corrected for 3 comparisons" in text


def test_a_search_is_warned_of_at_its_edges_and_for_its_optimism():
    rows = worlds.rows(worlds.METHOD_GRID, worlds.method_effect, test=True)
    found = search.search(rows, M, "max")
    own = dict(found=found, optimism=0.004, axes=["adapter.method", "train.learning_rate"])
    same = findings.limits(told(rows, **own))
    text = sentence(same, "best of 4")
    assert "the same numbers are compared: the means are too good (by up to about 0.004 here)" in text
    assert "method=full (0.0003); method=ia3 (0.01)" in sentence(same, "WARNING")
    other = sentence(findings.limits(told(rows, **own)._replace(metric="test.accuracy")), "best of 4")
    assert other.endswith("so choices are compared by test.accuracy, which had no part in it.")
    assert not any("had the same learning rate" in s for s in same)


def test_what_does_not_apply_is_not_said():
    rows = worlds.rows(RANKS, lambda c: 0.8)
    says = findings.limits(told(rows))
    assert not any(word in s for s in says for word in ("WARNING", "failed", "not run", "best of"))
    assert any("Every choice had the same learning rate" in s for s in says) and any("One data set" in s for s in says)
    more = findings.limits(told(rows, failed=1, missing=2, axes=["data.path"]))
    assert "1 arm failed and is in no mean; the reasons are listed below." in more
    assert "2 arms of the grid have not run: this is a report on a part of it." in more
    assert not any("One data set" in s or "learning rate" in s for s in more)


@pytest.mark.parametrize(
    "effect, words", [(0.0, "none of 3 can be told"), (0.1, "layers=last:1 is worse than layers=all, by 0.1")]
)
def test_axes_by_themselves(effect, words):
    grid = worlds.cells(adapter__rank=[1, 4, 16], adapter__layers=["last:1", "all"], seed=range(3))
    rows = worlds.rows(grid, lambda c: 0.8 + effect * (c["adapter.layers"] == "all"), spread=0.002)
    compared = effects.compare(rows, M, {"adapter.rank": 4, "adapter.layers": "all"})
    text = findings.by_axis(compared, "max")
    assert words in text and ("2 more cannot be told from" in text) == (effect > 0)
    real = [c for c in compared if c.p <= 0.05]
    assert not real or "cannot" not in findings.by_axis(real, "max")


def test_a_choice_without_a_result_is_counted_as_such():
    rows = [
        {
            "arm": str(i),
            "status": "done",
            "adapter.rank": 1 + i // 3,
            "seed": i % 3,
            "dev.accuracy": 0.1 * i + 0.01 * (i == 5),
        }
        for i in range(6)
    ]
    rows += [{"arm": "x", "status": "failed", "adapter.rank": 9, "seed": 0, "reason": "no"}]
    made = groups.grouped(rows, "dev.accuracy")
    pairs = groups.compare([(made[1], made[0]), (made[2], made[0])], "dev.accuracy")
    assert "1 without a result." in findings.against(pairs, made[0], "max") and "2 not" not in findings.against(
        pairs, made[0], "max"
    )
    assert findings.best(made, "max").endswith(("It can be told from the other.", "It cannot be told from the other."))
