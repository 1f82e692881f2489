"""Figures: a column's width, the numbers of the groups, a CSV beside each, series told apart without colour."""

import csv

import numpy as np
import pytest
from matplotlib.figure import Figure

from lora_jax import records
from lora_jax.ablation import results
from lora_jax.ablation.comparing import groups
from lora_jax.ablation.reporting import figure, pareto, plots
from lora_jax.errors import UserError

M = "dev.accuracy"


def arms(ranks=(1, 4, 16), layers=("last:1", "all"), seeds=3, **extra):
    rng = np.random.default_rng(0)
    return [
        {"arm": f"{r}{k}{s}", "status": "done", "adapter.rank": r, "adapter.layers": k, "seed": s,
         "trainable_params": 1000 * r * len(k), M: 0.8 + 0.01 * r**0.5 + rng.normal(0, 0.003), **extra}
        for r in ranks for k in layers for s in range(seeds)
    ]  # fmt: skip


@pytest.fixture()
def drawn(monkeypatch):
    """The axes of every figure that is saved."""
    seen = []
    save = Figure.savefig

    def spy(self, *args, **kwargs):
        seen.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    return seen


def table(plot):
    return list(csv.DictReader(plot.csv.read_text().splitlines()))


def test_a_png_is_as_wide_as_a_column_and_whole(tmp_path):
    plot = plots.metric_by_rank(arms(), tmp_path / "a" / "rank.png", M)
    head = plot.png.read_bytes()
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(head[16:20], "big") == 990  # 3.3 inch at 300 dpi
    assert sorted(p.name for p in plot.png.parent.iterdir()) == ["rank.csv", "rank.png"]


def test_rank_shows_the_means_and_intervals_of_the_groups(tmp_path, drawn):
    rows = arms()
    plot = plots.metric_by_rank(rows, tmp_path / "rank.png", M)
    axes = drawn[0].axes[0]
    by_label = {g.label: g.interval() for g in groups.grouped(rows, M)}
    for line, band, layers in zip(axes.lines, axes.collections, ("last:1", "all")):
        over = [by_label[f"rank={r}, layers={layers}"] for r in (1, 4, 16)]
        assert line.get_label() == layers and list(line.get_xdata()) == [1, 4, 16]
        np.testing.assert_allclose(line.get_ydata(), [100 * o.mean for o in over])
        top = band.get_paths()[0].vertices[:, 1].max()
        np.testing.assert_allclose(top, 100 * max(o.mean + o.half for o in over))
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel()) == ("log", "rank", "dev accuracy (%)")
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "4", "16"]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["last:1", "all"]
    assert drawn[0].legends[0].get_title().get_text() == "layers"
    assert plot.caption == "dev accuracy (%) against rank. Band: 95 % Student t interval over 3 seeds."
    found = [(row["adapter.rank"], row["series"], float(row[M]), row["seeds"]) for row in table(plot)]
    assert found[0] == ("1", "last:1", by_label["rank=1, layers=last:1"].mean, "3") and len(found) == 6


def test_one_seed_has_no_band_and_says_so(tmp_path, drawn):
    plot = plots.metric_by_rank(arms(layers=("all",), seeds=1), tmp_path / "rank.png", M)
    assert plot.caption.endswith("One seed: no intervals.") and not drawn[0].legends
    assert not np.isfinite(np.concatenate([p.vertices for b in drawn[0].axes[0].collections for p in b.get_paths()] or [
        np.full((1, 2), np.nan)])).all()  # fmt: skip
    assert table(plot)[0]["low"] == ""


def test_series_differ_in_marker_or_line_not_in_colour_alone():
    looks = [figure.style(i) for i in range(21)]
    assert len({(s["marker"], s["linestyle"]) for s in looks}) == 21
    assert len({(s["color"], s["marker"]) for s in looks}) == 21  # where no line is drawn


