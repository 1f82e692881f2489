"""Int4: 15 evenly spaced levels from -1 to 1, as compared with NF4 by Dettmers et al. (2023), arXiv:2305.14314, table
2.

Symmetric: codes stand for -7 to 7, so zero and both ends are levels.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.quant.base import Format

STEPS, ZERO = 7, 8


def encode(values: np.ndarray) -> np.ndarray:
    """Numbers in [-1, 1] to codes 1 to 15."""
    return (np.rint(values * np.float32(STEPS)) + ZERO).astype(np.uint8)


def decode(codes: jax.Array) -> jax.Array:
    """What the codes stand for."""
    return (codes.astype(jnp.float32) - ZERO) / STEPS


def int4(*, block: int | None = 64, double: bool = True) -> Format:
    """4-bit integers.

    Args:
      block: weights that share one constant; None is the whole fan_in.
      double: whether the constants are quantized too (4.13 bits a weight; without, 4.5).
    """
    return Format("int4", 4, encode, decode, block, double)
