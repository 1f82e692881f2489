"""The report: rows for every weight and layer, their numbers against plain numpy, and what is printed."""

import dataclasses
import math

import numpy as np
import pytest

import lora_jax as lj
from lora_jax import trees
from tests.adapters import kinds
from tests.analyze.worlds import flat, matrices, moved, world


@pytest.mark.parametrize("name", ["dense", "heads out", "embedding", "scan", "experts"])
def test_rows_are_the_numbers_of_each_matrix(name):
    kind, adapter, delta = world(name)
    rows = iter(lj.analyze(adapter, delta, kind.variables, kind.sites, references=True).rows)
    for path, dense in matrices(adapter, delta, kind).items():
        site = kind.sites[path]
        base = flat(np.asarray(trees.flatten(kind.variables)[path]), site)
        for d, w, layer in zip(dense, base, site.layers if len(dense) == len(site.layers) else [None] * 2):
            row, s = next(rows), np.linalg.svd(d, compute_uv=False)[:3]
            assert (row.path, row.rank, row.what) == (path, 3, "lora")
            assert row.layer == (layer if layer is not None else site.layer)
            np.testing.assert_allclose(row.singular_values, s, rtol=1e-4)
            assert row.norm == pytest.approx(np.linalg.norm(d), rel=1e-5)
            assert row.relative_norm == pytest.approx(np.linalg.norm(d) / np.linalg.norm(w), rel=1e-5)
            assert row.effective_rank == pytest.approx(lj.effective_rank(s), rel=1e-4)
            assert row.stable_rank == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-4)
            u, _, vt = np.linalg.svd(d)
            along = np.linalg.norm(u[:, :3].T @ w @ vt[:3].T)
            assert row.amplification == pytest.approx(np.linalg.norm(d) / along, rel=1e-3)
            assert row.along_base >= max(row.along_update, row.along_random) > 0
    assert next(rows, None) is None


def test_a_layer_of_rank_zero_is_a_row_of_nothing():
    kind = kinds.get("scan")
    adapter = lj.lora(rank=2, targets=".*dense/kernel", layers="last:1")
    first, second = lj.analyze(adapter, moved(adapter, kind), kind.variables, kind.sites).rows
    assert (first.rank, first.norm, first.effective_rank, first.singular_values) == (0, 0.0, 0.0, ())
    assert math.isnan(first.amplification) and first.relative_norm == 0.0
    assert second.rank == 2 and second.norm > 0 and second.layer == 1


def test_an_untrained_adapter_shows_zeros():
    kind, adapter, delta = world("dense")
    fresh = {path: dataclasses.replace(one, b=0 * one.b) for path, one in delta.items()}
    for row in lj.analyze(adapter, fresh, kind.variables, kind.sites).rows:
        assert row.norm == row.relative_norm == row.effective_rank == row.stable_rank == 0.0
        assert math.isnan(row.amplification)


def test_weights_trained_in_place_and_biases():
    kind = kinds.get("dense")
    adapter = lj.full(targets="layers_0/.*")
    delta = moved(adapter, kind)  # a sum of noise: what is seen is value - base
    rows = {r.path: r for r in lj.analyze(adapter, delta, kind.variables, kind.sites).rows}
    base = trees.flatten(kind.variables)
    for path, row in rows.items():
        d = np.asarray(delta[path].value) - np.asarray(base[path])
        assert row.norm == pytest.approx(np.linalg.norm(d), rel=1e-5) and row.rank is None
    assert rows["layers_0/kernel"].stable_rank > 1 and rows["layers_0/kernel"].amplification > 0
    bias = rows["layers_0/bias"]
    assert bias.stable_rank == pytest.approx(1) and len(bias.singular_values) == 1 and math.isnan(bias.amplification)


def test_the_amplification_takes_the_rank_it_is_told():
    kind, adapter, delta = world("dense")
    one, three = (lj.analyze(adapter, delta, kind.variables, kind.sites, rank=r).rows[0] for r in (1, 3))
    assert (
        one.along_update
        < three.along_update
        == lj.analyze(adapter, delta, kind.variables, kind.sites).rows[0].along_update
    )


def test_the_grid_takes_weights_that_fall_together_as_one_vector():
    kind, adapter, delta = world("experts")
    report = lj.analyze(adapter, delta, kind.variables, kind.sites)
    ((cell, value),) = report.grid().items()
    assert cell == (0, "down") and len(report.rows) == 2
    norms = np.linalg.norm([r.norm for r in report.rows]) / np.linalg.norm([r.base_norm for r in report.rows])
    assert value == pytest.approx(norms)
    mean = np.mean([r.stable_rank for r in report.rows])
    assert report.grid("stable_rank")[cell] == pytest.approx(mean)


def test_what_is_printed():
    kind, adapter, delta = world("dense")
    roles = {p: dataclasses.replace(s, role="up" if s.is_matrix else None) for p, s in kind.sites.items()}
    report = lj.analyze(adapter, delta, kind.variables, roles)
    lines = str(report).splitlines()
    assert lines[0].split() == ["site", "layer", "rank", "|dW|", "|dW|/|W|", "effective", "stable", "amplified"]
    assert lines[1].split()[:3] == ["up", "0", "3"] and lines[2].split()[:3] == ["up", "1", "3"]
    assert f"{report.rows[0].norm:.4g}" in lines[1]
    assert lines[5].split() == ["layer", "up"]
    assert lines[6].split() == ["0", f"{report.rows[0].relative_norm:.4f}"]
    outside = {p: dataclasses.replace(s, layer=None) for p, s in roles.items()}
    assert str(lj.analyze(adapter, delta, kind.variables, outside)).splitlines()[1].split()[0] == "layers_0/kernel"
    assert "random" in str(lj.analyze(adapter, delta, kind.variables, roles, references=True)).splitlines()[0]


def test_rows_are_a_data_frame():
    pandas = pytest.importorskip("pandas")
    kind, adapter, delta = world("dense")
    report = lj.analyze(adapter, delta, kind.variables, kind.sites)
    frame = pandas.DataFrame(report.rows)
    assert list(frame["path"]) == ["layers_0/kernel", "layers_1/kernel"]
    assert frame["norm"].sum() == pytest.approx(sum(r.norm for r in report.rows))


def test_a_member_that_changes_no_weight_is_noted_and_alone_it_is_an_error():
    kind, _, _ = world("dense")
    chain = lj.chain(lj.lora(rank=2, targets="layers_0/kernel"), lj.full(targets="out/kernel"))
    delta = moved(chain, kind)

    def merge(variables, own):
        if any(one.member == "1" for one in own.values()):
            raise lj.UserError("it acts on activations")
        return chain.merge(variables, own)

    broken = chain._replace(merge=merge)
    report = lj.analyze(broken, delta, kind.variables, kind.sites)
    assert [r.path for r in report.rows] == ["layers_0/kernel"]
    assert report.notes == ("left out: out/kernel (1 sites, full): it acts on activations",)
    assert str(report).endswith(report.notes[0])
    with pytest.raises(lj.UserError, match="no update to analyze: it acts on activations"):
        lj.analyze(broken, {"out/kernel": delta["out/kernel"]}, kind.variables, kind.sites)


def test_mistakes():
    kind, adapter, delta = world("dense")
    with pytest.raises(lj.UserError, match="the delta is empty"):
        lj.analyze(adapter, {}, kind.variables, kind.sites)
    other = kinds.get("heads in")
    with pytest.raises(lj.UserError, match="have no weight 'layers_0/kernel'"):
        lj.analyze(adapter, delta, other.variables, other.sites)
