"""The work of the rows on sentences: the flags of our commands, the settings of the peer, and a toy model with data."""

import random
from pathlib import Path
from typing import Any

from experiments.benchmarks.row import Plan
from lora_jax import records

CONFIG = "configs/sst2_minilm.py"
LAYERS = 6  # of MiniLM
TOY_LAYERS = 3
WORDS = {"positive": "fine warm bright kind".split(), "negative": "dull cold bleak mean".split()}
PLAIN = "the film its story a scene and every actor".split()


def layers(plan: Plan) -> int:
    """Of the encoder."""
    return TOY_LAYERS if plan.toy else LAYERS


def steps(plan: Plan, real: int) -> int:
    """Steps of a run."""
    return 3 if plan.toy else real


def flags(plan: Plan, **more: Any) -> dict[str, Any]:
    """Flags of `experiments.train`; `more` are fields of the config, __ for the dot."""
    given = {"config": CONFIG, "workdir": "{scratch}/run", **overrides(plan)}
    return given | {f"config.{name.replace('__', '.')}": value for name, value in more.items()}


def overrides(plan: Plan) -> dict[str, Any]:
    """Flags that say which model and data."""
    toy = {"config.train.batch_size": 4, "config.train.eval_every": 2, "config.data.max_length": 16}
    return {"config.data.path": plan.data, "config.model.path": plan.model, **(toy if plan.toy else {})}


def peer_settings(plan: Plan, count: int, limit: int | None = None) -> dict[str, Any]:
    """What configs/sst2_minilm.py says, for third_party/peers/sst2.py; the arms are still to be named."""
    small = {"batch_size": 4, "eval_every": 2, "max_length": 16} if plan.toy else {}
    given = {"batch_size": 32, "eval_every": 100, "max_length": 64, "learning_rate": 1e-3, "alpha": 16, "limit": limit}
    return {**given, **small, "model": plan.model, "data": plan.data, "steps": count}


def read_run(scratch: Path, seconds: float) -> dict[str, float]:
    """What a finished `experiments.train` says of itself."""
    del seconds  # its own clock begins when it trains
    summary = records.read_json(scratch / "run" / "summary.json")
    out = {f"{split}_accuracy": summary[split]["accuracy"] for split in ("dev", "test")}
    return {**out, "training_seconds": summary["seconds"], "steps": summary["step"]}


def make_toy(folder: Path) -> tuple[str, str]:
    """(model directory, data directory) of a few seconds' work; made once."""
    import lora_jax as lj
    from lora_jax.tiny.tokens import save_tokenizer, train_tokenizer

    model, data = folder / "model", folder / "data"
    if not (data / "test.jsonl").exists():
        config = dict(
            model_type="bert", vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=TOY_LAYERS,
            num_attention_heads=2, max_position_embeddings=32,
        )  # fmt: skip
        base = lj.from_config(config)
        lj.save_pretrained(model, base, base.variables)
        save_tokenizer(train_tokenizer([" ".join([*PLAIN, *sum(WORDS.values(), [])])], 320), model, 32)
        draw = random.Random(0)
        for split, count in (("train", 32), ("dev", 8), ("test", 8)):
            records.write_jsonl(data / f"{split}.jsonl", [_sentence(draw) for _ in range(count)])
    return str(model), str(data)


def _sentence(draw: random.Random) -> dict[str, str]:
    label = draw.choice(sorted(WORDS))
    words = [*draw.sample(PLAIN, draw.randint(2, 6)), draw.choice(WORDS[label])]
    return {"text": " ".join(words), "label": label}
