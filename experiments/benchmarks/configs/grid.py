r"""How much faster is a grid of ranks and layers than one PEFT run after the other?

    python -m experiments.benchmark --rows=grid

24 arms: four ranks, three choices of layers, two seeds, of 200 steps each.
"""

from configs import sst2_minilm
from lora_jax.ablation import axis, product

RANKS = (1, 4, 16, 64)
LAYERS = ("last:1", "last:3", "all")
SEEDS = (0, 1)


def get_config():
    cfg = sst2_minilm.get_config()
    cfg.train.steps = 200
    return cfg


def sweep():
    return product(axis("adapter.rank", RANKS), axis("adapter.layers", LAYERS), axis("seed", SEEDS))
