r"""How high a rank does sentiment need, and does that depend on how many layers are adapted?

    python -m experiments.ablate --config=configs/ablations/rank.py --workdir=runs/rank \
        --config.data.path=DIR/sst2

54 arms: six ranks, three choices of layers, three seeds; LoRA on query and value, alpha 16 and the scale alpha / rank
throughout (`scaling.py` asks what that rule does). DIR/sst2 holds train/dev/test.jsonl with `text` and `label`.

Result: not run yet.
"""

from configs import sst2_minilm
from lora_jax.ablation import axis, product


def get_config():
    return sst2_minilm.get_config()


def sweep():
    return product(
        axis("adapter.rank", [1, 2, 4, 8, 16, 32]),
        axis("adapter.layers", ["last:1", "last:3", "all"]),
        axis("seed", range(3)),
    )
