"""Runs the commands of experiments/ in this process, through their real flags, and makes small worlds for them."""

import importlib
import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from absl.testing import flagsaver

from experiments import launch, workdir

DECODER = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def run(name: str, *arguments: str) -> int:
    """Runs `python -m experiments.NAME ARGUMENTS`, but in this process; returns its exit code."""
    module = importlib.import_module(f"experiments.{name}")
    base = {} if name in ("train", "report", "benchmark") else {"base": workdir.read}
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        try:
            launch.parse([name, *arguments], **base)
            return launch.call(module.main)
        except SystemExit as ended:
            return int(ended.code or 0)


def command(capsys, name: str, *arguments: str) -> Ended:
    """As `run`, with what it printed."""
    capsys.readouterr()
    return Ended(run(name, *arguments), *capsys.readouterr())


def make_model(folder: Path) -> Path:
    """A decoder with random weights and a tokenizer, as a model directory."""
    from lora_jax.models import from_config, save_pretrained
    from lora_jax.tiny.tokens import save_tokenizer, train_tokenizer

    base = from_config(DECODER)
    draw = np.random.default_rng(0)
    # Large enough weights that an adapter of few steps shows in the text.
    variables = jax.tree.map(
        lambda x: x if x.ndim == 1 else 0.3 * draw.standard_normal(x.shape, x.dtype), base.variables
    )
    save_pretrained(folder, base, variables)
    save_tokenizer(train_tokenizer(["the sea is blue", "a red boat"], DECODER["vocab_size"]), folder, 64)
    return folder


def write(folder: Path, **splits: list[dict] | str) -> Path:
    """A directory of JSONL files; a split given as text is written as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)
    return folder
