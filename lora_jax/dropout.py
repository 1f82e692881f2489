"""Which entries dropout leaves: one draw for the adapters' dropout and the models' own.

`jax.random` on a CPU is a loop over arrays in memory, compiled anew for every use. Here an entry's bits come from its
place in the array by plain arithmetic, which a compiler puts into the pass that needs them. They are the same on every
platform, jitted or not, under `vmap` and however the array is split over devices; a backward pass computes them again
and keeps no mask. Keys are split and folded by JAX's own generator. What is left to an entry is a hash of a dozen
operations: Threefry with its 20 rounds took a tenth of a step of a small encoder (2 CPU cores).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Dropped(NamedTuple):
    """One use of dropout, for who draws it elsewhere or more than once: a call is `drop`."""

    key: jax.Array
    rate: float

    def __call__(self, x: jax.Array) -> jax.Array:
        return drop(self.key, self.rate, x)


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
    """32 random bits for every entry of an array: its place in its row, hashed with two words of the row.

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
    # With one word a row could hold another one's numbers in another order; the second enters where no order undoes it.
    first, second = hashed(row ^ words_2[0], words_2[1]), hashed(row + words_2[1], words_2[0])
    return hashed(place ^ first, second)


def hashed(x: jax.Array, key: jax.Array) -> jax.Array:
    """A number of 32 bits scrambled with a key: triple32 (Wellons, Prospecting for hash functions, 2018).

    Of three multiplications and four shifts, chosen by search so that flipping a bit of x flips each bit of the result
    in half of all cases. The key enters between the first two multiplications, which the original has not.

    Args:
      x, key: uint32.

    Returns:
      uint32; one-to-one in x.
    """
    x = (x ^ (x >> 17)) * jnp.uint32(0xED5AD4BB)
    x = (x ^ (x >> 11) ^ key) * jnp.uint32(0xAC4C1B51)
    x = (x ^ (x >> 15)) * jnp.uint32(0x31848BAB)
    return x ^ (x >> 14)
