"""Subspace similarity against the formula of the paper written out."""

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.analyze import phi
from tests.adapters import kinds
from tests.analyze.worlds import moved, world
from tests.lift.checks import noisy, weights


def literal(u, v, i, j):
    """Eq. 4 of the LoRA paper for columns."""
    return np.linalg.norm(u[:, :i].T @ v[:, :j]) ** 2 / min(i, j)


def orthonormal(d, r, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, r)))[0]


def test_phi_is_the_formula_at_every_place_of_the_grid():
    u, v = orthonormal(9, 3, 0), orthonormal(9, 5, 1)
    grid = phi(u, v)
    assert grid.shape == (3, 5)
    for i in range(1, 4):
        for j in range(1, 6):
            assert grid[i - 1, j - 1] == pytest.approx(literal(u, v, i, j))


def test_phi_of_equal_nested_and_orthogonal_spaces():
    u = orthonormal(9, 6, 0)
    assert phi(u[:, :3], u[:, :3])[-1, -1] == pytest.approx(1)
    turned = u[:, :3] @ orthonormal(3, 3, 2)
    assert phi(turned, u)[2, 2] == pytest.approx(1), "a space, not its basis"
    assert phi(u[:, :3], u[:, 3:])[-1, -1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["dense", "heads out", "heads in", "scan"])
@pytest.mark.parametrize("side", ["fan_in", "fan_out"])
def test_factors_are_compared_by_their_own_singular_vectors(name, side):
    kind, _, delta = world(name)
    adapter = kinds.make("lora", kind, rank=2)
    other = moved(adapter, kind, seed=5)
    found = lj.subspace_similarity(delta, other, side=side)
    assert set(found) == set(delta)
    for path, grids in found.items():
        depth = len(delta[path].axes.batch)
        for n, grid in enumerate(grids):
            assert grid.shape == (3, 2)
            bases = []
            for one in (delta[path], other[path]):
                a, b = (np.asarray(x).reshape(-1, *x.shape[depth:])[n] for x in (one.a, one.b))
                flat = a.reshape(-1, a.shape[-1]) if side == "fan_in" else b.reshape(b.shape[0], -1).T
                bases.append(np.linalg.svd(flat)[0])
            for i in range(1, 4):
                for j in range(1, 3):
                    assert grid[i - 1, j - 1] == pytest.approx(literal(*bases, i, j), rel=1e-4)


def test_the_two_sides_differ():
    _, _, delta = world("dense")
    kind = world("dense")[0]
    other = moved(kinds.make("lora", kind, rank=3), kind, seed=5)
    path = next(iter(delta))
    one, two = (lj.subspace_similarity(delta, other, side=s)[path][0] for s in ("fan_in", "fan_out"))
    assert np.abs(one - two).max() > 1e-2


def test_layers_of_a_stack_have_grids_of_their_own_ranks():
    kind = kinds.get("scan")
    adapter = lj.lora(rank=[(".*#0", 1), (".*", 3)], targets=".*dense/kernel")
    delta = moved(adapter, kind)
    grids = lj.subspace_similarity(delta, world("scan")[2])["layers/dense/kernel"]
    assert [g.shape for g in grids] == [(1, 3), (3, 3)]


def test_comparison_of_an_adapter_with_itself_and_with_another_method():
    kind, adapter, delta = world("dense")
    itself = lj.compare((adapter, delta), (adapter, delta), kind.variables, kind.sites)
    assert [r.layer for r in itself.rows] == [0, 1]
    for row in itself.rows:
        assert (row.rank, row.other) == (3, 3)
        assert min(row.first_in, row.all_in, row.first_out, row.all_out) == pytest.approx(1)
        assert row.random_in == row.random_out == 3 / 8
    full = lj.full(targets=".*layers_0/kernel")
    trained = {"layers_0/kernel": full.init(jax.random.key(0), kind.variables, kind.sites)["layers_0/kernel"]}
    one = trained["layers_0/kernel"]
    update = np.asarray(lj.update(adapter, delta, kind.variables, "layers_0/kernel"))
    trained = {"layers_0/kernel": type(one)(**{**vars(one), "value": one.value + update})}
    (row,) = lj.compare((adapter, delta), (full, trained), kind.variables, kind.sites).rows
    assert row.other >= 3 and row.first_in == pytest.approx(1, abs=1e-4) and row.all_in == pytest.approx(1, abs=1e-4)
    assert "in 1st" in str(itself) and "1.000" in str(itself) and "0.375" in str(itself)


def test_mistakes():
    kind, adapter, delta = world("dense")
    with pytest.raises(lj.UserError, match="side='fanin': did you mean 'fan_in'"):
        lj.subspace_similarity(delta, delta, side="fanin")
    with pytest.raises(lj.UserError, match="share no site with LoRA factors"):
        lj.subspace_similarity(delta, {})
    variables = {"layers_0": {"kernel": weights(6, 8)}}
    sites = lj.find_sites(lambda v, x: x @ v["layers_0"]["kernel"], variables, weights(2, 6))
    other = noisy(jax.eval_shape(lambda: lj.lora(rank=2).init(jax.random.key(0), variables, sites)))
    with pytest.raises(lj.UserError, match="different shapes at 'layers_0/kernel': are they for one base"):
        lj.subspace_similarity(delta, other)
    with pytest.raises(lj.UserError, match="no matrix in common"):
        lj.compare((adapter, delta), (adapter, {}), kind.variables, kind.sites)
