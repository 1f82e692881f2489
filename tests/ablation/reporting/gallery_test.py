"""Which figures a grid gets."""

import csv

import pytest

from lora_jax import records
from lora_jax.ablation.comparing import groups, search
from lora_jax.ablation.reporting import gallery
from lora_jax.ablation.reporting.gallery import Gallery
from tests.ablation import worlds
from tests.ablation.worlds import M


@pytest.fixture()
def drawn(monkeypatch, tmp_path):
    """Fills a gallery without drawing: what would be drawn, with the rows and options it got."""
    calls = {}

    def pretend(name):
        def draw(rows, path, metric, **options):
            calls[path.stem] = (name, rows, options)
            return gallery.Plot(path, path.with_suffix(".csv"), name)

        return draw

    for name in ("metric_by_rank", "heat_map", "learning_curves", "dots"):
        monkeypatch.setattr(gallery.plots, name, pretend(name))
    monkeypatch.setattr(gallery.pareto, "pareto", pretend("pareto"))

    def fill(rows, searched=False, curves=False):
        calls.clear()
        if curves:
            worlds.write(tmp_path, rows)
        found = search.search(rows, M, "max") if searched else []
        made = [one.group for one in found] or groups.grouped(rows, M)
        made_gallery = Gallery(tmp_path, tmp_path / "plots", M, "max")
        made_gallery.fill(rows, made, made[0], found, M)
        return made_gallery, calls

    return fill


def flat(_):
    return 0.8


def test_ranks_and_layers_are_lines_a_map_and_the_front(drawn):
    _, calls = drawn(worlds.rows(worlds.RANK_GRID, worlds.rank_effect))
    assert list(calls) == ["rank", "layers_by_rank", "pareto"]
    assert calls["rank"][2]["by"] == ["adapter.layers"] and calls["pareto"][2]["by"] == ["adapter.layers"]
    assert (calls["layers_by_rank"][2]["x"], calls["layers_by_rank"][2]["y"]) == ("adapter.rank", "adapter.layers")


def test_layers_and_matrices_are_a_map_for_each_rank(drawn):
    made, calls = drawn(worlds.rows(worlds.MAP_GRID, worlds.map_effect))
    assert list(calls) == ["layers_by_targets"]
    assert (calls["layers_by_targets"][2]["x"], calls["layers_by_targets"][2]["y"]) == (
        "adapter.targets",
        "adapter.layers",
    )
    two = [{**cell, "adapter.rank": rank} for rank in (1, 8) for cell in worlds.MAP_GRID]
    made, calls = drawn(worlds.rows(two, worlds.map_effect))
    assert [name for name in calls if "targets" in name] == ["layers_by_targets_1", "layers_by_targets_2"]
    assert {row["adapter.rank"] for row in calls["layers_by_targets_2"][1]} == {8}
    assert made.plots[[p.png.stem for p in made.plots].index("layers_by_targets_2")].caption.startswith("rank = 8: ")


def test_a_rank_that_the_budget_settles_is_no_axis_of_a_figure(drawn):
    ranks = {"q": 36, "q,v": 18, "up": 14}
    grid = [
        {**c, "adapter.rank": ranks[c["adapter.targets"]]}
        for c in worlds.cells(adapter__targets=list(ranks), seed=[0, 1])
    ]
    _, calls = drawn(worlds.rows(grid, flat))
    assert list(calls) == ["choices", "pareto"] and calls["choices"][0] == "dots"


def test_methods_with_a_search_are_shown_at_their_best(drawn):
    rows = worlds.rows(worlds.METHOD_GRID, worlds.method_effect)
    made, calls = drawn(rows, searched=True, curves=True)
    assert list(calls) == ["method_by_learning_rate", "at_best", "pareto", "learning_curves"]
    means = [g.interval().mean for g in calls["at_best"][1]]
    assert means == sorted(means, reverse=True) and len(means) == 10
    assert all("train.learning_rate" not in row for row in calls["pareto"][1]) and len(calls["pareto"][1]) == 30
    labels = {row["label"] for row in calls["learning_curves"][1]}
    assert len(labels) == 7 and "lora" in labels and "head" not in labels  # the baseline among the best, not the worst
    assert made.plots[-1].caption.endswith(" The 7 with the best means, the baseline among them, of 10.")
    assert "Without 3 arms that failed." in made.plots[0].caption
    _, calls = drawn([row for row in rows if row["adapter.method"] in ("lora", "full")], searched=True)
    assert list(calls)[0] == "learning_rate" and calls["learning_rate"][2]["x"] == "train.learning_rate"


