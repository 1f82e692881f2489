"""LoRA that starts away from zero subtracts its start: the update is that of both, at up to twice the rank."""

import numpy as np
import pytest

import lora_jax as lj
from lora_jax.analyze import svd
from tests.analyze.worlds import matrices, merged_update, near, rebuilds, world


@pytest.mark.parametrize("name", ["dense", "heads in", "scan"])
def test_the_spectrum_has_both(name):
    kind, adapter, delta = world(name, rank=2, init="pissa")
    rows = iter(lj.analyze(adapter, delta, kind.variables, kind.sites).rows)
    for path, dense in matrices(adapter, delta, kind).items():
        assert delta[path].a0 is not None
        near(svd(adapter, delta, kind.variables, path).s, np.linalg.svd(dense)[1][:, :4], 1e-4)
        for d in dense:
            row = next(rows)
            assert row.rank == len(row.singular_values) == 4
            assert row.norm == pytest.approx(np.linalg.norm(d), rel=1e-4)


@pytest.mark.parametrize("name", ["dense", "scan"])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_truncation_writes_a_plain_lora(name, rank):
    kind, adapter, delta = world(name, rank=2, init="pissa")
    small, cut = lj.truncate(adapter, delta, rank)
    rebuilds(small, cut, kind)
    for path, dense in matrices(adapter, delta, kind).items():
        assert cut[path].a0 is None
        for d, t in zip(dense, matrices(small, cut, kind)[path], strict=True):
            tail = np.linalg.norm(np.linalg.svd(d)[1][rank:])
            assert np.linalg.norm(d - t) == pytest.approx(tail, rel=1e-4, abs=1e-5)
    with pytest.raises(lj.UserError, match="rank=5 is above the adapter's own, 4"):
        lj.truncate(adapter, delta, 5)


def test_sums():
    kind, adapter, delta = world("dense", rank=2, init="pissa")
    pairs = [(adapter, delta), world("dense")[1:]]
    whole, total = lj.cat(pairs, [0.5, 2.0])
    rebuilds(whole, total, kind)
    expected = [merged_update(*pair, kind.variables) for pair in pairs]
    for path, update in merged_update(whole, total, kind.variables).items():
        near(update, 0.5 * expected[0][path] + 2.0 * expected[1][path], 1e-4)


def test_switching_off_leaves_no_start_behind():
    kind, adapter, delta = world("scan", rank=2, init="pissa")
    path = "layers/dense/kernel"
    off = merged_update(adapter, lj.without(delta, kind.sites, layers=[0]), kind.variables)[path]
    assert not off[0].any()
    near(off[1], merged_update(adapter, delta, kind.variables)[path][1])
