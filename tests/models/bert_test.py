"""The BERT family: masks, packing, heads, dropout, options. No torch here."""

import dataclasses

import jax
import numpy as np
import pytest

from lora_jax import trees
from lora_jax.errors import UserError
from lora_jax.models import from_config
from tests.models import oracle


@pytest.fixture(scope="module")
def base():
    made = from_config(oracle.ENCODER, num_labels=3)
    return dataclasses.replace(made, variables=oracle.random_weights(made))


def test_names_of_weights():
    found = set(trees.flatten(from_config(oracle.ENCODER).variables))
    assert {"embeddings/word_embeddings/embedding", "encoder/layer_0/attention/query/kernel"} <= found
    assert {"encoder/layer_0/attention/output/kernel", "encoder/layer_1/intermediate/kernel"} <= found
    assert not any(p.startswith(("pooler", "classifier")) for p in found)
    assert {"pooler/kernel", "classifier/bias"} <= set(
        trees.flatten(from_config(oracle.ENCODER, num_labels=2).variables)
    )


def test_packed_equals_separate_rows(base):
    tokens, mask = oracle.padded_batch()
    apply = oracle.jitted(base)
    separate = apply(base.variables, tokens, mask)
    lengths = oracle.LENGTHS
    packed = np.concatenate([tokens[i, :n] for i, n in enumerate(lengths)] + [np.zeros(4, np.int32)])[None]
    segments = np.concatenate([np.full(n, i + 1, np.int32) for i, n in enumerate(lengths)] + [np.zeros(4, np.int32)])
    first = np.cumsum([0, *lengths[:-1]])[None].astype(np.int32)
    together = apply(base.variables, packed, segment_ids=segments[None], pool_at=first)
    assert together.shape == (1, 3, 3)
    assert oracle.relative_error(together[0], separate) < 2e-6


def test_padding_and_token_types(base):
    tokens, mask = oracle.padded_batch()
    plain = oracle.jitted(base)(base.variables, tokens, mask)
    other = np.where(mask, tokens, 7)
    assert np.array_equal(oracle.jitted(base)(base.variables, other, mask), plain)
    assert oracle.relative_error(oracle.jitted(base)(base.variables, other), plain) > 1e-2
    types = np.ones_like(tokens)
    assert oracle.relative_error(oracle.jitted(base)(base.variables, tokens, mask, token_type_ids=types), plain) > 1e-2
    shifted = np.broadcast_to(np.arange(12, dtype=np.int32) + 1, tokens.shape)
    assert oracle.relative_error(oracle.jitted(base)(base.variables, tokens, mask, positions=shifted), plain) > 1e-2


RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")


@pytest.mark.parametrize("rate", RATES)
def test_each_dropout_rate_acts_alone(base, rate):
    off = dict.fromkeys(RATES, 0.0)
    tokens, mask = oracle.padded_batch()
    plain = oracle.jitted(base)(base.variables, tokens, mask)
    noisy = from_config(oracle.ENCODER | off | {rate: 0.5}, num_labels=3)
    key = jax.random.key(0)
    assert oracle.relative_error(oracle.jitted(noisy)(base.variables, tokens, mask, dropout_key=key), plain) > 1e-2
    assert np.array_equal(oracle.jitted(noisy)(base.variables, tokens, mask), plain)
    hidden = oracle.jitted(noisy)(base.variables, tokens, mask, dropout_key=key, output="hidden")
    same = np.array_equal(hidden, oracle.jitted(base)(base.variables, tokens, mask, output="hidden"))
    assert same == (rate == "classifier_dropout")


def test_dropout_override_replaces_all_rates(base):
    tokens, mask = oracle.padded_batch()
    off = from_config(oracle.ENCODER | dict.fromkeys(RATES, 0.5), num_labels=3, dropout=0.0)
    plain = oracle.jitted(base)(base.variables, tokens, mask)
    assert np.array_equal(oracle.jitted(off)(base.variables, tokens, mask, dropout_key=jax.random.key(0)), plain)


def test_classifier_dropout_falls_back_to_hidden_dropout(base):
    """A pooler that says 0.5 whatever it reads leaves the head's own dropout as the only one that can show."""
    tokens, mask = oracle.padded_batch(lengths=(6,))

    def pooler(path, x):
        return x * 0 + (np.arctanh(0.5) if path == "pooler/bias" else 0) if path.startswith("pooler") else x

    variables = trees.map_with_path(pooler, base.variables)
    rates = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.0}
    key = jax.random.key(1)
    plain = oracle.jitted(base)(variables, tokens, mask)
    for own, drops in ((None, True), (0.0, False)):
        model = from_config(oracle.ENCODER | rates | {"classifier_dropout": own}, num_labels=3)
        error = oracle.relative_error(oracle.jitted(model)(variables, tokens, mask, dropout_key=key), plain)
        assert error > 0.05 if drops else error < 1e-5


@pytest.mark.parametrize(
    "change, message",
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' is not supported"),
        ({"is_decoder": True}, "is_decoder=True is not supported"),
        ({"hidden_act": "geluu"}, "did you mean 'gelu'"),
        ({"num_attention_heads": 5}, "not a multiple of num_attention_heads=5"),
        ({"hidden_dropout_prob": "0.1"}, "hidden_dropout_prob must be a number"),
        ({"layer_norm_epsilon": 1e-5}, "unknown key 'layer_norm_epsilon' in the config; did you mean 'layer_norm_eps'"),
    ],
)
def test_unsupported_options_are_errors(change, message):
    with pytest.raises(UserError, match=message):
        from_config(oracle.ENCODER | change)


def test_calls_that_make_no_sense(base):
    with pytest.raises(UserError, match="41 tokens, but the model has 40 positions"):
        oracle.jitted(base)(base.variables, np.ones((1, 41), np.int32))
    with pytest.raises(UserError, match="a cache was asked for, but a 'bert' model"):
        base.init_cache(1, 8)


def test_config_round_trip(base):
    assert type(base.config).from_hf(base.config.to_hf()) == dataclasses.replace(base.config, num_labels=None)


def test_a_classifier_computes_its_last_layer_at_the_pooled_slots_alone(base):
    """Queries, output and the feed-forward part are left out at every other slot; keys and values are not."""
    tokens = np.arange(24).reshape(2, 12) % 10

    def cost(**options):
        compiled = jax.jit(lambda v: base.apply(v, tokens, **options)).lower(base.variables).compile()
        return compiled.cost_analysis()["flops"]

    depth = base.config.num_hidden_layers
    assert cost() < (1 - 0.5 / depth) * cost(output="hidden")