def test_the_heat_map_has_the_first_layer_at_the_bottom_and_holes_where_arms_failed(tmp_path, drawn):
    rows = [{"arm": f"{k}{t}", "status": "done", "adapter.layers": k, "adapter.targets": t, "seed": 0, M: 0.5 + 0.1 * k}
            for k in (2, 0, 1) for t in ("q", ["k", "v"])]  # fmt: skip
    rows[0] |= {"status": "failed", M: None}
    plot = plots.heat_map(rows, tmp_path / "heat.png", M)
    axes = drawn[0].axes[0]
    grid = np.ma.filled(axes.images[0].get_array(), np.nan)
    np.testing.assert_allclose(grid, [[50, 50], [60, 60], [np.nan, 70]])
    assert axes.images[0].origin == "lower"
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0", "1", "2"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["q", "k+v"]
    assert sorted(t.get_text() for t in axes.texts) == ["50.0", "50.0", "60.0", "60.0", "70.0"]
    assert drawn[0].axes[1].get_ylabel() == "dev accuracy (%)" and len(table(plot)) == 5


def test_the_front_is_what_nothing_smaller_beats():
    points = [(10, 0.8), (20, 0.79), (20, 0.85), (30, 0.85), (40, 0.9), (5, 0.1)]
    assert pareto.front(points, "max") == [0, 2, 4, 5]
    assert pareto.front(points, "min") == [5]
    for better, sign in (("max", 1), ("min", -1)):  # by the definition
        some = [tuple(p) for p in np.random.default_rng(1).integers(0, 9, (40, 2)).tolist()]
        beaten = [any(a <= x and sign * b >= sign * y and (a, b) != (x, y) for a, b in some) for x, y in some]
        assert {some[i] for i in pareto.front(some, better)} == {p for p, out in zip(some, beaten) if not out}


def test_pareto_shows_parameters_and_marks_the_front(tmp_path, drawn):
    rows = [{**row, "adapter.method": "lora"} for row in arms(layers=("all",))]
    rows += [{**rows[0], "arm": "full", "adapter.method": "full", "adapter.rank": None, "trainable_params": 9_000_000}]
    plot = pareto.pareto(rows, tmp_path / "pareto.png", M)
    axes = drawn[0].axes[0]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["lora", "full", "front"]
    assert list(axes.lines[0].get_xdata()) == [3000, 12000, 48000] and axes.get_xscale() == "log"
    front = {row["trainable_params"]: row["front"] for row in table(plot)}
    assert front == {"3000": "true", "12000": "true", "48000": "true", "9000000": "false"}
    assert "One seed" not in plot.caption and "over 1 to 3 seeds" in plot.caption
    pareto.pareto([{**row, "trainable_params": 7} for row in rows], tmp_path / "one.png", M)  # one size


def test_learning_curves_are_means_over_seeds_of_metrics_files(tmp_path, drawn):
    runs = []
    for label, shift in (("rank=1", 0.5), ("rank=4", 0.0)):
        for seed in (0, 1):
            file = tmp_path / f"{label}{seed}.jsonl"
            lines = [{"step": t, "split": "dev", "loss": shift + seed + 1 / t} for t in (1, 2, 4)]
            records.write_jsonl(file, [*lines, {"step": 4, "split": "train", "loss": 99.0}])
            runs.append((label, seed, file))
    plot = plots.learning_curves(plots.read_curves(runs), tmp_path / "curves.png", "loss")
    axes = drawn[0].axes[0]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [2.0, 1.5, 1.25])
    np.testing.assert_allclose(axes.lines[1].get_ydata(), [1.5, 1.0, 0.75])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step (updates)", "dev loss (nats)")
    assert [row["dev.loss"] for row in table(plot)][:3] == ["2.0", "1.5", "1.25"]


def test_many_curves_have_no_bands_and_the_caption_says_where_the_intervals_are(tmp_path, drawn):
    rows = [{"label": f"{k}", "seed": s, "step": t, "split": "dev", "loss": k + s + 1 / t}
            for k in range(5) for s in (0, 1) for t in (1, 2)]  # fmt: skip
    plot = plots.learning_curves(rows, tmp_path / "five.png", "loss", key="rank")
    assert not drawn[0].axes[0].collections and drawn[0].legends[0].get_title().get_text() == "rank"
    assert plot.caption.endswith("Means over 2 seeds; the intervals are in the CSV.") and table(plot)[0]["low"]
    plot = plots.learning_curves(rows[:16], tmp_path / "four.png", "loss")
    assert len(drawn[1].axes[0].collections) == 4 and "Band: 95 %" in plot.caption


