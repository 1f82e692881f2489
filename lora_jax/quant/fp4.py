"""FP4 (E2M1): a sign, two bits of exponent and one of mantissa, as compared with NF4 by Dettmers et al. (2023),
arXiv:2305.14314, table 2.

The magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4, 6, here divided by 6. Codes count the levels upwards and are not the bits
of the
float: both zeros are one level, and code 15 is never used. (bitsandbytes calls another set of levels fp4.)
"""

from lora_jax.quant.base import Format
from lora_jax.quant.table import nearest, read

_MAGNITUDES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LEVELS = (*(-m / 6 for m in reversed(_MAGNITUDES)), 0.0, *(m / 6 for m in _MAGNITUDES))


def fp4(*, block: int | None = 64, double: bool = True) -> Format:
    """4-bit float E2M1.

    Args:
      block: weights that share one constant; None is the whole fan_in.
      double: whether the constants are quantized too (4.13 bits a weight; without, 4.5).
    """
    return Format("fp4", 4, nearest(LEVELS), read(LEVELS), block, double)
