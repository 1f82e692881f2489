"""Spectra from factors against numpy on the merged update, on every kind of site."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import trees
from lora_jax.analyze import svd
from tests.adapters import kinds
from tests.analyze.worlds import flat, matrices, merged_update, moved, near, world
from tests.lift.checks import noisy, weights

KINDS = ["dense", "heads out", "heads in", "conv", "grouped conv", "embedding", "tied embedding", "scan", "experts"]


@pytest.mark.parametrize("name", KINDS)
def test_the_spectrum_of_the_factors_is_that_of_the_merged_update(name):
    kind, adapter, delta = world(name)
    for path, dense in matrices(adapter, delta, kind).items():
        expected = np.linalg.svd(dense, compute_uv=False)
        found = svd(adapter, delta, kind.variables, path)
        near(found.s, expected[:, : found.s.shape[1]])
        assert expected[:, 3:].max(initial=0.0) < 1e-5 * expected.max(), "rank 3 is all there is"
        near(np.einsum("nir,nr,nor->nio", *found), dense)
        near(found.u.swapaxes(1, 2) @ found.u, np.broadcast_to(np.eye(3), (len(dense), 3, 3)))
        values = lj.singular_values(adapter, delta, kind.variables, path)
        assert values.shape[:-1] == kind.sites[path].dims(kind.sites[path].batch)


@pytest.mark.parametrize("name", ["dense", "scan"])
def test_an_update_is_merge_minus_base(name):
    kind, adapter, delta = world(name)
    for path, expected in merged_update(adapter, delta, kind.variables).items():
        near(lj.update(adapter, delta, kind.variables, path), expected)


def test_a_small_update_of_a_bfloat16_base_is_not_lost_in_its_rounding():
    kind, adapter, delta = world("dense")
    low = trees.map_with_path(lambda _, x: x.astype(jnp.bfloat16), kind.variables)
    tiny = {p: type(one)(**{**vars(one), "b": one.b * 1e-4}) for p, one in delta.items()}
    for path, expected in merged_update(adapter, tiny, kind.variables).items():
        near(lj.update(adapter, tiny, low, path), expected, 2e-2)


def test_effective_and_stable_rank_of_known_spectra():
    assert lj.effective_rank(np.ones(5)) == pytest.approx(5)
    assert lj.effective_rank(np.array([2.0, 0, 0])) == pytest.approx(1)
    p = np.array([0.5, 0.25, 0.25])
    assert lj.effective_rank(8 * p) == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    assert lj.stable_rank(np.array([2.0, 1.0, 1.0])) == pytest.approx(6 / 4)
    assert lj.stable_rank(np.array([1.0, 2.0, 1.0])) == pytest.approx(6 / 4), "in any order"
    assert lj.effective_rank(np.zeros(3)) == lj.stable_rank(np.zeros(3)) == 0.0


@pytest.mark.parametrize("name", ["dense", "heads in", "scan"])
def test_amplification_is_table_7_of_the_paper(name):
    kind, adapter, delta = world(name)
    for path, dense in matrices(adapter, delta, kind).items():
        base = flat(np.asarray(trees.flatten(kind.variables)[path], np.float64), kind.sites[path])
        found = lj.amplification(adapter, delta, kind.variables, path)
        assert len(found) == len(dense)
        for one, d, w in zip(found, dense, base, strict=True):
            u, _, vt = np.linalg.svd(d)
            along = np.linalg.norm(u[:, :3].T @ w @ vt[:3].T)
            assert one.rank == 3
            assert one.along_update == pytest.approx(along, rel=1e-4)
            assert one.update_norm == pytest.approx(np.linalg.norm(d), rel=1e-5)
            assert one.factor == pytest.approx(np.linalg.norm(d) / along, rel=1e-4)
            u, _, vt = np.linalg.svd(w)
            assert one.along_base == pytest.approx(np.linalg.norm(u[:, :3].T @ w @ vt[:3].T), rel=1e-5)
            assert one.along_base >= max(one.along_update, one.along_random)


def test_random_directions_hold_the_share_that_chance_gives_them():
    """E ||U^T W V||_F^2 = ||W||_F^2 r^2 / (fan_in fan_out)."""
    variables = {"w": weights(32, 24)}
    sites = lj.find_sites(lambda v, x: x @ v["w"], variables, weights(2, 32))
    adapter = lj.lora(rank=4)
    delta = noisy(jax.eval_shape(lambda: adapter.init(jax.random.key(0), variables, sites)))
    draws = [lj.amplification(adapter, delta, variables, "w", seed=s)[0].along_random for s in range(60)]
    expected = np.linalg.norm(variables["w"]) * 4 / math.sqrt(32 * 24)
    assert math.sqrt(np.mean(np.square(draws))) == pytest.approx(expected, rel=0.1)
    assert len(set(draws)) == 60


def test_a_zero_update_has_no_rank_and_no_amplification():
    kind, adapter, delta = world("dense")
    path = next(iter(delta))
    zero = {**delta, path: type(delta[path])(**{**vars(delta[path]), "b": 0 * delta[path].b})}
    found = lj.amplification(adapter, zero, kind.variables, path)[0]
    assert (found.rank, found.update_norm) == (0, 0.0) and math.isnan(found.factor)


def test_unknown_sites_are_named():
    kind, adapter, delta = world("dense")
    with pytest.raises(lj.UserError, match="no site 'layers_0/kernl'; did you mean 'layers_0/kernel'"):
        lj.update(adapter, delta, kind.variables, "layers_0/kernl")
    other = kinds.get("heads in").variables
    adapter = lj.full(targets="layers_0/kernel")
    own = adapter.init(jax.random.key(0), kind.variables, kind.sites)
    with pytest.raises(lj.UserError, match="the variables have no weight 'layers_0/kernel'"):
        lj.update(adapter, own, other, "layers_0/kernel")


def test_updates_that_are_not_finite():
    kind, adapter, delta = world("dense")
    diverged = {p: dataclasses.replace(one, b=one.b.at[0, 0].set(float("nan"))) for p, one in delta.items()}
    with pytest.raises(lj.UserError, match="holds NaN or infinite values.* did the training diverge"):
        lj.analyze(adapter, diverged, kind.variables, kind.sites)
    full = lj.full(targets="out/kernel")
    (one,) = moved(full, kind).values()
    with pytest.raises(lj.UserError, match="holds NaN or infinite values"):
        svd(full, {"out/kernel": dataclasses.replace(one, value=one.value / 0)}, kind.variables, "out/kernel")
