"""Formats that are a table of levels: the code of a number is the index of the nearest one."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def nearest(levels: tuple[float, ...]) -> Callable[[np.ndarray], np.ndarray]:
    """The function from numbers to the codes of the nearest of the ascending levels, ties to the lower one.

    Cached, as `read` is: equal formats must be equal objects all the way down, or what was compiled for one would not
    serve the other.
    """
    table = np.asarray(levels, np.float32)
    middles = (table[1:] + table[:-1]) / 2

    def encode(values: np.ndarray) -> np.ndarray:
        return np.searchsorted(middles, values).astype(np.uint8)

    return encode


@functools.cache
def read(levels: tuple[float, ...]) -> Callable[[jax.Array], jax.Array]:
    """The function from codes to levels."""

    def decode(codes: jax.Array) -> jax.Array:
        return jnp.asarray(levels, jnp.float32).at[codes].get(mode="promise_in_bounds")

    return decode
