"""Numbers in blocks: a weight is cut along its fan_in, each block is divided by its largest magnitude, packed in bytes.

The largest magnitudes, one constant a block, are numbers in blocks again (double quantization: Dettmers, Pagnoni,
Holtzman, Zettlemoyer 2023, arXiv:2305.14314, section 3): 8 bits each in groups of 256, after subtracting their mean.
The paper's second format is FP8; ours is an 8-bit integer, since constants around their mean spread evenly. A
constant of 32 bits for 64 weights costs 0.5 bit a weight, so stored 8/64 + 32/(64 * 256) = 0.127.

Writing (`cut`, `pack`, `squeeze`) is NumPy on the host and the same everywhere bit for bit; reading (`unpack`,
`widen`) is JAX.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

GROUP = 256  # constants that share one second-level scale
MIDDLE = 128  # the byte that stands for zero


def cut(weight: np.ndarray, lead: int, limit: int | None) -> np.ndarray:
    """Cuts the axis after the leading ones into blocks of equal size, filled up with zeros.

    Args:
      weight: (*lead, K, *kept) float32.
      lead: number of leading axes; no block reaches over two of their indices.
      limit: the largest size of a block; None is one block. Blocks are evened out, so 80 rows at a limit of 64 are two
        blocks of 40 and not one of 64 and one of 16.

    Returns:
      (*lead, blocks, size, *kept), size even.
    """
    rows = weight.shape[lead]
    blocks = 1 if limit is None else max(1, -(-rows // limit))
    size = -(-rows // blocks)
    size += size % 2
    padding = [(0, 0)] * weight.ndim
    padding[lead] = (0, blocks * size - rows)
    return np.pad(weight, padding).reshape(*weight.shape[:lead], blocks, size, *weight.shape[lead + 1 :])


def pack(codes: np.ndarray, axis: int) -> np.ndarray:
    """Two 4-bit codes a byte: the first half of a block in the low bits, the second in the high ones."""
    low, high = np.split(codes, 2, axis)
    return low | (high << 4)


def unpack(packed: jax.Array, axis: int) -> jax.Array:
    """The codes that `pack` was given."""
    return jnp.concatenate([packed & 15, packed >> 4], axis)


def squeeze(constants: np.ndarray, lead: int) -> tuple[np.ndarray, np.ndarray]:
    """Stores constants in 8 bits.

    Args:
      constants: (*lead, ...) float32.
      lead: number of leading axes, each index of which is quantized by itself.

    Returns:
      (bytes of the same shape, (*lead, groups + 1) float32: a scale for every `GROUP` constants in order, and the
      mean).
    """
    own = constants.shape[:lead]
    flat = constants.reshape(*own, math.prod(constants.shape[lead:]))
    mean = flat.mean(-1, keepdims=True, dtype=np.float64).astype(np.float32)
    count = flat.shape[-1]
    groups = -(-count // GROUP)
    centered = np.zeros((*own, groups * GROUP), np.float32)
    centered[..., :count] = flat - mean
    centered = centered.reshape(*own, groups, GROUP)
    scales = np.abs(centered).max(-1) / np.float32(MIDDLE - 1)
    steps = np.rint(centered / np.where(scales == 0, 1, scales)[..., None]) + MIDDLE
    codes = steps.astype(np.uint8).reshape(*own, groups * GROUP)[..., :count].reshape(constants.shape)
    return codes, np.concatenate([scales, mean], -1)


def widen(codes: jax.Array, levels: jax.Array) -> jax.Array:
    """The constants that `squeeze` was given, to 8 bits: float32 of the shape of `codes`.

    The scales are spread over the shape, not the codes flattened, so codes that are divided over devices stay there.
    """
    lead = levels.ndim - 1
    rest = codes.shape[lead:]
    spread = jnp.repeat(levels[..., :-1], GROUP, axis=-1)[..., : math.prod(rest)].reshape(codes.shape)
    mean = levels[..., -1].reshape(*levels.shape[:-1], *(1,) * len(rest))
    return (codes.astype(jnp.float32) - MIDDLE) * spread + mean
