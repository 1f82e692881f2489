"""Which entries dropout leaves: one draw for the adapters' dropout and the models' own.

`jax.random` on a CPU is a loop over arrays in memory, compiled anew for every use: of a step of a small encoder that
was 15 % of the time and 40 % of the compilation. Here an entry's bits come from its place in the array by plain
arithmetic, which a compiler puts into the pass that needs them. They are the same on every platform, jitted or not,
under `vmap` and however the array is split over devices; a backward pass computes them again and keeps no mask.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def drop(key: jax.Array, rate: float, x: jax.Array) -> jax.Array:
    """Inverted dropout (Srivastava et al., Dropout, JMLR 2014): zero with probability `rate`, else x / (1 - rate).

    Args:
      key: of this use.
      rate: above 0; at 1 and above all of x becomes zero. Its precision is 2**-32.
      x: any shape and float dtype.

    Returns:
      x's shape and dtype.
    """
    if rate >= 1.0:
        return jnp.zeros_like(x)
    below = min(round((1.0 - rate) * 2**32), 2**32 - 1)
    return jnp.where(bits(key, x.shape) < jnp.uint32(below), x / (1.0 - rate), 0).astype(x.dtype)


def bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """32 random bits for every entry of an array: Threefry of its row and of its place in the row.

    Args:
      key: typed, of JAX's usual kind; another kind draws by `jax.random`.
      shape: of the array; a row (all but the first axis) has at most 2**32 entries.

    Returns:
      uint32, of the shape.
    """
    words = jax.random.key_data(key)
    if words.shape != (2,):
        return jax.random.bits(key, shape, jnp.uint32)
    return _of_places(words, shape)


@functools.partial(jax.jit, static_argnums=1)
def _of_places(words_2: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`bits` for the words of a key; jitted, so that a model's many masks of one shape are traced once."""
    place, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in range(len(shape) - 1, 0, -1):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    row = jax.lax.broadcasted_iota(jnp.uint32, shape, 0) if shape else place
    return threefry(words_2, place, row)[0]


def threefry(key_2: jax.Array, x0: jax.Array, x1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011).

    Args:
      key_2: uint32.
      x0, x1: uint32 of one shape: the two words of each counter.

    Returns:
      The two words that belong to each counter, as JAX's own generator of this name has them.
    """
    keys: list[Any] = [key_2[0], key_2[1], key_2[0] ^ key_2[1] ^ jnp.uint32(_PARITY)]
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for i in range(5):
        for turn in _ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = x0 ^ (x1 << turn | x1 >> (32 - turn))
        x0, x1 = x0 + keys[(i + 1) % 3], x1 + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return x0, x1
