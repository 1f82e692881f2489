"""Every method trains a decoder and a classifier by its own defaults: the loss falls, the base stays as it was."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import standin

import lora_jax as lj
from lora_jax import optim
from lora_jax.data import Batches
from lora_jax.step import delta_of, init_state, make_train_step

SHAPE = dict(vocab_size=standin.VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
CONFIGS = {
    "llama": {"model_type": "llama", **SHAPE, "num_key_value_heads": 1, "max_position_embeddings": 32},
    "bert": {
        "model_type": "bert", **SHAPE, "max_position_embeddings": 32, "type_vocab_size": 2,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
}  # fmt: skip
STEPS = 12
# A run fills in its number of steps; virtual tokens are few, since the model has 32 positions.
OPTIONS = {
    "adalora": {"total_steps": STEPS},
    "dynamic_rank": {"total_steps": STEPS},
    "prompt": {"length": 2},
    "prefix": {"length": 2, "hidden": 8},
}


def _classes():
    """The stand-in task's sequences, told apart by their first token."""
    task = standin.make_task()

    def encode(record):
        tokens = np.asarray(record.values["tokens"], np.int32)
        return {"tokens": tokens, "labels": np.int32(tokens[0] % 2)}

    def loss(outputs, batch):
        nll = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["labels"].reshape(-1))
        return jnp.sum(nll), jnp.asarray(nll.size, jnp.float32)

    return dataclasses.replace(task, encode=encode, loss=loss)


def _adapter(method, base):
    adapter = lj.adapters.get(method)(**OPTIONS.get(method, {}))
    if base.num_labels is not None and method not in ("full", "layers", "head"):
        taken = set(adapter.init(jax.random.key(0), base.variables, base.sites))
        head = [p for p, s in base.sites.items() if s.role == "head" and p not in taken]
        adapter = lj.chain(adapter, lj.head(targets=head)) if head else adapter
    return adapter


FAMILIES = ["bert", pytest.param("llama", marks=pytest.mark.slow)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [m for m in lj.methods() if m != "chain"])
def test_trains(method, family):
    base = lj.from_config(CONFIGS[family] | {"initializer_range": 0.3}, num_labels=2 if family == "bert" else None)
    before = jax.tree.map(np.array, base.variables)
    adapter, task = _adapter(method, base), _classes() if family == "bert" else standin.make_task()
    delta = adapter.init(jax.random.key(0), base.variables, base.sites)
    mask = adapter.trainable(delta)
    tx = optim.make_optimizer(2e-2)
    tx = adapter.wrap(tx) if adapter.wrap else tx
    state = init_state(delta, mask, tx)
    slots = sum(x.size for x in jax.tree.leaves(optax.tree_utils.tree_get(state.opt_state, "mu")))
    assert slots == sum(x.size for x, on in zip(jax.tree.leaves(delta), jax.tree.leaves(mask), strict=True) if on)
    batch = Batches([task.encode(r) for r in standin.make_records(8)], batch_size=8, buckets=[6])[0]
    step = make_train_step(lj.lift(base.apply), adapter, task, tx, mask)
    losses = []
    for _ in range(STEPS):
        state, found = step(state, base.variables, batch)
        losses.append(float(found["loss_sum"] / found["weight"]))
    assert losses[-1] < losses[0] - 0.02, losses
    assert standin.same(base.variables, before)
    assert step._cache_size() == 1, "one program for the whole run"
    assert jax.tree.structure(delta_of(state, mask)) == jax.tree.structure(delta)
