"""The examples of one step share rows, so that a step hardly computes padding and is still a step of the same examples.

Which examples a step draws is not changed (packing by a plan fixes who shares a row for the whole run); they are only
put into fewer rows of full length. How many rows that makes differs from step to step, and every number of rows is one
more compilation, so few are chosen ahead from the counts of the first steps.
"""

from collections.abc import Sequence

import numpy as np

from lora_jax.data import packing

LOOKED_AT = 256  # steps whose numbers of rows stand for those of the run; a larger number later is a compilation
EVEN = 8  # a batch of an evaluation has a multiple of so many rows: dev and test mostly need one program then
GAIN = 0.05  # a second number of rows must save this share of the rows to be worth its compilation


def rows_of(examples: Sequence[int], sizes: Sequence[int], capacity: int, bound: int) -> list[tuple[int, ...]]:
    """Puts the examples of a step into rows.

    Args:
      examples: their numbers, one may come twice.
      sizes: tokens of every example of the split.
      capacity: tokens of a row.
      bound: examples of a row at most.

    Returns:
      Rows of example numbers, the step's own in some order.
    """
    plan = packing.plan([sizes[i] for i in examples], capacity, max_segments=bound)
    return [tuple(examples[place] for place in row) for row in plan]


def choose_counts(counts: Sequence[int], multiple: int = 1) -> tuple[int, ...]:
    """The numbers of rows that steps are filled up to: one or two, the last holding every count that was seen.

    Args:
      counts: rows of some steps, at least one.
      multiple: of which the number of rows must be one (devices, micro-batches).
    """
    rounded = np.asarray([round_up(n, multiple) for n in counts])
    most = int(rounded.max())
    costs = {low: float(np.where(rounded <= low, low, most).mean()) for low in sorted(set(rounded.tolist()))}
    best = min(costs, key=lambda low: costs[low])
    return (best, most) if costs[best] < most * (1 - GAIN) else (most,)


def filled_up(count: int, chosen: Sequence[int], multiple: int = 1) -> int:
    """The number of rows of a step that needs `count`; above all that were chosen, the next multiple of an eighth."""
    fitting = [n for n in chosen if n >= count]
    step = round_up(max(1, chosen[-1] // 8), multiple)
    return fitting[0] if fitting else chosen[-1] + round_up(count - chosen[-1], step)


def round_up(count: int, multiple: int) -> int:
    """The next multiple."""
    return -(-int(count) // multiple) * multiple
