"""Bucket lengths: the few row lengths that batches are padded to, so that a step compiles a few times and never again.

A batch is as long as its longest row. With row lengths drawn from the data, that of a batch of B rows is at most L with
probability F(L)^B, so the expected cost of a set of buckets is known before the first batch, and the best set is
found exactly.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_jax.errors import UserError

MULTIPLE = 8  # the lane of the matrix units, and a bound on the number of candidates
MOST = 4  # each bucket is one more compilation
GAIN = 0.03  # a bucket must save this share of the tokens to be worth its compilation


def round_up(length: int, max_length: int | None = None) -> int:
    """The next multiple of 8, but never above `max_length`: a position table may end there."""
    rounded = -(-length // MULTIPLE) * MULTIPLE
    return rounded if max_length is None else max(length, min(rounded, max_length))


def choose(
    lengths: Sequence[int], batch_size: int, max_length: int | None = None, buckets: Any = None
) -> tuple[int, ...]:
    """Chooses the bucket lengths.

    Args:
      lengths: tokens of each row, at least one row.
      batch_size: rows of a batch.
      max_length: no bucket is longer.
      buckets: None chooses at most 4; a number chooses at most so many; a sequence (or a comma-separated string) is
        taken as given and must hold the longest row.

    Returns:
      Ascending lengths, the last one at least the longest row.

    Raises:
      UserError: buckets that are no positive numbers, or too short for the longest row.
    """
    longest = max(lengths)
    given = _parse(buckets)
    if isinstance(given, tuple):
        if given[-1] < longest:
            raise UserError(
                f"buckets={buckets!r}: the longest row has {longest} tokens; add a bucket of at least {longest}"
            )
        return given
    candidates = sorted({round_up(int(n), max_length) for n in lengths})
    # A thousand lengths would make the search slow; every k-th keeps the longest and loses a fraction of a bucket.
    candidates = candidates[:: -max(1, -(-len(candidates) // 64))][::-1]
    mass = _batch_mass(np.asarray(lengths), np.asarray(candidates), batch_size)
    best, best_cost = _search(candidates, mass, 1)
    for count in range(2, min(given, len(candidates)) + 1):
        found, cost = _search(candidates, mass, count)
        if cost < best_cost * (1 - GAIN * (count - len(best))):
            best, best_cost = found, cost
    return best


def _parse(buckets: Any) -> tuple[int, ...] | int:
    if buckets is None:
        return MOST
    if isinstance(buckets, str):
        try:
            buckets = [int(part) for part in buckets.split(",")]
        except ValueError:
            raise UserError(f"buckets must be a number or lengths like '64,128', got {buckets!r}") from None
        buckets = buckets[0] if len(buckets) == 1 else buckets
    values = [buckets] if isinstance(buckets, int) else list(buckets)
    if not values or not all(type(b) is int and b >= 1 for b in values):
        raise UserError(f"buckets must be a number of buckets or a list of lengths, all at least 1; got {buckets!r}")
    return buckets if isinstance(buckets, int) else tuple(sorted(set(values)))


def _batch_mass(lengths: np.ndarray, candidates: np.ndarray, batch_size: int) -> np.ndarray:
    """Probability that each candidate is the shortest that holds a whole batch."""
    below = (lengths[None, :] <= candidates[:, None]).mean(axis=1) ** batch_size
    return np.diff(below, prepend=0.0)


def _search(candidates: list[int], mass: np.ndarray, count: int) -> tuple[tuple[int, ...], float]:
    """The `count` buckets of least expected length; the longest candidate is always one."""
    total = np.concatenate([[0.0], np.cumsum(mass)])
    size = len(candidates)
    # cost[j]: the least cost of all batches up to candidate j, with j a bucket, using k buckets.
    cost = [candidates[j] * total[j + 1] for j in range(size)]
    chosen: list[tuple[int, ...]] = [(candidates[j],) for j in range(size)]
    for _ in range(count - 1):
        step = [
            min(((cost[i] + candidates[j] * (total[j + 1] - total[i + 1]), i) for i in range(j)), default=(cost[j], j))
            for j in range(size)
        ]
        chosen = [chosen[i] + (candidates[j],) if i != j else chosen[j] for j, (_, i) in enumerate(step)]
        cost = [c for c, _ in step]
    return chosen[-1], float(cost[-1])
