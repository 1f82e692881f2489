"""The best group against the next on the examples themselves: told where there are predictions, by the right test."""

import numpy as np
import pytest

from lora_jax import records
from lora_jax.ablation.comparing import groups
from lora_jax.ablation.reporting import by_example, report
from tests.ablation import worlds
from tests.ablation.worlds import M

RANKS = worlds.cells(adapter__rank=[1, 4, 8], seed=[0, 1])
BEST_FIRST = {8: 0.9, 4: 0.8, 1: 0.5}  # the share of examples that each rank has right


def predict(folder, rows, count=200):
    """Predictions in which a rank has the first examples right, the better one wherever the other."""
    for row in rows:
        right = np.arange(count) < round(BEST_FIRST[row["adapter.rank"]] * count) - row["seed"]
        lines = [{"id": i, "label": "a", "prediction": "ab"[not r], "correct": bool(r)} for i, r in enumerate(right)]
        records.write_jsonl(folder / "runs" / row["arm"] / "predictions" / "dev.jsonl", lines)
    return rows


@pytest.fixture
def grid(tmp_path):
    rows = worlds.rows(RANKS, lambda c: BEST_FIRST[c["adapter.rank"]], spread=0.001)
    worlds.write(tmp_path, rows, curves=False)
    return tmp_path, rows


def test_the_report_compares_the_best_with_the_next_where_predictions_are_kept(grid):
    folder, rows = grid
    report.write(folder)
    assert "Example by example" not in (folder / "report.md").read_text()
    predict(folder, rows)
    report.write(folder)
    [found] = [line for line in (folder / "report.md").read_text().splitlines() if "Example by example" in line]
    assert (
        "Example by example on dev, the best (rank=8) and the next (rank=4) can be told apart in 2 of 2 seeds" in found
    )
    assert "(McNemar's exact test, Holm over 2 seeds; seed 0: of 200 only the best has 20 right" in found
    assert "only the next 0, p < 0.001; seed 1: " in found
    assert "Example by example on dev" in (folder / "report.html").read_text()


def test_equal_predictions_are_not_told_apart_and_other_metrics_are_bootstrapped(grid):
    folder, rows = grid
    for row in rows:
        lines = [{"id": i, "loss": 1.0 + (i % 7) * (1 + (i + row["adapter.rank"]) % 2)} for i in range(100)]
        records.write_jsonl(folder / "runs" / row["arm"] / "predictions" / "dev.jsonl", lines)
    made = groups.grouped(rows, "dev.loss")
    told = by_example.compare(folder, rows, made, "dev.loss", "min")
    text = by_example.sentence(told)
    assert [g.label for g in (told.first, told.second)] == ["rank=8", "rank=4"] and set(told.seeds) == {0, 1}
    assert "cannot be told apart (a paired bootstrap over the examples" in text and "difference 0" in text


def test_other_examples_or_a_metric_of_no_single_example_say_nothing(grid):
    folder, rows = grid
    predict(folder, rows)
    made = groups.grouped(rows, M)
    assert by_example.compare(folder, rows, made, "dev.bleu", "max") is None
    assert by_example.compare(folder, rows, made[:1], M, "max") is None
    predict(folder, [row for row in rows if row["adapter.rank"] == 4], count=199)
    assert by_example.compare(folder, rows, made, M, "max") is None
