"""The shared layers by themselves: precision in bfloat16, grouped attention, rows that see nothing."""

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import layers


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


def test_grouped_attention_equals_repeated_keys():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(s).astype(np.float32) for s in ((2, 5, 6, 4), (2, 2, 7, 4), (2, 2, 7, 4)))
    mask = rng.random((2, 5, 7)) < 0.7
    mask[0, 2] = False
    out = layers.attend(*map(jnp.asarray, (q, k, v, mask))).reshape(2, 5, 6, 4)
    for h in range(6):  # heads 0, 1, 2 share the first key head
        logits = np.where(mask, np.einsum("btd,bsd->bts", q[:, :, h], k[:, h // 3]) / 2, -1e30)
        probs = np.exp(logits - logits.max(-1, keepdims=True))
        probs /= probs.sum(-1, keepdims=True)
        np.testing.assert_allclose(out[:, :, h], np.einsum("bts,bsd->btd", probs, v[:, h // 3]), atol=1e-5)
    np.testing.assert_allclose(out[0, 2, 0], v[0, 0].mean(0), atol=1e-5)


def test_attention_probabilities_are_computed_in_float32():
    """1,024 equal keys: in bfloat16 the probabilities would not add up to one."""
    k = jnp.zeros((1, 1, 1023, 4), jnp.bfloat16)
    v = jnp.ones((1, 1, 1023, 4), jnp.bfloat16)
    probs = []
    layers.attend(jnp.zeros((1, 1, 1, 4), jnp.bfloat16), k, v, None, dropout=lambda p: probs.append(p) or p)
    assert probs[0].dtype == jnp.bfloat16
    assert float(probs[0][0, 0, 0, 0, 0]) == float(jnp.bfloat16(1 / 1023))
