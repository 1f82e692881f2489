r"""Which layers are worth adapting: each by itself, the first or the last few, or all?

    python -m experiments.ablate --config=configs/ablations/layers.py --workdir=runs/layers \
        --config.data.path=DIR/sst2

LoRA of rank 8 on query and value; fewer layers have fewer parameters (`lora_jax.ablation.equal_parameters` evens that
out, as `matrices.py` does). On the 6 layers of MiniLM 15 choices times 3 seeds, 45 arms; another `model.path` has as
many choices as its layers make. DIR/sst2 holds train/dev/test.jsonl with `text` and `label`.

Result: not run yet.
"""

from configs import sst2_minilm
from lora_jax import models
from lora_jax.ablation import axis, chain, product
from lora_jax.sites import count_layers


def get_config():
    return sst2_minilm.get_config()


def sweep(cfg=None):
    """`cfg`: the config with the command line's changes, whose model tells how many layers there are."""
    total = count_layers(models.outline((cfg or get_config()).model.path).sites)
    several = range(2, total)
    layers = chain(
        axis("adapter.layers", [[i] for i in range(total)]),
        axis("adapter.layers", [f"first:{k}" for k in several]),
        axis("adapter.layers", [f"last:{k}" for k in several]),
        axis("adapter.layers", ["all"]),
    )
    return product(layers, axis("seed", range(3)))
