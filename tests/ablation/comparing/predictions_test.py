"""Paired tests on lines of predictions/*.jsonl."""

import numpy as np
import pytest
from scipy import stats

from lora_jax import records
from lora_jax.ablation.comparing import predictions, statistics
from lora_jax.errors import UserError


def classified(rng, right, n=200):
    labels = ["no" if x else "yes" for x in np.random.default_rng(0).random(n) < 0.7]
    other = {"no": "yes", "yes": "no"}
    lines = []
    for i, label in enumerate(labels):
        guess = label if rng.random() < right else other[label]
        lines.append(
            {"id": i, "label": label, "prediction": guess, "correct": guess == label, "loss": float(rng.random())}
        )
    return lines


def test_accuracy_is_mcnemars_exact_test(tmp_path):
    lines = [classified(np.random.default_rng(seed), right) for seed, right in ((1, 0.9), (2, 0.7))]
    for name, rows in zip("ab", lines):
        records.write_jsonl(tmp_path / f"{name}.jsonl", rows)
    a, b = (records.read_jsonl(tmp_path / f"{name}.jsonl") for name in "ab")
    found = predictions.compare(a, b, "accuracy")
    only = [sum(x["correct"] > y["correct"] for x, y in zip(*pair)) for pair in ((a, b), (b, a))]
    assert [found.only_first, found.only_second] == only
    assert found.p == pytest.approx(stats.binomtest(only[0], sum(only)).pvalue)
    assert found.p < 0.001 and predictions.compare(a, a, "accuracy").p == 1


def test_macro_f1_by_hand_and_as_the_task_counts_it():
    x = np.array([[0, 0], [0, 0], [0, 1], [1, 1]])
    assert predictions.macro_f1(2)(x) == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert predictions.macro_f1(3)(x) == pytest.approx((4 / 5 + 2 / 3) / 3)
    a, b = classified(np.random.default_rng(1), 0.9), classified(np.random.default_rng(2), 0.7)
    found = predictions.compare(a, b, "macro_f1", resamples=300)
    assert found.low < found.difference < found.high and found.p < 0.05
    assert predictions.compare(a, b, "macro_f1", resamples=300) == found
    assert predictions.compare(a, b, "macro_f1", resamples=300, seed=1) != found


def test_a_loss_per_token_weighs_its_examples():
    rng = np.random.default_rng(3)
    tokens = rng.integers(1, 50, 100).tolist()
    make = lambda shift: [  # noqa: E731
        {"id": i, "where": f"line {i}", "loss": float(shift + rng.random()), "tokens": n} for i, n in enumerate(tokens)
    ]
    a, b = make(0.0), make(0.3)
    none = {"id": 100, "where": "line 100", "loss": None, "tokens": 0}
    found = predictions.compare([*a, none], [*b, none], "loss", resamples=200)
    means = [np.average([line["loss"] for line in lines], weights=tokens) for lines in (a, b)]
    assert found.difference == pytest.approx(means[0] - means[1]) and found.n == 100 and found.p < 0.05


def test_a_loss_without_tokens_is_a_plain_mean():
    a, b = classified(np.random.default_rng(1), 0.9), classified(np.random.default_rng(2), 0.7)
    found = predictions.compare(a, b, "loss", resamples=200)
    x, y = (np.array([line["loss"] for line in lines]) for lines in (a, b))
    assert found == statistics.paired_bootstrap(x, y, resamples=200)


def test_lines_of_other_examples_are_refused():
    a = classified(np.random.default_rng(1), 0.9, 5)
    with pytest.raises(UserError, match="got 5 and 4 lines"):
        predictions.compare(a, a[:4], "accuracy")
    with pytest.raises(UserError, match="line 3 has the label .* in one file and 'x' in the other"):
        predictions.compare(a, [*a[:2], {**a[2], "label": "x"}, *a[3:]], "accuracy")
    with pytest.raises(UserError, match="line 1 of the predictions has no 'los'; did you mean 'loss'"):
        predictions.compare(a, a, "los")
    with pytest.raises(UserError, match="line 1 of the predictions: 'loss' must be a number, got None"):
        predictions.compare([{**a[0], "loss": None}, *a[1:]], a, "loss")
