r"""Which matrices should share a budget of parameters: many at a low rank, or few at a high one?

    python -m experiments.ablate --config=configs/ablations/matrices.py --workdir=runs/matrices \
        --config.data.path=DIR/sst2

As table 5 of Hu et al. (2021), arXiv:2106.09685, with the feed-forward matrices added. Every choice gets the largest
rank within 165,888 parameters, what one attention matrix of MiniLM's six layers has at rank 36: q, k, v or o 36, q,v
18, q,k,v,o 9, up 14, up,down 7 and all six 4; the two choices of feed-forward matrices alone use 97 % of the budget,
the others all of it. The scale is 2 at every rank. 9 choices times 3 seeds, 27 arms. DIR/sst2 holds
train/dev/test.jsonl with `text` and `label`.

Result with --config.train.steps=100 (experiments/results/matrices; 46 minutes on 2 CPU cores): dev accuracy of up,down
0.830, up 0.828, all six 0.826, q,v 0.825, q,k,v,o 0.821, v 0.82, o 0.813, k 0.807, q 0.804. The order repeats the
paper's (q or k alone is worst) and puts the feed-forward matrices first, but 3 seeds tell none of the 8 from q alone
after correction: up,down is better by 0.026 +- 0.018, p = 0.19, and about 5 seeds would settle it.
"""

from configs import sst2_minilm
from lora_jax import models
from lora_jax.ablation import axis, equal_parameters, product

BUDGET = 165_888
CHOICES = ["q", "k", "v", "o", "q,v", "q,k,v,o", "up", "up,down", "q,k,v,o,up,down"]


def get_config():
    cfg = sst2_minilm.get_config()
    cfg.adapter.options.scaling = "alpha"  # the scale is alpha itself, so that it does not depend on the rank
    cfg.adapter.alpha = 2
    return cfg


def sweep(cfg=None):
    """`cfg`: the config with the command line's changes, whose model tells the sizes of its matrices."""
    sites = models.outline((cfg or get_config()).model.path).sites
    return product(equal_parameters(BUDGET, axis("adapter.targets", CHOICES), sites), axis("seed", range(3)))
