r"""Does LoRA teach a decoder to write restaurant descriptions from meaning representations (E2E)?

    python -m experiments.train --config=configs/e2e.py --workdir=runs/e2e \
        --config.data.path=DIR/e2e --config.model.path=MODEL

DIR/e2e holds train/dev/test.jsonl with `mr` (the prompt) and `ref` (the completion); MODEL is any decoder in Hugging
Face layout, and without it the embedded tiny one. `python -m experiments.evaluate --workdir=runs/e2e --split=test` then
scores generated text.
"""

from lora_jax import config


def get_config():
    cfg = config.default()
    cfg.data.path = "data/e2e"
    cfg.data.fields.prompt = "mr"
    cfg.data.fields.completion = "ref"
    cfg.data.max_length = 256
    cfg.task.name = "sft"
    cfg.adapter.method = "lora"
    cfg.adapter.rank = 8
    cfg.adapter.alpha = 16
    cfg.train.steps = 600
    cfg.train.batch_size = 16
    cfg.train.learning_rate = 2e-3
    cfg.train.warmup = 0.05
    cfg.train.eval_every = 200
    return cfg
