"""Packs: arms that one program holds, none paying much for another, and what cannot be packed alone."""

import functools

import pytest

from lora_jax import config
from lora_jax.ablation import axis, expand, product, zipped
from lora_jax.ablation.running import planner, run

SHAPES = run.Shapes()
ARMS = []  # of every call of `packs`


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(planner, "MOST", 16)


def packs(grid, memory=float("inf"), most=16, **changes):
    """Labels of the arms of each pack; the model is the embedded one."""
    cfg = config.default()
    for name, value in changes.items():
        section, _, field = name.partition("__")
        (cfg[section] if field else cfg)[field or section] = value
    cfg.train.steps = 2
    arms = expand(grid, functools.partial(config.variant, cfg))
    bounds = planner.Bounds(memory, most)
    ARMS.append(arms)
    return [[arm.label for arm in pack] for pack in planner.plan(arms, SHAPES, bounds)]


def test_what_is_data_packs_and_what_is_not_does_not():
    rates = axis("train.learning_rate", [1e-3, 1e-2])
    assert len(packs(product(rates, axis("adapter.alpha", [4, 16]), axis("train.clip_norm", [0.0, 1.0])))) == 1
    for field, values in {
        "train.batch_size": [4, 8], "train.steps": [2, 3], "adapter.options.dropout": [0.0, 0.1],
        "adapter.method": ["lora", "dora"], "train.schedule": ["linear", "cosine"],
        "model.dtype": ["float32", "bfloat16"],
    }.items():  # fmt: skip
        found = packs(product(axis(field, values), rates))
        assert [len(pack) for pack in found] == [2, 2], field


def test_ranks_and_layers_pack_where_none_pays_much_for_another():
    """A low rank is hardly cheaper than another low one; the last layer alone is much cheaper than all of them."""
    assert len(packs(axis("adapter.rank", [1, 2, 4]))) == 1
    assert packs(axis("adapter.layers", ["last:1", "all"])) == [["layers=last:1"], ["layers=all"]]
    assert len(packs(axis("adapter.layers", [[0], "all"]))) == 1, "both need the backward pass down to layer 0"
    assert len(packs(axis("adapter.rank", [1, 64]))) == 2, "at rank 64 the adapter is a good part of the work"


def test_every_arm_is_in_one_pack_in_the_order_of_the_grid():
    grid = product(axis("adapter.rank", [1, 2]), axis("adapter.layers", ["last:1", "all"]), axis("seed", range(2)))
    found = packs(grid)
    assert sorted(len(pack) for pack in found) == [2, 2, 4], "the last layer's packs share what lies below"
    assert sorted(label for pack in found for label in pack) == sorted({label for pack in found for label in pack})
    assert found[0][0] == "rank=1 layers=last:1 seed=0"


def test_seeds_train_together_where_it_costs_no_shared_prefix():
    """An arm of each seed has nothing to share; two arms of a seed share all but the last layer."""
    seeds, last = axis("seed", [0, 1]), dict(adapter__layers="last:1")
    assert [len(p) for p in packs(seeds)] == [2] and [len(p) for p in packs(seeds, **last)] == [2]
    rates = product(seeds, axis("train.learning_rate", [1e-3, 1e-2]))
    assert [len(p) for p in packs(rates)] == [4] and [len(p) for p in packs(rates, most=3)] == [2, 2]
    assert packs(rates, **last)[0] == ["seed=0 learning_rate=0.001", "seed=0 learning_rate=0.01"]


def test_seeds_train_apart_where_an_arm_would_not_be_the_run_alone():
    """Packed rows depend on the seed; dropout masks on the length of a batch, unless there is one length."""
    seeds, dropout = axis("seed", [0, 1]), dict(adapter__options=dict(dropout=0.1))
    for changes, apart in [
        (dict(train__packing=True), "train.packing"), (dropout, "draw dropout"),
        (dict(**dropout, train__share_rows=True), ""), (dict(**dropout, train__buckets=[128]), ""),
    ]:  # fmt: skip
        assert [len(p) for p in packs(seeds, **changes)] == ([1, 1] if apart else [2]), changes
        why = planner.reasons(ARMS[-1], SHAPES)
        assert len(why) == bool(apart) and apart in "".join(why)
        assert not why or why[0].startswith("seeds train apart in 2 of 2 arms: ")


def test_memory_is_half_of_what_there_is_and_less_on_a_cpu(monkeypatch):
    monkeypatch.setattr(planner, "CPU_MEMORY", 1.0)
    assert run.usual_memory() == 1.0
    assert run.usual_memory(here=False) > 1e9, "nothing is known of other machines"

    class Device:
        def memory_stats(self):
            return {"bytes_limit": 80}

    monkeypatch.setattr(run.jax, "devices", lambda: [Device()])
    assert run.usual_memory() == 40


def test_memory_and_the_flag_bound_a_pack():
    grid = axis("train.learning_rate", [1e-3, 2e-3, 3e-3, 4e-3])
    assert [len(pack) for pack in packs(grid, most=3)] == [3, 1]
    assert [len(pack) for pack in packs(grid, most=1)] == [1, 1, 1, 1]
    assert [len(pack) for pack in packs(grid, memory=1.0)] == [1, 1, 1, 1]
    own = planner.activations(SHAPES(ARMS[-1][0]))
    assert [len(pack) for pack in packs(grid, memory=3.5 * own)] == [3, 1]
    seeds = product(axis("seed", [0, 1]), axis("train.learning_rate", [1e-3, 2e-3]))
    assert [len(pack) for pack in packs(seeds, memory=3.5 * own)] == [2, 2], "mixing seeds is bound too"


def test_what_starts_from_data_and_what_has_a_mesh_trains_alone():
    rates = [1e-3, 2e-3]
    eva = zipped(axis("adapter.options.init", ["eva", "eva"]), axis("train.learning_rate", rates))
    assert [len(pack) for pack in packs(eva)] == [1, 1]
    assert [len(pack) for pack in packs(axis("train.learning_rate", rates), mesh__data=2)] == [1, 1]
    budget = product(axis("adapter.method", ["adalora"]), axis("adapter.layers", ["last:3", "last:4"]))
    assert [len(pack) for pack in packs(budget)] == [1, 1], "its budget is shared by all sites"
