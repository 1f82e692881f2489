"""Does LoRA adapt a small pretrained decoder to a second domain, on a machine with nothing but this package?

    make quickstart
    python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart

The embedded decoder was pretrained on one generated domain; the run adapts it to another one and shows dev loss, exact
match and generations before and after. Nothing is downloaded.
"""

from lora_jax import config


def get_config():
    cfg = config.default()
    cfg.task.name = "sft"
    cfg.adapter.method = "lora"
    cfg.adapter.rank = 8
    cfg.adapter.alpha = 16
    cfg.train.steps = 300
    cfg.train.batch_size = 16
    cfg.train.learning_rate = 1e-2
    cfg.train.schedule = "cosine"
    cfg.train.eval_every = 100
    cfg.generate.score = 64
    return cfg
