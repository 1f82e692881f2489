"""The algebra of grids: what is combined, in which order, and the message of every mistake."""

import numpy as np
import pytest

from lora_jax.ablation import Grid, axis, chain, from_sweep, product, zipped
from lora_jax.errors import UserError

RANKS, LAYERS = axis("adapter.rank", [1, 4]), axis("adapter.layers", ["last:1", "all"])


def refused(function, *words):
    with pytest.raises(UserError) as raised:
        function()
    for word in words:
        assert word in str(raised.value), str(raised.value)


def test_an_axis_keeps_the_order_and_the_values():
    assert list(axis("seed", range(2))) == [{"seed": 0}, {"seed": 1}]
    rules = [(".*/query/kernel", 4), (".*", 8)]
    assert list(axis("adapter.rank", [4, rules, None, "default"]))[1] == {"adapter.rank": rules}


def test_numpy_values_become_plain_numbers():
    values = [cell["train.learning_rate"] for cell in axis("train.learning_rate", np.logspace(-4, -2, 3))]
    assert [type(v) for v in values] == [float] * 3 and values[1] == pytest.approx(1e-3)


def test_product_runs_its_last_axis_fastest():
    cells = [tuple(cell.values()) for cell in product(RANKS, LAYERS)]
    assert cells == [(1, "last:1"), (1, "all"), (4, "last:1"), (4, "all")]


def test_zipped_goes_side_by_side_and_may_repeat_values():
    grid = zipped(axis("adapter.rank", [4, 8, 16]), axis("adapter.alpha", [8, 8, 16]))
    assert [tuple(cell.values()) for cell in grid] == [(4, 8), (8, 8), (16, 16)]


def test_chain_goes_one_after_the_other_and_keeps_a_common_cell_once():
    grid = chain(RANKS, axis("adapter.rank", [4, 2, 1]), LAYERS)
    assert list(grid) == [*RANKS, {"adapter.rank": 2}, *LAYERS]
    assert grid.fields == ("adapter.rank", "adapter.layers")


def test_repeated_cells_are_found_whatever_the_order_of_their_fields():
    assert chain(product(RANKS, LAYERS), product(LAYERS, RANKS)) == product(RANKS, LAYERS)
    assert len(chain(axis("train.packing", [True]), axis("train.packing", [1]))) == 2, "True is not 1"


def test_where_keeps_what_holds():
    grid = product(RANKS, LAYERS).where(lambda o: o["adapter.rank"] == 4 or o["adapter.layers"] == "all")
    assert [tuple(cell.values()) for cell in grid] == [(1, "all"), (4, "last:1"), (4, "all")]


def test_a_grid_cannot_be_changed_through_its_cells():
    grid = product(RANKS, LAYERS)
    grid[0]["adapter.rank"] = 99
    next(iter(grid)).clear()
    grid.where(lambda o: o.update(seed=1) or True)
    assert grid == product(RANKS, LAYERS) and isinstance(grid[:2], Grid)


def test_mistakes_say_what_was_given_and_what_to_do():
    refused(lambda: axis("adapter.rank", []), "adapter.rank", "no value")
    refused(lambda: axis("adapter.layers", "all"), "'all'", "[value]")
    refused(lambda: axis("seed", 3), "a list of values")
    refused(lambda: axis("seed", {0, 1}), "in their order")
    refused(lambda: axis(["seed"], [0]), "config field")
    refused(lambda: product(), "at least one grid")
    refused(lambda: product(RANKS, {"seed": [0]}), "takes grids", "seed")
    refused(lambda: product(RANKS, LAYERS, RANKS), "sets 'adapter.rank' twice", "one axis")
    refused(lambda: zipped(RANKS, axis("adapter.rank", [2, 3])), "sets 'adapter.rank' twice")
    refused(lambda: zipped(RANKS, axis("seed", range(3))), "adapter.rank has 2; seed has 3", "product()")
    refused(lambda: chain(), "at least one grid")
    refused(lambda: RANKS.where(lambda o: o["adapter.rank"] > 9), "none of the 2 arms", "adapter.rank=1")
    refused(lambda: RANKS.where(lambda o: o["adapter.rnak"]), "adapter.rnak", "did you mean 'adapter.rank'")
    refused(lambda: chain(RANKS, LAYERS).where(lambda o: o["adapter.rank"]), "not every part", "get(")


def test_a_sweep_may_take_the_config():
    assert from_sweep(lambda: RANKS, {"seed": 5}) == RANKS
    assert from_sweep(lambda cfg: axis("seed", [cfg["seed"]]), {"seed": 5})[0] == {"seed": 5}
    refused(lambda: from_sweep(lambda: [{"seed": 0}]), "returned list", "expected a grid")
