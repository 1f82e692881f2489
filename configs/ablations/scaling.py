r"""Which rule for the scale lets a higher rank help: alpha / r, alpha / sqrt(r), or alpha alone?

    python -m experiments.ablate --config=configs/ablations/scaling.py --workdir=runs/scaling \
        --config.data.path=DIR/sst2

The rules of Hu et al. (2021), arXiv:2106.09685, of rsLoRA (Kalajdzievski, 2023, arXiv:2312.03732), and a scale that
knows no rank. Each has the alpha that makes its scale 2 at rank 8, so that they differ away from it alone. LoRA on
query and value, five ranks, three seeds, 45 arms. DIR/sst2 holds train/dev/test.jsonl with `text` and `label`.

Result: not run yet.
"""

import math

from configs import sst2_minilm
from lora_jax.ablation import axis, product, zipped

SCALE, AT_RANK = 2, 8


def get_config():
    return sst2_minilm.get_config()


def sweep():
    rules = zipped(
        axis("adapter.options.scaling", ["alpha/r", "alpha/sqrt(r)", "alpha"]),
        axis("adapter.alpha", [SCALE * AT_RANK, SCALE * math.sqrt(AT_RANK), SCALE]),
    )
    return product(rules, axis("adapter.rank", [1, 4, 8, 16, 64]), axis("seed", range(3)))
