"""Int8: 255 evenly spaced levels from -1 to 1, one float32 constant for every output (the whole fan_in is one block).

Per output, as the weights in LLM.int8() (Dettmers, Lewis, Belkada, Zettlemoyer 2022, arXiv:2208.07339, section 2.1):
8.03 bits a weight at a fan_in of 1024. The activations stay as they are, so there is no decomposition for outliers.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.quant.base import Format

STEPS, ZERO = 127, 128


def encode(values: np.ndarray) -> np.ndarray:
    """Numbers in [-1, 1] to codes 1 to 255."""
    return (np.rint(values * np.float32(STEPS)) + ZERO).astype(np.uint8)


def decode(codes: jax.Array) -> jax.Array:
    """What the codes stand for."""
    return (codes.astype(jnp.float32) - ZERO) / STEPS


def int8(*, block: int | None = None, double: bool = False) -> Format:
    """8-bit integers.

    Args:
      block: weights that share one constant; None is the whole fan_in.
      double: whether the constants are quantized too.
    """
    return Format("int8", 8, encode, decode, block, double)
