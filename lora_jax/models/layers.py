"""What the families share: norms, activations, dropout, pooling, positions. Norms are computed in float32."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_jax.dropout import Dropped
from lora_jax.errors import UserError, did_you_mean
from lora_jax.models.linear import weight


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


class Dropout(nn.Module):
    """Dropout of a model, by the call's `dropout` key; off at rate 0 and where the call is deterministic."""

    rate: float
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dropped = self.drawn()
        return x if dropped is None else dropped(x)

    def drawn(self) -> Dropped | None:
        """What this dropout does, for who does it elsewhere; None where it drops nothing."""
        off = self.deterministic or self.rate == 0
        return None if off else Dropped(self.make_rng("dropout"), self.rate)


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