def test_too_many_lines_are_shared_among_figures(drawn):
    grid = worlds.cells(adapter__rank=[1, 4], adapter__layers=["last:1", "last:3", "all"], adapter__alpha=[1, 2, 4, 8],
                        seed=[0])  # fmt: skip
    made, calls = drawn(worlds.rows(grid, flat))
    assert [name for name in calls if name.startswith("rank")] == ["rank_1", "rank_2", "rank_3"]
    assert calls["rank_1"][2]["by"] == ["adapter.alpha"]
    assert gallery.apart(worlds.rows(grid, flat), ["adapter.rank", "adapter.layers"]) == (
        ["adapter.rank", "adapter.layers"],
        [],
    )


def test_more_figures_than_anyone_looks_at_are_named_instead(drawn):
    grid = worlds.cells(
        adapter__rank=[1, 4], adapter__layers=["last:1", "all"], train__steps=list(range(1, 9)), seed=[0]
    )
    made, calls = drawn(worlds.rows(grid, flat))
    assert len([name for name in calls if name.startswith("layers_by_rank")]) == 6
    assert any(
        note.startswith("layers_by_rank: 2 more of these figures were not drawn (steps = 7; ") for note in made.notes
    )


def test_one_group_has_curves_only_and_no_curves_are_said(drawn):
    rows = worlds.rows(worlds.cells(adapter__rank=[4], seed=[0, 1]), flat)
    made, calls = drawn(rows)
    assert not calls and made.notes == ["no finished arm has runs/<arm>/metrics.jsonl: there are no learning curves"]
    _, calls = drawn(rows, curves=True)
    assert list(calls) == ["learning_curves"]


def test_what_cannot_be_drawn_is_noted_and_the_rest_is_drawn(tmp_path):
    rows = worlds.rows(worlds.RANK_GRID, lambda c: None if c["adapter.layers"] == "all" else 0.8)
    made = Gallery(worlds.write(tmp_path, rows), tmp_path / "plots", M, "max")
    ready = groups.grouped(rows, M)
    made.fill(rows, ready, ready[0])
    assert [p.png.name for p in made.plots][:2] == ["rank.png", "layers_by_rank.png"]
    assert all(p.png.exists() and list(csv.reader(p.csv.read_text().splitlines())) for p in made.plots)
    assert made.plots[0].caption.endswith(" Without 18 arms that failed.")


def test_equal_budgets_have_no_front(drawn):
    rows = worlds.rows(worlds.cells(adapter__targets=["q", "k", "v"], seed=[0, 1]), flat)
    sized = lambda *sizes: [{**row, "trainable_params": sizes[i % len(sizes)]} for i, row in enumerate(rows)]  # noqa: E731
    assert "pareto" not in drawn(sized(1000, 1090))[1]
    assert "pareto" in drawn(sized(1000, 1110))[1]


def test_where_dev_was_looked_at_once_the_training_loss_is_shown(drawn, tmp_path):
    rows = worlds.rows(worlds.cells(adapter__rank=[4], seed=[0, 1]), flat)
    assert drawn(rows, curves=True)[1]["learning_curves"][2]["split"] == "dev"
    for row in rows:
        lines = [{"step": s, "split": "train", "loss": 1 / s} for s in (1, 2)]
        lines.append({"step": 2, "split": "dev", "accuracy": 0.8, "loss": 0.4})
        records.write_jsonl(tmp_path / "runs" / row["arm"] / "metrics.jsonl", lines)
    (name, shown, options) = drawn(rows)[1]["learning_curves"]
    assert options["split"] == "train" and {row["split"] for row in shown} == {"train", "dev"}
