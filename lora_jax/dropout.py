"""Which entries dropout leaves: one draw for the adapters' dropout and the models' own.

Drawing is what dropout costs, on a CPU a seventh of a step of a small encoder. Each entry takes 16 random bits: half of
what a number in [0, 1) takes, so that one word of JAX's generator decides on two entries.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

_WAYS = 1 << 16


def drop(key: jax.Array, rate: float, x: jax.Array) -> jax.Array:
    """Inverted dropout (Srivastava et al., Dropout, JMLR 2014): zero with probability `rate`, else x / (1 - rate).

    The probability is a multiple of 2**-16, the nearest to `rate` that leaves some entries and not all; what stays is
    divided by that probability, so that the expectation is x exactly.

    Args:
      key: of this use.
      rate: in (0, 1].
      x: any shape and float dtype; at rate 1 all of it becomes zero.

    Returns:
      x's shape and dtype.
    """
    if rate >= 1.0:
        return jnp.zeros_like(x)
    ways = kept_ways(rate)
    return jnp.where(_below(key, ways, x.shape), x / (ways / _WAYS), 0).astype(x.dtype)


def kept_ways(rate: float) -> int:
    """How many of the 65,536 values of 16 bits leave an entry."""
    return min(max(round((1.0 - rate) * _WAYS), 1), _WAYS - 1)


def _below(key: jax.Array, ways: int, shape: Sequence[int]) -> jax.Array:
    """True with probability ways / 65,536, by shape. One word serves an entry of each half of the last axis."""
    *outer, last = shape or (1,)
    words = jax.random.bits(key, (*outer, -(-last // 2)), jnp.uint32)
    halves = jnp.concatenate([words & (_WAYS - 1) < ways, words >> 16 < ways], axis=-1)
    return halves[..., :last].reshape(shape)
