"""What the families share: norms, activations, attention, pooling, positions.

Norms and softmax are computed in float32, products in the weights' dtype. Attention takes grouped keys as they are:
the queries get a group axis, the keys are never copied.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax.dropout import drop
from lora_jax.errors import UserError, did_you_mean
from lora_jax.models import kernels
from lora_jax.models.linear import weight
from lora_jax.models.masks import Mask
from lora_jax.models.virtual_tokens import Beside

LONG = 512  # queries; beyond, attention goes over them in chunks
CHUNK = 256


def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x) (Hendrycks and Gimpel 2016, arXiv 1606.08415), in float32 by erf, as torch has it; same dtype as x.

    `jax.nn.gelu` takes erfc, which is exact to the last digit far below 0 as well (erf to 1e-7), at two series and an
    exponential in place of one series: 2 % of a step of MiniLM on a CPU.
    """
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_new": lambda x: nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
    "relu": lambda x: jnp.maximum(x, 0),
    "silu": nn.silu,
    "swish": nn.silu,
}


def check_activation(name: str) -> str:
    """Returns the name of a supported activation.

    Raises:
      UserError: it is not one.
    """
    if name not in ACTIVATIONS:
        raise UserError(f"config.json: hidden_act {name!r} is not supported; {did_you_mean(str(name), ACTIVATIONS)}")
    return name


