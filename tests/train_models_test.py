"""Training on a family's model: packed rows, a mesh with the family's own rules, a bfloat16 base."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import standin

import lora_jax as lj
from lora_jax import records, sharding
from lora_jax.train import TrainSettings, fit

CONFIG = {
    "model_type": "llama",
    "vocab_size": standin.VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
}
SETTINGS = TrainSettings(
    steps=4,
    batch_size=4,
    learning_rate=1e-2,
    schedule="constant",
    log_every=1,
    packing=True,
    eps=1e-5,
    weight_decay=0.1,
)


def run(workdir, *, dtype="float32", mesh=None, echo=None, settings=SETTINGS):
    base = lj.from_config(CONFIG, dtype=dtype)
    before = jax.tree.map(np.array, base.variables)
    adapter = lj.lora(rank=2, layers="last:1")
    splits = standin.make_splits(24, 6, 0)
    summary = fit(base, adapter, standin.make_task(), splits, settings, workdir, mesh=mesh, max_length=12, echo=echo)
    assert standin.same(base.variables, before)
    return summary, [r["loss"] for r in records.read_jsonl(workdir / "metrics.jsonl") if r["split"] == "train"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(tmp_path_factory.mktemp("alone"))


def test_packed_training_lowers_the_loss(alone):
    summary, losses = alone
    assert losses[-1] < losses[0] - 0.05 and summary["dev"]["loss"] > 0


def test_a_mesh_over_data_fsdp_and_tensor_gives_the_run_of_one_device(alone, tmp_path):
    """Four steps in float32, sums in another order: losses to 1e-4, factors to 1e-3."""
    said = []
    summary, losses = run(tmp_path, mesh=sharding.make_mesh(2, 2, 2), echo=said.append)
    np.testing.assert_allclose(losses, alone[1], rtol=1e-4)
    np.testing.assert_allclose(summary["dev"]["loss"], alone[0]["dev"]["loss"], rtol=1e-4)
    there, here = jax.device_get((summary.delta, alone[0].delta))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-3), there, here)
    assert not any("stays whole" in line for line in said)
    spec = summary.delta["layers_1/mlp/up_proj/kernel"].b.sharding.spec
    assert spec == jax.sharding.PartitionSpec(None, "tensor")


def test_a_bfloat16_base_trains_a_float32_delta(alone, tmp_path):
    summary, losses = run(tmp_path, dtype="bfloat16", settings=dataclasses.replace(SETTINGS, accumulate=2))
    assert {leaf.dtype for leaf in jax.tree.leaves(summary.delta)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(losses, alone[1], rtol=0.03)
    assert losses[-1] < losses[0] - 0.05


def test_shared_rows_train_what_rows_of_their_own_train(tmp_path):
    """The same examples a step, in fewer rows: the same losses and arrays up to rounding."""
    own = dataclasses.replace(SETTINGS, packing=False, batch_size=8)
    apart = run(tmp_path / "apart", settings=own)
    shared = run(tmp_path / "shared", settings=dataclasses.replace(own, share_rows=True))
    np.testing.assert_allclose(shared[1], apart[1], rtol=1e-4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), shared[0].delta, apart[0].delta)
    np.testing.assert_allclose(shared[0]["dev"]["loss"], apart[0]["dev"]["loss"], rtol=1e-4)


def test_a_method_that_needs_a_row_for_each_text_gets_it(tmp_path):
    """`prompt` puts virtual tokens before every text: shared rows are off for it by themselves."""
    own = dataclasses.replace(SETTINGS, packing=False, share_rows=True, steps=1)
    base, splits = lj.from_config(CONFIG), standin.make_splits(24, 0, 0)
    summary = fit(base, lj.prompt(length=2), standin.make_task(), splits, own, tmp_path, max_length=12, echo=None)
    assert summary["step"] == 1
