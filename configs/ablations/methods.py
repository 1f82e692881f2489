r"""Which method is best when each gets the same search for its learning rate?

    python -m experiments.ablate --config=configs/ablations/methods.py --workdir=runs/methods \
        --config.data.path=DIR/sst2

Every method of `lora_jax/adapters/` with its own defaults and the head beside it; `head` alone and `full` are the two
baselines. Three learning rates, a decade apart, and three seeds each: 153 arms. Methods differ in trainable parameters,
so look at the metric against them too; where a method's best learning rate is at the edge of the search, the search
was too narrow for it.
DIR/sst2 holds train/dev/test.jsonl with `text` and `label`.

Result with 45 steps of 16 examples (experiments/results/methods; 76 minutes on 2 CPU cores): dev accuracy of
oft 0.788, dora 0.77, lora 0.76, loha, layers, full and dynamic_rank 0.75, lokr 0.73, bottleneck 0.72, layernorm 0.70,
ia3 0.69, bitfit 0.66, prefix 0.65, vera 0.64, head and adalora 0.63, prompt 0.57. So short a run asks who learns fast.
3 seeds tell none of 16 from lora after correction; for 8 methods the best rate is at the edge of the search.
"""

from configs import sst2_minilm
from lora_jax import methods
from lora_jax.ablation import axis, product


def get_config():
    cfg = sst2_minilm.get_config()
    for field in ("rank", "alpha", "targets"):
        cfg.adapter[field] = "default"
    return cfg


def sweep():
    return product(
        axis("adapter.method", [name for name in methods() if name != "chain"]),
        axis("train.learning_rate", [1e-4, 1e-3, 1e-2]),
        axis("seed", range(3)),
    )
