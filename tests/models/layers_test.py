"""The shared layers by themselves: precision in bfloat16, grouped attention, rows that see nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

import lora_jax as lj
from lora_jax.models import attention, layers
from lora_jax.step import compiler_options

SMALL = {
    "model_type": "llama", "vocab_size": 12, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8,
}  # fmt: skip


@pytest.mark.parametrize("norm", [layers.RMSNorm(1e-6), layers.LayerNorm(1e-12)], ids=["rms", "layer"])
def test_norms_of_bfloat16_are_computed_in_float32(norm):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 256)) + 3, jnp.bfloat16)
    params = {"params": {"scale": jnp.ones(256, jnp.bfloat16)}}
    if isinstance(norm, layers.LayerNorm):
        params["params"]["bias"] = jnp.zeros(256, jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    if isinstance(norm, layers.LayerNorm):
        exact = exact - exact.mean(-1, keepdims=True)
    exact /= np.sqrt((exact**2).mean(-1, keepdims=True))
    out = norm.apply(params, x)
    assert out.dtype == jnp.bfloat16
    # Half a unit in the last of 8 bits is at most 1/256: one rounding, not one per operation.
    assert (np.abs(np.asarray(out, np.float64) - exact) <= np.abs(exact) / 250).all()


def test_gelu_is_the_exact_one_rounded_once():
    x = np.linspace(-12, 12, 4801)
    exact = lambda x: x * special.ndtr(x)  # noqa: E731
    assert np.abs(np.asarray(layers.gelu(jnp.asarray(x, jnp.float32))) - exact(np.float32(x))).max() < 1e-6
    slope = jax.vmap(jax.grad(layers.gelu))(jnp.asarray(x, jnp.float32))
    assert np.abs(slope - (special.ndtr(x) + x * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi))).max() < 1e-6
    short = jnp.asarray(x, jnp.bfloat16)
    out = layers.gelu(short)
    assert out.dtype == jnp.bfloat16
    expected = exact(np.asarray(short, np.float64))
    assert (np.abs(np.asarray(out, np.float64) - expected) <= np.abs(expected) / 250 + 1e-6).all()


def test_grouped_attention_equals_repeated_keys():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(s).astype(np.float32) for s in ((2, 5, 6, 4), (2, 2, 7, 4), (2, 2, 7, 4)))
    mask = rng.random((2, 5, 7)) < 0.7
    mask[0, 2] = False
    out = attention.attend(*map(jnp.asarray, (q, k, v, mask))).reshape(2, 5, 6, 4)
    for h in range(6):  # heads 0, 1, 2 share the first key head
        logits = np.where(mask, np.einsum("btd,bsd->bts", q[:, :, h], k[:, h // 3]) / 2, -1e30)
        probs = np.exp(logits - logits.max(-1, keepdims=True))
        probs /= probs.sum(-1, keepdims=True)
        np.testing.assert_allclose(out[:, :, h], np.einsum("bts,bsd->btd", probs, v[:, h // 3]), atol=1e-5)
    np.testing.assert_allclose(out[0, 2, 0], v[0, 0].mean(0), atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_remat_gives_the_same_gradients_in_less_memory(kind):
    raw = {**SMALL, "model_type": kind, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 96,
           "num_hidden_layers": 6, "max_position_embeddings": 32}  # fmt: skip
    if kind == "bert":
        raw = {k: v for k, v in raw.items() if k != "num_key_value_heads"} | {"type_vocab_size": 2}
    tokens, found, memory = jnp.arange(256).reshape(8, 32) % 64, {}, {}
    for remat in (False, True):
        base = lj.from_config(raw, num_labels=3, dropout=0.1, remat=remat)
        adapter = lj.lora(rank=2)
        delta = jax.tree.map(lambda x: x + 0.1, adapter.init(jax.random.key(0), base.variables, base.sites))

        def loss(delta, variables, base=base, adapter=adapter):
            key = jax.random.key(1)
            return jnp.sum(jnp.sin(lj.lift(base.apply)(adapter.bind(variables, delta), tokens, dropout_key=key)))

        step = jax.jit(jax.value_and_grad(loss), compiler_options=compiler_options())
        program = step.lower(delta, base.variables).compile()
        found[remat] = program(delta, base.variables)
        memory[remat] = program.memory_analysis().temp_size_in_bytes
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found[True], found[False])
    assert memory[True] < 0.55 * memory[False]
