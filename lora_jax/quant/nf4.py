"""NF4, the 4-bit NormalFloat: levels at quantiles of a standard normal, so a Gaussian weight meets every code about
as often.

Dettmers, Pagnoni, Holtzman, Zettlemoyer (2023), "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314,
section 3 and appendix E (the levels). Blocks run along fan_in and never over two layers of a stack; the authors' code
flattens a weight and cuts that. The double quantization is in `blocks.py`.
"""

from lora_jax.quant.base import Format
from lora_jax.quant.table import nearest, read

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def nf4(*, block: int | None = 64, double: bool = True) -> Format:
    """4-bit NormalFloat.

    Args:
      block: weights that share one constant; None is the whole fan_in.
      double: whether the constants are quantized too (4.13 bits a weight; without, 4.5).
    """
    return Format("nf4", 4, nearest(LEVELS), read(LEVELS), block, double)