def _row(vector_D: jax.Array, like: jax.Array) -> jax.Array:
    """A vector as a row of `like`'s rank and dtype (a rank is never promoted silently)."""
    return vector_D.reshape((1,) * (like.ndim - 1) + (-1,)).astype(like.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * scale (Zhang and Sennrich 2019, arXiv 1910.07467); rounded to x's dtype before the scale."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale_D = weight(self, "scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return y.astype(x.dtype) * _row(scale_D, x)


class LayerNorm(nn.Module):
    """(x - mean) / std * scale + bias, all in float32; same dtype as x."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale_D = weight(self, "scale", nn.initializers.ones, (x.shape[-1],))
        bias_D = weight(self, "bias", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * _row(scale_D, y) + _row(bias_D, y)).astype(x.dtype)


def attend(
    q_BxTxHxD: jax.Array,
    k_BxKxSxD: jax.Array,
    v_BxKxSxD: jax.Array,
    mask: jax.Array | Mask | None,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
    beside: Beside | None = None,
) -> jax.Array:
    """Scaled dot-product attention; H = K * G query heads share K key heads, G neighbours each.

    Args:
      q_BxTxHxD: queries.
      k_BxKxSxD, v_BxKxSxD: keys and values, heads before time (the layout of the cache).
      mask: as of `masks`, dense (B or 1, T or 1, S) or for a kernel. A query that sees nothing gets a mean of all
        values (from a kernel any finite number), never NaN.
      dropout: applied to the probabilities (B, K, G, T, S), or (B, K, G, T, N + S) with `beside`. None drops nothing.
      beside: keys and values of N virtual tokens; they come first. The result is that of concatenated keys and values,
        but neither these nor a cache are copied.

    Returns:
      (B, T, H * D), q's dtype. Logits and softmax are float32.
    """
    if isinstance(mask, Mask):
        if dropout is None and beside is None and q_BxTxHxD.shape[1] == k_BxKxSxD.shape[2] == mask.length:
            return _one_step(q_BxTxHxD, k_BxKxSxD, v_BxKxSxD, mask)
        mask = mask.dense()
    if q_BxTxHxD.shape[1] > LONG and dropout is None and beside is None:
        out_BxTxHD = _in_chunks(q_BxTxHxD, k_BxKxSxD, v_BxKxSxD, mask)
    else:
        out_BxTxHD = _at_once(q_BxTxHxD, k_BxKxSxD, v_BxKxSxD, mask, dropout, beside)
    return checkpoint_name(out_BxTxHD, kernels.ATTENDED)


def _named(q_BxTxHxD: jax.Array, k_BxKxTxD: jax.Array, v_BxKxTxD: jax.Array, mask: Mask) -> jax.Array:
    """`attend` by the kernel that the mask names, or by none."""
    if mask.kernel == "plain":
        return attend(q_BxTxHxD, k_BxKxTxD, v_BxKxTxD, mask.dense())
    return kernels.attend(q_BxTxHxD, k_BxKxTxD, v_BxKxTxD, mask)


# A function with its own derivative, though it is the usual one: nobody opens it, so whatever the length chooses, a
# trace has the same steps, and who splits a model does it once for all lengths.
_one_step = jax.custom_vjp(_named)
_one_step.defvjp(
    lambda q, k, v, mask: jax.vjp(lambda q, k, v: _named(q, k, v, mask), q, k, v),
    lambda pull, cotangent: (*pull(cotangent), None),
)


def _at_once(q_BxTxHxD, k_BxKxSxD, v_BxKxSxD, mask_BxTxS, dropout=None, beside=None) -> jax.Array:
    b, t, h, d = q_BxTxHxD.shape
    kv = k_BxKxSxD.shape[1]
    q = q_BxTxHxD.reshape(b, t, kv, h // kv, d)
    logits = jnp.einsum("btkgd,bksd->bkgts", q, k_BxKxSxD, preferred_element_type=jnp.float32) * d**-0.5
    logits = _masked(logits, mask_BxTxS)
    if beside is not None:
        keys = beside.keys_KxNxD.astype(q.dtype)
        own = jnp.einsum("btkgd,knd->bkgtn", q, keys, preferred_element_type=jnp.float32) * d**-0.5
        logits = jnp.concatenate([_masked(own, beside.mask_BxTxN), logits], axis=-1)
    probs = jax.nn.softmax(logits, axis=-1).astype(v_BxKxSxD.dtype)
    if dropout is not None:
        probs = dropout(probs)
    if beside is None:
        return jnp.einsum("bkgts,bksd->btkgd", probs, v_BxKxSxD).reshape(b, t, h * d)
    n = beside.values_KxNxD.shape[1]
    out = jnp.einsum("bkgtn,knd->btkgd", probs[..., :n], beside.values_KxNxD.astype(probs.dtype))
    return (out + jnp.einsum("bkgts,bksd->btkgd", probs[..., n:], v_BxKxSxD)).reshape(b, t, h * d)


def _in_chunks(q_BxTxHxD: jax.Array, k: jax.Array, v: jax.Array, mask_BxTxS: jax.Array | None) -> jax.Array:
    """`attend` over chunks of queries. The backward pass computes the scores of a chunk again: none are stored.

    Memory for scores is that of one chunk, where all of them take T * S for every head and layer (Rabe and Staats 2021,
    arXiv 2112.05682, who cut up the keys as well). It costs one product of queries and keys more, a sixth of
    attention's own FLOPs.
    """
    b, t, h, d = q_BxTxHxD.shape
    cut = -(-t // CHUNK)
    fill = ((0, 0), (0, cut * CHUNK - t))
    q = jnp.pad(q_BxTxHxD, (*fill, (0, 0), (0, 0))).reshape(b, cut, CHUNK, h, d).swapaxes(0, 1)
    mask, alike = mask_BxTxS, None
    if mask is not None and mask.shape[1] == 1:  # padding alone: all queries see the same keys
        mask, alike = None, mask
    if mask is not None:
        mask = jnp.pad(mask, (*fill, (0, 0)), constant_values=True)
        mask = mask.reshape(mask.shape[0], cut, CHUNK, -1).swapaxes(0, 1)
    one = lambda q, mask: _at_once(q, k, v, alike if mask is None else mask)  # noqa: E731
    out = jax.lax.map(lambda xs: jax.checkpoint(one)(*xs), (q, mask))
    return out.swapaxes(0, 1).reshape(b, cut * CHUNK, h * d)[:, :t]


class Dropout(nn.Module):
    """Dropout of a model, by the call's `dropout` key; off at rate 0 and where the call is deterministic."""

    rate: float
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return drop(self.make_rng("dropout"), self.rate, x) if active(self) else x


def active(dropout: Dropout) -> Dropout | None:
    """A dropout, or None where it drops nothing, for who can then do better."""
    return None if dropout.deterministic or dropout.rate == 0 else dropout


def _masked(logits_BxKxGxTxS: jax.Array, mask_BxTxS: jax.Array | None) -> jax.Array:
    if mask_BxTxS is None:
        return logits_BxKxGxTxS
    return jnp.where(mask_BxTxS[:, None, None], logits_BxKxGxTxS, jnp.finfo(jnp.float32).min)


def default_positions(tokens_BxT: jax.Array, segments_BxT: jax.Array | None) -> jax.Array:
    """Positions where the caller gives none: 0 to T-1, counted anew in every packed segment. (B or 1, T) int32."""
    slots = jnp.arange(tokens_BxT.shape[1], dtype=jnp.int32)[None]
    if segments_BxT is None:
        return slots
    before = jnp.pad(segments_BxT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return slots - jax.lax.cummax(jnp.where(segments_BxT != before, slots, 0), axis=1)


def last_real(mask_BxT: jax.Array) -> jax.Array:
    """Slot of the last real token of every row, 0 if there is none. (B,) int32."""
    slots = jnp.arange(mask_BxT.shape[1], dtype=jnp.int32)[None]
    return jnp.max(jnp.where(mask_BxT.astype(bool), slots, 0), axis=1)


def take(hidden_BxTxD: jax.Array, at_BxS: jax.Array) -> jax.Array:
    """Hidden states at chosen slots: (B, S, D)."""
    return jnp.take_along_axis(hidden_BxTxD, at_BxS[:, :, None], axis=1)
