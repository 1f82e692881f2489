r"""Does LoRA need a higher learning rate than full fine-tuning, and how much does a wrong one cost?

    python -m experiments.ablate --config=configs/ablations/learning_rate.py --workdir=runs/learning_rate \
        --config.data.path=DIR/sst2

LoRA of rank 8 on every linear weight against training every weight; seven learning rates, half a decade apart, three
seeds, 42 arms. DIR/sst2 holds train/dev/test.jsonl with `text` and `label`.

Result: not run yet.
"""

from configs import sst2_minilm
from lora_jax.ablation import axis, product


def get_config():
    cfg = sst2_minilm.get_config()
    cfg.adapter.targets = "default"
    return cfg


def sweep():
    return product(
        axis("adapter.method", ["lora", "full"]),
        axis("train.learning_rate", [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2]),
        axis("seed", range(3)),
    )
