"""The Llama family: options that change the numbers, packing, the cache. No torch here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import trees
from lora_jax.errors import UserError
from lora_jax.models import from_config, layers
from tests.models import oracle


@pytest.fixture(scope="module")
def base():
    made = from_config(oracle.DECODER | {"rope_parameters": oracle.LLAMA3 | {"rope_theta": 10000.0}})
    return dataclasses.replace(made, variables=oracle.random_weights(made))


def test_names_of_weights():
    found = set(trees.flatten(from_config(oracle.DECODER).variables))
    assert {"embed_tokens/embedding", "layers_0/self_attn/q_proj/kernel", "layers_1/mlp/up_proj/kernel"} <= found
    assert {"layers_0/input_layernorm/scale", "norm/scale", "lm_head/kernel"} <= found
    assert "lm_head/kernel" not in trees.flatten(from_config(oracle.DECODER | {"tie_word_embeddings": True}).variables)
    headed = set(trees.flatten(from_config(oracle.DECODER, num_labels=3).variables))
    assert "score/kernel" in headed and "lm_head/kernel" not in headed


@pytest.mark.parametrize("positions", ["given", "found"])
def test_packed_equals_separate_rows(base, positions):
    tokens, mask = oracle.padded_batch()
    apply = oracle.jitted(base)
    separate = apply(base.variables, tokens, mask)
    lengths = oracle.LENGTHS
    packed = np.concatenate([tokens[i, :n] for i, n in enumerate(lengths)] + [np.zeros(4, np.int32)])[None]
    segments = np.concatenate([np.full(n, i + 1, np.int32) for i, n in enumerate(lengths)] + [np.zeros(4, np.int32)])
    places = np.concatenate([np.arange(n, dtype=np.int32) for n in (*lengths, 4)])[None]
    given = {"positions": places} if positions == "given" else {}
    together = apply(base.variables, packed, segment_ids=segments[None], **given)
    start = 0
    for i, n in enumerate(lengths):
        assert oracle.relative_error(together[0, start : start + n], separate[i, :n]) < 2e-6
        start += n


def test_default_positions_restart_in_every_segment():
    segments = jnp.array([[1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    found = layers.default_positions(segments, segments)
    assert found.tolist() == [[0, 1, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("window", [None, 3])
def test_cache_equals_one_pass(base, window):
    """Two calls and then one token at a time, left-padded rows among them, against the whole text at once."""
    config = dataclasses.replace(base.config, windows=(window,) * 2)
    apply = oracle.quick(base.family.Model(config).apply)
    tokens, _ = oracle.padded_batch(lengths=(9, 9))
    pad = 2
    expected = [apply(base.variables, tokens[:1])[0], apply(base.variables, tokens[1:, pad:])[0]]
    mask = np.ones((2, 9), bool)
    mask[1, :pad] = False
    cache = base.init_cache(2, 16)
    step = oracle.quick(lambda t, m, c: base.family.Model(config).apply(base.variables, t, m, cache=c))
    parts = []
    for a, b in ((0, 4), (4, 7), (7, 8), (8, 9)):
        out, cache = step(tokens[:, a:b], mask[:, a:b], cache)
        parts.append(out)
    whole = np.concatenate(parts, axis=1)
    assert oracle.relative_error(whole[0], expected[0]) < 2e-6
    assert oracle.relative_error(whole[1, pad:], expected[1]) < 2e-6


def test_pool_at_picks_logits_and_classes(base):
    tokens, mask = oracle.padded_batch()
    at = np.array([[11, 3], [6, 0], [8, 8]], np.int32)
    full = oracle.jitted(base)(base.variables, tokens, mask)
    picked = oracle.jitted(base)(base.variables, tokens, mask, pool_at=at)
    assert oracle.relative_error(picked, np.take_along_axis(np.asarray(full), at[:, :, None], 1)) < 2e-6
    headed = from_config(oracle.DECODER, num_labels=3)
    weights = oracle.random_weights(headed)
    by_mask = oracle.jitted(headed)(weights, tokens, mask)
    assert by_mask.shape == (3, 3)
    # The padding id says the same as the mask; without either the last slot is taken.
    assert oracle.relative_error(oracle.jitted(headed)(weights, tokens), by_mask) < 2e-6
    both = oracle.jitted(headed)(weights, tokens, mask, pool_at=at)
    assert both.shape == (3, 2, 3)
    assert oracle.relative_error(both[:, 0], by_mask) < 2e-6


def test_bfloat16_stays_bfloat16():
    low = from_config(oracle.DECODER, dtype="bfloat16")
    weights = oracle.random_weights(low)
    tokens, mask = oracle.padded_batch()
    hidden = oracle.jitted(low)(weights, tokens, mask, output="hidden")
    assert oracle.jitted(low)(weights, tokens, mask).dtype == hidden.dtype == jnp.bfloat16
    high = jax.tree.map(lambda x: x.astype(jnp.float32), weights)
    assert 0 < oracle.relative_error(hidden, oracle.jitted(low)(high, tokens, mask, output="hidden"), mask) < 0.1


def test_dropout_needs_a_key_and_a_rate():
    base = from_config(oracle.DECODER | {"attention_dropout": 0.5})
    weights = oracle.random_weights(base)
    tokens, mask = oracle.padded_batch()
    plain = oracle.jitted(base)(weights, tokens, mask)
    first, again = (oracle.jitted(base)(weights, tokens, mask, dropout_key=jax.random.key(0)) for _ in range(2))
    assert np.array_equal(first, again)
    assert oracle.relative_error(first, plain, mask) > 1e-2
    off = from_config(oracle.DECODER | {"attention_dropout": 0.5}, dropout=0.0)
    assert np.array_equal(oracle.jitted(off)(weights, tokens, mask, dropout_key=jax.random.key(0)), plain)


def test_equal_configs_share_apply():
    assert from_config(oracle.DECODER).apply is from_config(oracle.DECODER, seed=1).apply


def test_fresh_weights_depend_on_seed_and_path_only():
    small, large = from_config(oracle.DECODER), from_config(oracle.DECODER | {"num_hidden_layers": 3})
    other = from_config(oracle.DECODER, seed=1)
    path = "layers_1/mlp/up_proj/kernel"
    one, two, three = (trees.flatten(b.variables)[path] for b in (small, large, other))
    assert np.array_equal(one, two) and not np.array_equal(one, three)
    assert abs(np.std(one) - 0.02) < 0.002


def test_traces_with_weights_as_arguments(base):
    tokens, _ = oracle.padded_batch()
    jaxpr = jax.make_jaxpr(base.apply)(base.variables, tokens)
    assert len(jaxpr.jaxpr.invars) == len(trees.flatten(base.variables)) + 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "lama3"}}, "did you mean 'llama3'"),
        ({"rope_scaling": {"type": "linear"}}, "needs a positive factor, got None"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"hidden_act": "gelu_10"}, "hidden_act 'gelu_10' is not supported; did you mean 'gelu"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads=3"),
        ({"head_dim": 7}, "even head_dim, got 7"),
        ({"hidden_size": "32"}, "hidden_size must be a positive integer, got '32'"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"attention_bias": "yes"}, "attention_bias must be true or false"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types="),
        ({"is_causal": False}, "is_causal=False"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id"),
        ({"model_type": "lama"}, "model_type 'lama' is not supported; did you mean 'llama'"),
    ],
)
def test_unsupported_options_are_errors(change, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        from_config(oracle.DECODER | change)


def test_unknown_key_of_a_new_model_is_an_error():
    with pytest.raises(UserError, match="'num_hiden_layers'.*did you mean 'num_hidden_layers'"):
        from_config(oracle.DECODER | {"num_hiden_layers": 3})


def test_calls_that_make_no_sense(base):
    tokens, mask = oracle.padded_batch()
    with pytest.raises(UserError, match="token_type_ids was asked for, but a 'llama' model"):
        oracle.jitted(base)(base.variables, tokens, token_type_ids=tokens)
    with pytest.raises(UserError, match="output must be None or 'hidden', got 'hiden'"):
        oracle.jitted(base)(base.variables, tokens, output="hiden")
    with pytest.raises(UserError, match="give attention_mask, not segment_ids"):
        oracle.jitted(base)(base.variables, tokens, segment_ids=tokens, cache=base.init_cache(3, 16))
    with pytest.raises(UserError, match="a 'llama' model with a task head"):
        from_config(oracle.DECODER, num_labels=2).init_cache(1, 8)
    with pytest.raises(UserError, match="num_labels must be None or a positive integer, got 0"):
        from_config(oracle.DECODER, num_labels=0)
    with pytest.raises(UserError, match="dtype must be one of float32, bfloat16, float16, got 'fp32'"):
        from_config(oracle.DECODER, dtype="fp32")
    with pytest.raises(UserError, match=r"a rate in \[0, 1\), got 1.5"):
        from_config(oracle.DECODER, dropout=1.5)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_config_round_trip(kind):
    raw = oracle.DECODER | {"model_type": kind, "rope_parameters": oracle.LLAMA3 | {"rope_theta": 500000.0}}
    raw |= {"llama": {"attention_bias": True}, "mistral": {"sliding_window": 5}, "qwen2": {"use_sliding_window": True}}[
        kind
    ]
    config = from_config(raw | {"max_window_layers": 1} if kind == "qwen2" else raw).config
    assert type(config).from_hf(config.to_hf()) == config
    assert from_config(config).config == config


def test_windows_follow_each_family():
    """Mistral slides unless config.json says null, Qwen2 only where it says so, Llama never."""

    def windows(kind, **change):
        return from_config(oracle.DECODER | {"model_type": kind} | change).config.windows

    assert windows("mistral") == (4096, 4096) and windows("mistral", sliding_window=None) == (None, None)
    assert windows("qwen2", sliding_window=8) == windows("qwen2", use_sliding_window=True) == (None, None)
    assert windows("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1) == (None, 8)
    kinds = ["sliding_attention", "full_attention"]
    assert windows("qwen2", use_sliding_window=True, sliding_window=8, layer_types=kinds) == (8, None)
