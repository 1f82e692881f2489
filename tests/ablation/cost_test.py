"""What an arm costs: counted like the run counts it, from shapes alone, and near what the compiler says."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import standin

import lora_jax as lj
from experiments.benchmarks import measure
from lora_jax import config
from lora_jax.ablation import axis, expand, product
from lora_jax.ablation.cost import base_bytes, estimate
from lora_jax.ablation.survey import survey, table
from lora_jax.lift import lift
from lora_jax.optim import make_optimizer
from lora_jax.step import init_state, make_train_step
from lora_jax.train import TrainSettings, init_delta

SETTINGS = TrainSettings(steps=10, batch_size=4)
BASE = lj.from_config({
    "model_type": "llama", "vocab_size": standin.VOCAB, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16,
})  # fmt: skip
BATCH = {name: np.ones((4, 16), np.int32) for name in ("tokens", "segment_ids", "positions", "targets")}
BATCH["ids"] = np.arange(4, dtype=np.int32)[:, None]
BATCH["weights"] = np.ones((4, 16), np.float32)


def cost(adapter, **options):
    return estimate(BASE, adapter, standin.make_task(), SETTINGS, BATCH, steps=10, **options)


def test_the_estimate_is_near_the_compiled_step():
    """Parameters and bytes exactly; FLOPs within 5 %, activations as `cost` has them for MiniLM."""
    adapter, task = lj.lora(rank=4), standin.make_task()
    delta = init_delta(BASE, adapter)
    state = init_state(delta, adapter.trainable(delta), tx := make_optimizer(lambda count: 1e-3, clip_norm=1.0))
    step = make_train_step(lift(BASE.apply), adapter, task, tx, adapter.trainable(delta))
    compiled = step.lower(state, BASE.variables, BATCH).compile()
    flops = measure.flops(compiled)
    found = cost(adapter)
    assert 0.6 < found.activation_bytes / measure.temporaries(compiled) < 1.1
    nbytes = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert found.trainable_params == sum(x.size for x in jax.tree.leaves(delta))
    assert (found.delta_bytes, found.base_bytes) == (nbytes(delta), nbytes(BASE.variables))
    assert found.slot_bytes == nbytes(state.opt_state)
    np.testing.assert_allclose(found.step_flops, flops, rtol=0.05)
    assert found.run_flops == found.step_flops * 10 and found.peak_bytes > found.base_bytes + found.delta_bytes


def test_a_base_that_draws_dropout():
    """Its backward pass keeps the key, which is no number."""
    sizes = {"vocab_size": standin.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 16}
    task = types.SimpleNamespace(
        inputs=lambda batch: {"tokens": batch["tokens"]},
        loss=lambda outputs, batch: (jnp.sum(outputs**2), jnp.ones(())),
    )
    found = {}
    for rate in (0.0, 0.1):
        base = lj.from_config({"model_type": "bert", **sizes}, num_labels=2, dropout=rate)
        found[rate] = estimate(base, lj.lora(rank=4), task, SETTINGS, BATCH, steps=10)
    assert 0 <= found[0.1].activation_bytes - found[0.0].activation_bytes <= 64, "a key, and no mask"
    assert found[0.1].step_flops > found[0.0].step_flops


def test_fewer_layers_cost_less_and_a_higher_rank_more():
    low, high, last = cost(lj.lora(rank=1)), cost(lj.lora(rank=8)), cost(lj.lora(rank=1, layers="last:1"))
    assert last.step_flops < 0.8 * low.step_flops < low.step_flops < high.step_flops
    assert last.activation_bytes < low.activation_bytes


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_bytes_of_a_quantized_base_are_those_of_the_packed_arrays(form):
    base = lj.from_config({
        "model_type": "llama", "vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16,
    })  # fmt: skip
    packed = lj.quantize(base.variables, base.sites, form)
    real = sum(leaf.nbytes for leaf in jax.tree.leaves(packed))
    np.testing.assert_allclose(base_bytes(base, form), real, rtol=0.01)


def test_a_survey_reads_no_weights_and_the_table_has_every_arm():
    cfg = config.default()
    cfg.data.limit, cfg.train.steps, cfg.train.batch_size = 40, 3, 4
    grid = product(axis("adapter.rank", [1, 4]), axis("train.learning_rate", [1e-3, 1e-2]))
    arms = expand(grid, functools.partial(config.variant, cfg))
    costs = survey(arms)
    assert costs[0] is costs[1] and costs[2] is costs[3], "no shape depends on the learning rate"
    assert costs[2].trainable_params == 4 * costs[0].trainable_params
    lines = table(arms, costs).splitlines()
    assert len(lines) == 6 and all(arm.id in line and arm.label in line for arm, line in zip(arms, lines[1:]))
    assert lines[-1].startswith("4 arms, ")


def test_a_run_with_a_prefix_cache_pays_what_lies_below_the_adapter_once():
    """Two of three layers lie below; at one epoch no row comes again and nothing is kept."""
    cfg = config.default()
    cfg.data.limit, cfg.train.batch_size, cfg.adapter.layers = 40, 4, "last:1"
    costs = {}
    for mode, steps in [("auto", 100), ("off", 100), ("auto", 10)]:
        cfg.train.prefix_cache, cfg.train.steps = mode, steps
        arms = expand(axis("adapter.rank", [2]), functools.partial(config.variant, cfg))
        [costs[mode, steps]] = survey(arms)
        assert ("1 of 1 arms compute what lies below" in table(arms, [costs[mode, steps]])) == (
            (mode, steps) == ("auto", 100)
        )
    cached, whole, once = costs.values()
    assert cached.cache_bytes > 0 == whole.cache_bytes == once.cache_bytes
    assert once.step_flops == whole.step_flops > 1.2 * cached.step_flops
    saved = whole.step_flops - cached.step_flops  # of every step: the prefix's forward pass
    passes = cached.run_flops / whole.run_flops * whole.step_flops * 100 - cached.step_flops * 100
    np.testing.assert_allclose(passes, 10 * saved, rtol=0.05)
