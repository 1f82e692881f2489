"""Which axes vary, which follow from another one, and how values are written."""

import math

from lora_jax.ablation.comparing import axes


def rows(names, *values):
    return [dict(zip(names, v)) | {"dev.accuracy": i, "seed": i} for i, v in enumerate(values)]


def test_seed_and_metrics_are_no_axes_and_constants_do_not_vary():
    table = rows(["adapter.rank", "adapter.alpha"], (1, 16), (2, 16))
    assert axes.varying(table) == ["adapter.rank"]
    assert axes.varying(rows(["a.x"], ([0],), ([1],))) == ["a.x"]
    assert axes.varying(table[:1]) == []


def test_an_axis_that_another_one_settles_is_not_free():
    budget = rows(["adapter.targets", "adapter.rank"], ("q", 36), ("k", 36), ("q,v", 18))
    assert axes.varying(budget) == ["adapter.targets", "adapter.rank"] and axes.free(budget) == ["adapter.targets"]
    turned = rows(["adapter.rank", "adapter.targets"], (36, "q"), (36, "k"), (18, "q,v"))
    assert axes.free(turned) == ["adapter.targets"]
    both = rows(["a.x", "a.y"], (1, "u"), (2, "v"))
    assert axes.free(both) == ["a.x"]
    full = rows(["a.x", "a.y"], (1, "u"), (2, "u"), (1, "v"), (2, "v"))
    assert axes.free(full) == ["a.x", "a.y"]


def test_only_positive_numbers_have_a_place_on_a_logarithmic_axis():
    table = rows(["a.x"], (1,), (0.5,), (0,), (-1,), (None,), ("q",), (True,), (math.inf,), (math.nan,))
    assert [row["a.x"] for row in axes.positive(table, "a.x")] == [1, 0.5]


def test_split_describes_its_parts():
    table = rows(["a.layers", "a.x"], ("all", 1), ("last:1", 1), ("all", 2))
    parts = axes.split(table, ["a.layers"])
    assert [(what, len(part)) for what, part in parts] == [("layers = all", 2), ("layers = last:1", 1)]
    assert [what for what, _ in axes.split(table, [])] == [""] and axes.count(table, ["a.layers", "a.x"]) == 3


def test_values_are_written_for_a_reader():
    assert [axes.text(v) for v in (None, [0, 1], ("q", "v"), 1e-05, 0.0003, 8, "all")] == [
        "default", "0+1", "q+v", "1e-05", "0.0003", "8", "all"]  # fmt: skip
    assert axes.text(0.1234567891) == "0.1234567891"  # shortened, it would be another value
    assert axes.values([4, 1, 4, 2]) == ["1", "2", "4"] and axes.values(["b", "a", None]) == ["b", "a", "default"]
    assert axes.title("train.learning_rate") == "learning rate"
