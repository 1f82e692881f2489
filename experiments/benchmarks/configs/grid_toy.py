"""Does the benchmark of grids run? Four arms of what grid.py has."""

from experiments.benchmarks.configs import grid
from lora_jax.ablation import axis, product

RANKS = (1, 4)
LAYERS = ("last:1", "all")
SEEDS = (0,)
get_config = grid.get_config


def sweep():
    return product(axis("adapter.rank", RANKS), axis("adapter.layers", LAYERS), axis("seed", SEEDS))
