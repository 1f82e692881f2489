"""Switched-off layers are the base's; the others are untouched; nothing is compiled again."""

import jax
import pytest

import lora_jax as lj
from lora_jax import trees
from tests.adapters import kinds
from tests.analyze.worlds import merged_update, moved, near, world
from tests.lift.checks import QUICK, bits_equal, furthest


def test_a_layer_of_an_unrolled_model():
    kind, adapter, delta = world("dense")
    off = lj.without(delta, kind.sites, layers="last:1")
    before, after = (merged_update(adapter, d, kind.variables) for d in (delta, off))
    near(after["layers_0/kernel"], before["layers_0/kernel"])
    assert not after["layers_1/kernel"].any() and before["layers_1/kernel"].any()
    assert delta["layers_1/kernel"].b.any(), "the delta given is not changed"


def test_nothing_is_compiled_again_and_all_off_is_the_base():
    kind, adapter, delta = world("dense")
    apply = lj.lift(kind.function)
    traces = []

    def run(delta):
        traces.append(1)
        return apply(adapter.bind(kind.variables, delta), *kind.args)

    run = jax.jit(run, compiler_options=QUICK)
    on, off = run(delta), run(lj.without(delta, kind.sites, layers=[0, 1]))
    assert len(traces) == 1
    plain = jax.jit(kind.function, compiler_options=QUICK)(kind.variables, *kind.args)
    assert furthest(off, plain) < 1e-6 and furthest(on, plain) > 1e-2


@pytest.mark.parametrize("layers", ["first:1", [1]])
def test_layers_of_a_stack(layers):
    kind, adapter, delta = world("scan")
    path = "layers/dense/kernel"
    off = lj.without(delta, kind.sites, layers=layers)
    before, after = (merged_update(adapter, d, kind.variables)[path] for d in (delta, off))
    gone = 0 if layers == "first:1" else 1
    assert not after[gone].any()
    near(after[1 - gone], before[1 - gone])
    assert jax.tree_util.tree_structure(off) == jax.tree_util.tree_structure(delta)


def test_sites_by_pattern_and_layer_together():
    kind = kinds.get("attention")
    adapter = lj.lora(rank=2, targets="layers_0/.*kernel")
    delta = moved(adapter, kind)
    off = merged_update(adapter, lj.without(delta, kind.sites, targets=".*/query/kernel"), kind.variables)
    assert {path for path, update in off.items() if not update.any()} == {"layers_0/query/kernel"}
    both = lj.without(delta, kind.sites, layers=0, targets=".*/(query|value)/kernel")
    off = merged_update(adapter, both, kind.variables)
    assert {path for path, update in off.items() if not update.any()} == {
        "layers_0/query/kernel",
        "layers_0/value/kernel",
    }


def test_weights_trained_in_place_go_back_to_the_base():
    for name, method, options in [
        ("dense", "full", {}),
        ("scan", "layers", {"layers": "last:1"}),
        ("scan", "full", {}),
    ]:
        kind = kinds.get(name)
        adapter = lj.adapters.get(method)(targets=".*layers.*", **options)
        delta = moved(adapter, kind)
        with pytest.raises(lj.UserError, match="trained in place: switching it off takes the base's weight"):
            lj.without(delta, kind.sites, layers="last:1")
        off = lj.without(delta, kind.sites, layers="last:1", variables=kind.variables)
        assert jax.tree_util.tree_structure(off) == jax.tree_util.tree_structure(delta)
        merged, before = adapter.merge(kind.variables, off), adapter.merge(kind.variables, delta)
        base = trees.flatten(kind.variables)
        for path, leaf in trees.flatten(merged).items():
            old = trees.flatten(before)[path]
            if path.startswith("layers/"):
                bits_equal(leaf[1], base[path][1])
                bits_equal(leaf[0], old[0])
            else:
                bits_equal(leaf, base[path] if path.startswith("layers_1/") else old)
        changed = trees.flatten(before)["layers/dense/kernel" if name == "scan" else "layers_1/kernel"]
        assert furthest(changed, base["layers/dense/kernel" if name == "scan" else "layers_1/kernel"]) > 1e-2


def test_entries_of_any_other_method_are_removed():
    kind, adapter, delta = world("dense")

    class Other(type(delta["layers_0/kernel"])):
        """An entry of some other method."""

    foreign = {p: Other(**vars(one)) for p, one in delta.items()}
    assert set(lj.without(foreign, kind.sites, layers=[1])) == {"layers_0/kernel"}
    kind, adapter, delta = world("scan")
    foreign = {p: Other(**vars(one)) for p, one in delta.items()}
    assert lj.without(foreign, kind.sites, targets=".*dense/kernel") == {}
    with pytest.raises(
        lj.UserError,
        match="is a stack of layers, and an entry of the kind 'other' cannot be switched off in some of them",
    ):
        lj.without(foreign, kind.sites, layers=[1])


def test_mistakes():
    kind, adapter, delta = world("dense")
    with pytest.raises(lj.UserError, match="needs layers= or targets="):
        lj.without(delta, kind.sites)
    with pytest.raises(lj.UserError, match="k must be 1 to 2"):
        lj.without(delta, kind.sites, layers="last:9")
    with pytest.raises(lj.UserError, match="the pattern 'out/kernel' matches none of the 2 sites"):
        lj.without(delta, kind.sites, targets="out/kernel")
    only = {"layers_0/kernel": delta["layers_0/kernel"]}
    with pytest.raises(lj.UserError, match=r"layers=\[1\] leaves none of the 1 selected sites"):
        lj.without(only, kind.sites, layers=[1])
