"""Whole runs with virtual tokens: a decoder on packed rows, an encoder that classifies."""

import jax
import numpy as np
import pytest
import standin

import lora_jax as lj
from lora_jax import records, tasks
from lora_jax.data import Record
from lora_jax.train import TrainSettings, fit
from tests.models import oracle
from tests.train_models_test import CONFIG

METHODS = {
    "prompt": lambda: lj.prompt(length=2, init_tokens=[3, 5]),
    "prefix": lambda: lj.prefix(length=2, hidden=4),
}


def run(workdir, base, adapter, task, splits, **change):
    """(summary, losses): the base keeps its bits, and only the adapter's own arrays train."""
    before = jax.tree.map(np.array, base.variables)
    settings = dict(steps=10, batch_size=8, learning_rate=3e-2, schedule="constant", log_every=1) | change
    summary = fit(base, adapter, task, splits, TrainSettings(**settings), workdir, max_length=12, echo=None)
    assert standin.same(base.variables, before)
    losses = [r["loss"] for r in records.read_jsonl(workdir / "metrics.jsonl") if r["split"] == "train"]
    assert summary["trainable_params"] == sum(x.size for x in jax.tree.leaves(summary.delta))
    return summary, losses


@pytest.mark.parametrize("method", [pytest.param("prompt", marks=pytest.mark.slow), "prefix"])
def test_a_decoder_learns(method, tmp_path):
    base = lj.from_config(CONFIG)
    splits = standin.make_splits(24, 6, 0)
    summary, losses = run(tmp_path, base, METHODS[method](), standin.make_task(), splits, packing=True)
    assert losses[-1] < losses[0] - 0.05
    assert list(summary.delta) == [f"@{method}"]


class Words:
    """A tokenizer of whole words."""

    cls_token_id, model_input_names = 1, ["input_ids"]

    def __call__(self, text, **options):
        return {"input_ids": [1, *(3 + int(word) for word in text.split() if word.isdecimal())]}


@pytest.mark.parametrize("method", ["prompt", pytest.param("prefix", marks=pytest.mark.slow)])
def test_an_encoder_learns(method, tmp_path):
    """Which half of the vocabulary a text is from, with the head trained beside."""
    rng = np.random.default_rng(0)

    def rows(count):
        for i in range(count):
            words = 20 * (i % 2) + rng.integers(0, 20, 3 + i % 4)
            yield Record({"text": " ".join(map(str, words)), "label": "high" if i % 2 else "low"}, f"made line {i}")

    splits = {"train": list(rows(24)), "dev": list(rows(8)), "test": []}
    task = tasks.get("classification")(tokenizer=Words(), max_length=12, splits=splits)
    base = lj.from_config(oracle.ENCODER | {"initializer_range": 0.2}, num_labels=2, dropout=0.0)
    summary, losses = run(tmp_path, base, lj.chain(METHODS[method](), lj.head()), task, splits)
    assert losses[-1] < 0.7 * losses[0]
    assert {path for path in summary.delta if path.startswith("@")} == {f"@0:{method}"}
