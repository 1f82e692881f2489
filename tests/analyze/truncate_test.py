"""Truncation is the best approximation, and the result is an adapter like any other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from tests.adapters import kinds
from tests.analyze.worlds import matrices, merged_update, moved, near, rebuilds, world
from tests.lift.checks import close, furthest

KINDS = ["dense", "heads out", "heads in", "conv", "grouped conv", "embedding", "tied embedding", "scan", "experts"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("rank", [1, 2])
def test_the_error_is_the_tail_of_the_spectrum(name, rank):
    kind, adapter, delta = world(name)
    small, cut = lj.truncate(adapter, delta, rank)
    assert {max(one.ranks) for one in cut.values()} == {rank}
    rebuilds(small, cut, kind)
    before, after = matrices(adapter, delta, kind), matrices(small, cut, kind)
    for path in delta:
        for d, t in zip(before[path], after[path], strict=True):
            u, s, vt = np.linalg.svd(d)
            near(t, (u[:, :rank] * s[:rank]) @ vt[:rank], 1e-4)
            assert np.linalg.norm(d - t) == pytest.approx(np.linalg.norm(s[rank:]), rel=1e-4)
            assert np.linalg.norm(d - t) > 1e-2, "something was cut"


def test_at_its_own_rank_nothing_is_lost_whatever_the_scale():
    kind, adapter, delta = world("dense")
    assert delta["layers_0/kernel"].scales != (1.0,)
    small, cut = lj.truncate(adapter, delta, 3)
    for path, expected in merged_update(adapter, delta, kind.variables).items():
        near(merged_update(small, cut, kind.variables)[path], expected)


def test_the_truncated_adapter_is_bound_saved_and_truncated_again(tmp_path):
    kind, adapter, delta = world("heads out")
    small, cut = lj.truncate(adapter, delta, 2)
    outputs = lj.lift(kind.function)(small.bind(kind.variables, cut), *kind.args)
    close(outputs, kind.function(small.merge(kind.variables, cut), *kind.args), 1e-5)
    assert furthest(outputs, lj.lift(kind.function)(adapter.bind(kind.variables, delta), *kind.args)) > 1e-2
    lj.save(tmp_path, small, cut, kind.variables)
    read = lj.load(tmp_path, kind.variables)
    assert read[0].spec == small.spec
    one, two = lj.truncate(*read, 1), lj.truncate(adapter, delta, 1)
    for path in delta:
        near(*(merged_update(a, d, kind.variables)[path] for a, d in (one, two)), 1e-4)


def test_layers_of_a_stack_keep_a_smaller_rank_of_their_own():
    kind = kinds.get("scan")
    adapter = lj.lora(rank=[(".*#0", 1), (".*", 3)], targets=".*dense/kernel", dropout=0.25)
    delta = moved(adapter, kind)
    small, cut = lj.truncate(adapter, delta, 2)
    assert cut["layers/dense/kernel"].ranks == (1, 2) and small.spec["dropout"] == 0.25
    rebuilds(small, cut, kind)
    before, after = (x["layers/dense/kernel"] for x in (matrices(adapter, delta, kind), matrices(small, cut, kind)))
    near(after[0], before[0])
    assert np.linalg.norm(after[1] - before[1]) == pytest.approx(np.linalg.svd(before[1])[1][2], rel=1e-4)


def test_layers_left_out_stay_out_and_a_zero_update_stays_zero():
    kind = kinds.get("scan")
    adapter = lj.lora(rank=3, targets=".*dense/kernel", layers="last:1")
    trained = moved(adapter, kind)
    fresh = jax.tree_util.tree_map(jnp.zeros_like, trained)
    for delta in (fresh, trained):
        small, cut = lj.truncate(adapter, delta, 2)
        assert cut["layers/dense/kernel"].ranks == (0, 2)
        rebuilds(small, cut, kind)
        update = merged_update(small, cut, kind.variables)["layers/dense/kernel"]
        assert not update[0].any() and update[1].any() == (delta is not fresh)


def test_other_members_of_a_chain_stay():
    kind = kinds.get("dense")
    chain = lj.chain(lj.chain(lj.full(targets="out/kernel"), lj.lora(rank=3, targets="layers_0/kernel")),
                     lj.lora(rank=2, targets="layers_1/kernel"))  # fmt: skip
    delta = moved(chain, kind)
    small, cut = lj.truncate(chain, delta, 1)
    rebuilds(small, cut, kind)
    before, after = matrices(chain, delta, kind), matrices(small, cut, kind)
    near(after["out/kernel"], before["out/kernel"])
    for path in ("layers_0/kernel", "layers_1/kernel"):
        assert np.linalg.matrix_rank(after[path][0], tol=1e-5) == 1
        tail = np.linalg.svd(before[path][0])[1][1:]
        assert np.linalg.norm(after[path] - before[path]) == pytest.approx(np.linalg.norm(tail), rel=1e-4)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "rank must be an integer of at least 1, got 0"),
        (1.5, "got 1.5"),
        (True, "got True"),
        (4, "rank=4 is above the adapter's own, 3"),
    ],
)
def test_ranks_that_make_no_sense(rank, message):
    _, adapter, delta = world("dense")
    with pytest.raises(lj.UserError, match=message):
        lj.truncate(adapter, delta, rank)


def test_a_method_without_factors():
    kind = kinds.get("dense")
    adapter = lj.full(targets="out/kernel")
    with pytest.raises(lj.UserError, match="truncate needs LoRA factors, and the adapter 'full' has none"):
        lj.truncate(adapter, moved(adapter, kind), 1)


def test_what_the_sites_of_another_member_share_keeps_its_name():
    """A chain puts numbers before the keys of shared entries; another place in the chain means other numbers."""
    kind = kinds.get("dense")
    inner = lj.chain(lj.full(targets="out/kernel"), lj.lora(rank=2, targets="layers_0/kernel"))
    chain = lj.chain(inner, lj.lora(rank=2, targets="layers_1/kernel"))
    delta = moved(chain, kind)
    delta = {"@0:0:name": dataclasses.replace(delta["out/kernel"]), **delta}
    small, cut = lj.truncate(chain, delta, 1)
    assert {path: one.member for path, one in cut.items()} == {
        "layers_0/kernel": "0", "layers_1/kernel": "0", "@1:name": "1", "out/kernel": "1",
    }  # fmt: skip
    assert small.trainable(cut)["@1:name"].value is False
