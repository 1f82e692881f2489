"""Trained-looking deltas on every kind of site, and what they add as plain numpy matrices."""

import dataclasses
import functools

import jax
import numpy as np

import lora_jax as lj
from lora_jax import trees
from tests.adapters import kinds
from tests.lift.checks import noisy


def moved(adapter, kind, seed=1):
    """A random delta of the adapter's structure; columns that a rank leaves out stay zero."""
    delta = noisy(jax.eval_shape(lambda v: adapter.init(jax.random.key(0), v, kind.sites), kind.variables), seed=seed)
    return {path: _live(one) if hasattr(one, "ranks") else one for path, one in delta.items()}


def _live(one):
    batch = one.a.shape[: len(one.axes.batch)]
    live = np.arange(one.a.shape[-1]) < np.reshape(one.ranks, (*batch, 1))
    in_a = live.reshape(*batch, *(1,) * (one.a.ndim - len(batch) - 1), -1)
    in_b = live.reshape(*live.shape, *(1,) * (one.b.ndim - live.ndim))
    masks = {"a": in_a, "b": in_b, "a0": in_a, "b0": in_b}
    kept = {n: getattr(one, n) * m for n, m in masks.items() if getattr(one, n) is not None}
    return dataclasses.replace(one, **kept)


@functools.cache
def world(name, rank=3, seed=1, init="default"):
    """(kind, adapter, delta) of lora on a kind; alpha is such that no scale is a power of two."""
    kind = kinds.get(name)
    adapter = kinds.make("lora", kind, rank=rank, alpha=7, init=init)
    return kind, adapter, moved(adapter, kind, seed)


def merged_update(adapter, delta, variables):
    """`{path: float64}` of merged - base, by nothing but `merge`."""
    base, new = trees.flatten(variables), trees.flatten(adapter.merge(variables, delta))
    return {path: np.asarray(new[path], np.float64) - np.asarray(base[path], np.float64) for path in delta}


def flat(update, site):
    """(N, fan_in, fan_out), written out with moveaxis and nothing of the package."""
    order = [*site.batch, *site.fan_in, *site.fan_out]
    moved = np.moveaxis(update, order, range(len(order)))
    sizes = [int(np.prod([site.shape[i] for i in part])) for part in (site.batch, site.fan_in, site.fan_out)]
    return moved.reshape(sizes)


def matrices(adapter, delta, kind):
    """`{path: (N, fan_in, fan_out)}` of the merged update."""
    found = merged_update(adapter, delta, kind.variables)
    return {path: flat(x, kind.sites[path]) for path, x in found.items()}


def near(given, expected, rtol=1e-5):
    """Equal to `rtol` of the largest entry."""
    given, expected = np.asarray(given, np.float64), np.asarray(expected, np.float64)
    assert given.shape == expected.shape
    assert np.abs(given - expected).max(initial=0.0) <= rtol * max(np.abs(expected).max(initial=0.0), 1e-6)


def rebuilds(adapter, delta, kind):
    """The adapter's spec alone gives a delta of this very structure: it is what it says it is."""
    again = lj.from_spec(adapter.spec)
    fresh = jax.eval_shape(lambda v: again.init(jax.random.key(0), v, kind.sites), kind.variables)
    assert jax.tree_util.tree_structure(fresh) == jax.tree_util.tree_structure(delta)
    assert [x.shape for x in jax.tree_util.tree_leaves(fresh)] == [x.shape for x in jax.tree_util.tree_leaves(delta)]