def test_dots_show_groups_from_top_to_bottom_with_the_baseline(tmp_path, drawn):
    made = groups.grouped(arms(ranks=(4,), layers=([0], "last:1", "all")), M)
    plot = plots.dots(made, tmp_path / "dots.png", M, base=made[2])
    axes = drawn[0].axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0", "last:1", "all"] and axes.get_ylabel() == "layers"
    assert list(axes.get_yticks()) == [2, 1, 0]
    means, halves = zip(*((100 * g.interval().mean, 100 * g.interval().half) for g in made))
    [points] = [line for line in axes.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(np.asarray(points.get_xdata(orig=False), float), means)
    [bars] = axes.collections
    np.testing.assert_allclose(bars.get_segments()[0][:, 0], [means[0] - halves[0], means[0] + halves[0]])
    [baseline] = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert baseline.get_xdata()[0] == means[2] and table(plot)[2]["group"] == "layers=all"
    assert plot.caption.endswith("Dotted: the baseline, layers=all.")
    assert "Dotted" not in plots.dots(made, tmp_path / "none.png", M).caption


def test_groups_are_named_by_what_tells_them_apart():
    rows = [{**row, "adapter.alpha": 2 * row["adapter.rank"]} for row in arms()]
    assert figure.names(groups.grouped(rows, M))[:2] == ["rank=1, layers=last:1", "rank=1, layers=all"]
    assert figure.names(groups.grouped([row for row in rows if row["adapter.layers"] == "all"], M)) == ["1", "4", "16"]


def test_a_legend_reads_along_its_lines(tmp_path, drawn):
    rows = [{"label": f"choice {k}", "seed": 0, "step": t, "split": "dev", "loss": k} for k in range(5) for t in (1, 2)]
    plots.learning_curves(rows, tmp_path / "x.png", "loss")
    legend = drawn[0].legends[0]
    drawn[0].canvas.draw()
    places = {t.get_text(): t.get_window_extent() for t in legend.get_texts()}
    order = sorted(places, key=lambda name: (-round(places[name].y0), places[name].x0))
    assert order == [f"choice {k}" for k in range(5)] and len({round(p.y0) for p in places.values()}) == 2


def test_layers_rise_and_other_rows_fall(tmp_path, drawn):
    rows = [{**row, "adapter.method": row["adapter.layers"]} for row in arms()]
    plots.heat_map(rows, tmp_path / "a.png", M, x="adapter.rank", y="adapter.layers")
    plots.heat_map(rows, tmp_path / "b.png", M, x="adapter.rank", y="adapter.method")
    assert [f.axes[0].images[0].origin for f in drawn] == ["lower", "upper"]


def test_axes_have_units():
    labels = [
        figure.measure(m)[0] for m in ("test.macro_f1", "peak_memory_mb", "dev.tokens_per_second", "test.bleu", "x.y")
    ]
    assert labels == ["test macro f1 (%)", "peak memory (MB)", "dev speed (tokens/s)", "test bleu (points)", "x y"]
    assert [figure.counts(n) for n in (500, 74000, 1.2e6, 2e9)] == ["500", "74k", "1.2M", "2B"]


def test_what_cannot_be_drawn_is_said(tmp_path):
    rows = arms()
    with pytest.raises(
        UserError, match="adapter.rank must be a positive number on a logarithmic axis, the arm 1last:10 has"
    ):
        plots.metric_by_rank([{**rows[0], "adapter.rank": 0}], tmp_path / "x.png", M)
    with pytest.raises(UserError, match="no finished arm has the metric 'dev.accuracy'"):
        plots.metric_by_rank([{**row, "status": "failed"} for row in rows], tmp_path / "x.png", M)
    with pytest.raises(UserError, match="both have the seed 0"):
        plots.metric_by_rank(rows, tmp_path / "x.png", M, by=[])
    with pytest.raises(UserError, match="no row of the split 'dev' has the metric 'loss'"):
        plots.learning_curves([], tmp_path / "x.png", "loss")
    with pytest.raises(UserError, match="trainable_params above 0"):
        pareto.pareto([{**row, "trainable_params": None} for row in rows], tmp_path / "x.png", M)
    assert not list(tmp_path.iterdir())
    assert results.is_axis("seed") and not results.is_axis("dev.accuracy")
