"""What merging into a low precision loses, against numbers worked out by hand; and methods that cannot be merged."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import export, trees
from lora_jax.adapters.base import Entry, entry, per_site
from lora_jax.lift.weight import AdaptedWeight, Axes, register
from tests.adapters import kinds
from tests.lift.checks import noisy


def world(name="dense", dtype=jnp.bfloat16, size=0.3):
    """(variables in a number format, adapter, random delta)."""
    kind = kinds.get(name)
    adapter = kinds.make("lora", kind)
    shapes = jax.eval_shape(lambda v: adapter.init(jax.random.key(0), v, kind.sites), kind.variables)
    variables = trees.map_with_path(lambda _, x: x.astype(dtype), kind.variables)
    return variables, adapter, noisy(shapes, size)


@pytest.mark.parametrize("name", ["dense", "heads in", "scan", "embedding"])
def test_the_loss_is_the_rounding_of_the_sum(name):
    variables, adapter, delta = world(name)
    found = export.rounding(adapter, delta, variables)
    assert set(found.sites) == set(delta) and found.dtype == "bfloat16"
    for path, value in found.sites.items():
        d = lj.update(adapter, delta, variables, path)
        exact = np.asarray(trees.flatten(variables)[path], np.float32) + d
        rounded = exact.astype(ml_dtypes.bfloat16).astype(np.float32)
        assert value == pytest.approx(np.linalg.norm(rounded - exact) / np.linalg.norm(d), rel=1e-3)
        assert 0 < value < 0.05
    assert found.largest == max(found.sites.values()) == found.sites[found.worst]
    assert found.mean == pytest.approx(np.mean(list(found.sites.values())))


def test_a_small_update_is_lost_whole():
    variables, adapter, delta = world(size=1e-4)
    merged = export.merge(adapter, delta, variables)
    found = export.rounding(adapter, delta, variables, merged)
    assert found.mean == pytest.approx(1.0, abs=0.05), "what is rounded away is all of it"
    assert re.fullmatch(
        r"merging into bfloat16 changed the updates by [\d.]+% of their norm on average, by [\d.]+% at most "
        rf"\({found.worst}\)",
        str(found),
    )


def test_float32_and_zero_updates_lose_nothing():
    variables, adapter, delta = world(dtype=jnp.float32)
    found = export.rounding(adapter, delta, variables)
    assert set(found.sites) == set(delta) and found.largest == 0.0
    assert str(found) == "merged in float32 without loss"
    variables, adapter, delta = world()
    zero = jax.tree_util.tree_map(jnp.zeros_like, delta)
    assert export.rounding(adapter, zero, variables).sites == {}
    assert str(export.rounding(adapter, zero, variables)) == "merged in bfloat16 without loss"


def test_weights_trained_in_place_are_rounded_too():
    kind = kinds.get("dense")
    adapter = lj.full(targets="out/kernel")
    variables = trees.map_with_path(lambda _, x: x.astype(jnp.bfloat16), kind.variables)
    delta = noisy(adapter.init(jax.random.key(0), variables, kind.sites), 0.01)
    (value,) = export.rounding(adapter, delta, variables).sites.values()
    exact, base = np.asarray(delta["out/kernel"].value), np.asarray(variables["params"]["out"]["kernel"], np.float32)
    rounded = exact.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert (
        value == pytest.approx(np.linalg.norm(rounded - exact) / np.linalg.norm(exact - base), rel=1e-3) and value > 0
    )


@entry()
class Gate(Entry):
    """An entry of a method that acts on activations."""

    x: object
    axes: Axes
    member: str = ""


class NoDense(AdaptedWeight):
    """A weight of such a method."""


register(NoDense)


def gate(weight):
    """An adapter on out/kernel with a weight that has no dense value."""
    return per_site(
        {"method": "gate"},
        choose=lambda sites: {"out/kernel": None},
        make=lambda key, leaf, site, option: Gate(x=jnp.ones(3), axes=Axes.of(site)),
        weight=weight,
    )


def test_a_method_that_cannot_be_merged():
    kind = kinds.get("dense")
    no_dense = gate(lambda base, one, place: NoDense(base=base, axes=one.axes, path=place.path))
    delta = no_dense.init(jax.random.key(0), kind.variables, kind.sites)
    with pytest.raises(
        lj.UserError, match="method 'gate' cannot be merged into the weights of its base; .*--format=peft"
    ):
        export.merge(no_dense, delta, kind.variables)

    def refuse(*_):
        raise lj.UserError("it acts on activations")

    with pytest.raises(
        lj.UserError, match="'gate' cannot be merged .* base: it acts on activations; keep the base and"
    ):
        export.rounding(no_dense._replace(merge=refuse), delta, kind.variables)
    unmerged = no_dense._replace(merge=lambda variables, own: no_dense.bind(variables, own))
    with pytest.raises(lj.UserError, match="the method 'gate' left 'out/kernel' unmerged"):
        export.merge(unmerged, delta, kind.variables)
