"""Packs: arms that one program holds, none paying much for another, and what cannot be packed alone."""

import functools

import pytest

from lora_jax import config
from lora_jax.ablation import axis, expand, product, zipped
from lora_jax.ablation.running import planner, run

SHAPES = run.Shapes()


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
    return [[arm.label for arm in pack] for pack in planner.plan(arms, SHAPES, memory=memory, most=most)]


def test_what_is_data_packs_and_what_is_not_does_not():
    rates = axis("train.learning_rate", [1e-3, 1e-2])
    assert len(packs(product(rates, axis("adapter.alpha", [4, 16]), axis("train.clip_norm", [0.0, 1.0])))) == 1
    for field, values in {
        "seed": [0, 1], "train.batch_size": [4, 8], "train.steps": [2, 3], "adapter.options.dropout": [0.0, 0.1],
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
    assert sorted(len(pack) for pack in found) == [2, 2, 2, 2]
    assert sorted(label for pack in found for label in pack) == sorted({label for pack in found for label in pack})
    assert found[0][0] == "rank=1 layers=last:1 seed=0"


def test_memory_and_the_flag_bound_a_pack():
    grid = axis("train.learning_rate", [1e-3, 2e-3, 3e-3, 4e-3])
    assert [len(pack) for pack in packs(grid, most=3)] == [3, 1]
    assert [len(pack) for pack in packs(grid, most=1)] == [1, 1, 1, 1]
    assert [len(pack) for pack in packs(grid, memory=1.0)] == [1, 1, 1, 1]


def test_what_starts_from_data_and_what_has_a_mesh_trains_alone():
    rates = [1e-3, 2e-3]
    eva = zipped(axis("adapter.options.init", ["eva", "eva"]), axis("train.learning_rate", rates))
    assert [len(pack) for pack in packs(eva)] == [1, 1]
    assert [len(pack) for pack in packs(axis("train.learning_rate", rates), mesh__data=2)] == [1, 1]
    budget = product(axis("adapter.method", ["adalora"]), axis("adapter.layers", ["last:3", "last:4"]))
    assert [len(pack) for pack in packs(budget)] == [1, 1], "its budget is shared by all sites"
