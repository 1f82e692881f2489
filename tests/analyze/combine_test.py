"""Sums of adapters against sums of their merged updates."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import trees
from tests.adapters import kinds
from tests.analyze.worlds import matrices, merged_update, moved, near, rebuilds, world
from tests.lift.checks import close

KINDS = ["dense", "heads out", "heads in", "conv", "embedding", "tied embedding", "scan", "experts"]
WEIGHTS = [0.7, -1.3]


def two(name, ranks=(3, 2)):
    """(kind, two pairs with their own ranks and scales)."""
    kind, adapter, delta = world(name, ranks[0])
    other = kinds.make("lora", kind, rank=ranks[1], alpha=3)
    return kind, [(adapter, delta), (other, moved(other, kind, seed=8))]


def wanted(pairs, kind, weights=(1.0, 1.0)):
    found = [merged_update(a, d, kind.variables) for a, d in pairs]
    return {p: sum(w * f[p] for w, f in zip(weights, found) if p in f) for p in {*found[0], *found[1]}}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_cat_is_the_sum_of_the_updates(name, weights):
    kind, pairs = two(name)
    adapter, delta = lj.cat(pairs, weights)
    assert {max(one.ranks) for one in delta.values()} == {5}
    rebuilds(adapter, delta, kind)
    expected = wanted(pairs, kind, weights or (1.0, 1.0))
    for path, update in merged_update(adapter, delta, kind.variables).items():
        near(update, expected[path])


def test_cat_beyond_the_largest_rank_there_is():
    kind, pairs = two("dense", (5, 7))
    adapter, delta = lj.cat(pairs)
    assert delta["layers_0/kernel"].ranks == (8,)
    rebuilds(adapter, delta, kind)
    for path, update in merged_update(adapter, delta, kind.variables).items():
        near(update, wanted(pairs, kind)[path], 1e-4)


def test_cat_of_stacks_with_ranks_of_their_own_and_of_different_layers():
    kind = kinds.get("scan")
    path = "layers/dense/kernel"
    first = lj.lora(rank=[(".*#0", 1), (".*", 3)], targets=path)
    second = lj.lora(rank=2, targets=path, layers="first:1")
    pairs = [(first, moved(first, kind)), (second, moved(second, kind, seed=4))]
    adapter, delta = lj.cat(pairs, WEIGHTS)
    assert delta[path].ranks == (3, 3)
    near(merged_update(adapter, delta, kind.variables)[path], wanted(pairs, kind, WEIGHTS)[path])
    adapter, delta = lj.cat(pairs[1:])
    assert delta[path].ranks == (2, 0) and delta[path].scales == (1.0, 0.0)
    rebuilds(adapter, delta, kind)


def test_sites_that_only_one_adapter_has():
    kind = kinds.get("dense")
    one, other = lj.lora(rank=2, targets="layers_0/kernel"), lj.lora(rank=3, targets="(layers_0|out)/kernel")
    pairs = [(one, moved(one, kind)), (other, moved(other, kind, seed=2))]
    adapter, delta = lj.cat(pairs, WEIGHTS)
    assert {p: d.ranks for p, d in delta.items()} == {"layers_0/kernel": (5,), "out/kernel": (3,)}
    rebuilds(adapter, delta, kind)
    for path, update in merged_update(adapter, delta, kind.variables).items():
        near(update, wanted(pairs, kind, WEIGHTS)[path])


@pytest.mark.parametrize("shared", ["a", "b"])
@pytest.mark.parametrize("name", ["dense", "heads in", "scan"])
def test_linear_is_exact_where_a_factor_is_shared(name, shared):
    kind, pairs = two(name, (3, 3))
    source = pairs[0][1]
    pairs[1] = (pairs[1][0], {
        p: dataclasses.replace(one, **{shared: getattr(source[p], shared)}) for p, one in pairs[1][1].items()
    })  # fmt: skip
    adapter, delta = lj.linear(pairs, WEIGHTS, exact=True)
    assert {max(one.ranks) for one in delta.values()} == {3}
    rebuilds(adapter, delta, kind)
    for path, update in merged_update(adapter, delta, kind.variables).items():
        near(update, wanted(pairs, kind, WEIGHTS)[path])


def test_linear_elsewhere_adds_cross_terms_as_peft_does():
    kind, pairs = two("dense", (3, 3))
    adapter, delta = lj.linear(pairs, WEIGHTS)
    for path, update in merged_update(adapter, delta, kind.variables).items():
        a, b = 0.0, 0.0
        for weight, (_, own) in zip(WEIGHTS, pairs):
            root = np.sqrt(abs(weight) * own[path].scales[0])
            a, b = a + root * np.asarray(own[path].a), b + np.sign(weight) * root * np.asarray(own[path].b)
        near(update, a @ b)
        assert np.abs(update - wanted(pairs, kind, WEIGHTS)[path]).max() > 1e-2
    with pytest.raises(
        lj.UserError, match="not exact at 'layers_0/kernel': the adapters share neither A nor B; use cat"
    ):
        lj.linear(pairs, exact=True)
    with pytest.raises(lj.UserError, match=r"have the ranks \[\(2,\), \(3,\)\] at .*use cat"):
        lj.linear(two("dense")[1])


@pytest.mark.parametrize("name", ["dense", "heads out", "scan"])
def test_recombine_is_the_best_at_its_rank(name):
    kind, pairs = two(name)
    adapter, delta = lj.recombine(pairs, 2, WEIGHTS)
    rebuilds(adapter, delta, kind)
    exact = lj.cat(pairs, WEIGHTS)
    for path, found in matrices(adapter, delta, kind).items():
        for d, t in zip(matrices(*exact, kind)[path], found, strict=True):
            assert np.linalg.norm(d - t) == pytest.approx(np.linalg.norm(np.linalg.svd(d)[1][2:]), rel=1e-4)
    whole = lj.recombine(pairs, 5, WEIGHTS)
    for path, update in merged_update(*whole, kind.variables).items():
        near(update, wanted(pairs, kind, WEIGHTS)[path], 1e-4)
    with pytest.raises(lj.UserError, match="rank must be an integer of at least 1"):
        lj.recombine(pairs, 0)


def chained(kind, rank, seed, **options):
    head = lj.layers(targets="layers_1/.*", **options) if options else lj.full(targets="layers_1/.*")
    adapter = lj.chain(lj.lora(rank=rank, targets="layers_0/kernel"), head)
    return adapter, moved(adapter, kind, seed)


@pytest.mark.parametrize("weights", [[0.25, 0.75], WEIGHTS])
def test_weights_trained_in_place_are_summed_beside(weights, tmp_path):
    kind = kinds.get("dense")
    pairs = [chained(kind, 2, 3), chained(kind, 1, 4)]
    needed = sum(weights) != 1
    if needed:
        with pytest.raises(
            lj.UserError, match="its weights sum to -0.6, not 1: the sum needs the base, give variables="
        ):
            lj.cat(pairs, weights)
    adapter, delta = lj.cat(pairs, weights, variables=kind.variables if needed else None)
    rebuilds(adapter, delta, kind)
    for path, update in merged_update(adapter, delta, kind.variables).items():
        near(update, wanted(pairs, kind, weights)[path])
    lj.save(tmp_path, adapter, delta, kind.variables)
    outputs = lj.lift(kind.function)(adapter.bind(kind.variables, lj.load(tmp_path, kind.variables)[1]), *kind.args)
    close(outputs, kind.function(adapter.merge(kind.variables, delta), *kind.args), 1e-5)


def test_layers_of_a_stack_trained_in_place():
    kind = kinds.get("scan")
    last, every = lj.layers("last:1", targets=".*kernel"), lj.full(targets="layers/dense/kernel")
    pairs = [(last, moved(last, kind)), (every, moved(every, kind, seed=2))]
    weights = [0.5, 0.5]
    with pytest.raises(lj.UserError, match="in some of its layers only: the sum needs the base"):
        lj.cat(pairs, weights)
    adapter, delta = lj.cat(pairs, weights, variables=kind.variables)
    rebuilds(adapter, delta, kind)
    path = "layers/dense/kernel"
    near(merged_update(adapter, delta, kind.variables)[path], wanted(pairs, kind, weights)[path])


def test_a_bfloat16_base():
    kind = kinds.get("dense")
    low = trees.map_with_path(lambda _, x: x.astype(jnp.bfloat16), kind.variables)
    pairs = [chained(kind, 2, 3), chained(kind, 1, 4)]
    _, delta = lj.cat(pairs, [1, 1], variables=low)
    base = np.asarray(trees.flatten(low)["layers_1/kernel"], np.float32)
    near(delta["layers_1/kernel"].value, sum(np.asarray(d["layers_1/kernel"].value) for _, d in pairs) - base)


def test_mistakes():
    kind, pairs = two("dense")
    with pytest.raises(lj.UserError, match=r"give a list of \(adapter, delta\) pairs"):
        lj.cat(pairs[0])
    with pytest.raises(lj.UserError, match="3 weights for 2 adapters"):
        lj.cat(pairs, [1, 2, 3])
    with pytest.raises(lj.UserError, match="all of the deltas are empty"):
        lj.cat([(pairs[0][0], {})])
    full = lj.full(targets="layers_0/kernel")
    with pytest.raises(
        lj.UserError, match="'layers_0/kernel' has LoRA factors in one adapter and is trained in place in"
    ):
        lj.cat([pairs[0], (full, moved(full, kind))])
    wide = {p: dataclasses.replace(one, a=one.a[:4]) for p, one in pairs[1][1].items()}
    with pytest.raises(lj.UserError, match="different shapes at 'layers_0/kernel': are they for one base"):
        lj.cat([pairs[0], (pairs[1][0], wide)])


def test_methods_that_cannot_be_summed_say_so():
    kind, pairs = two("dense")

    class Other(type(pairs[0][1]["layers_0/kernel"])):
        """An entry of some other method."""

    foreign = {p: Other(**vars(one)) for p, one in pairs[1][1].items()}
    with pytest.raises(lj.UserError, match="adapters of the method 'lora' cannot be combined .at 'layers_0/kernel'"):
        lj.cat([pairs[0], (pairs[1][0], foreign)])
