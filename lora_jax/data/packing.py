"""The packing plan: which examples share a row. A pure function of the lengths, so that a batch is one of its index.

Best-fit decreasing: examples go from the longest to the shortest, each into the fullest row that still holds it
(never worse than first-fit decreasing on average, and one step per example: the open rows are kept by free space, and
the set of free spaces that occur is one big integer whose lowest set bit above a length is found by arithmetic).
Examples of equal length are taken in a seeded order.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from lora_jax.errors import UserError

Plan = tuple[tuple[int, ...], ...]


def permutation(count: int, seed: int, stream: int = 0) -> np.ndarray:
    """A permutation of `count` things, the same on every machine and version of numpy.

    numpy promises stable streams for bit generators only, so their raw bits are sorted here and `permutation` is not
    used.
    """
    bits = np.random.PCG64(np.random.SeedSequence((seed % 2**64, stream))).random_raw(count)
    return np.argsort(np.asarray(bits), kind="stable")


def plan(lengths: Sequence[int], capacity: int, seed: int = 0, max_segments: int | None = None) -> Plan:
    """Packs examples into rows.

    Args:
      lengths: tokens of each example, each from 1 to `capacity`.
      capacity: tokens a row holds.
      seed: order among examples of equal length.
      max_segments: examples a row holds at most; None = no bound.

    Returns:
      The rows, each a tuple of example numbers; every example is in exactly one.

    Raises:
      UserError: an example that fits no row, or a bound below 1.
    """
    sizes = np.asarray(lengths, np.int64)
    if max_segments is not None and max_segments < 1:
        raise UserError(f"a packed row must hold at least 1 example, got max_segments={max_segments}")
    wrong = np.flatnonzero((sizes < 1) | (sizes > capacity))
    if wrong.size:
        raise UserError(f"example {wrong[0]} has {sizes[wrong[0]]} tokens; a packed row holds 1 to {capacity}")
    shuffled = permutation(len(sizes), seed)
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    return _best_fit(order.tolist(), sizes.tolist(), capacity, max_segments or len(sizes))


def _best_fit(order: list[int], sizes: list[int], capacity: int, bound: int) -> Plan:
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by free space
    spaces = 0  # bit s is set while a row with s free tokens is open
    for example in order:
        size = sizes[example]
        fitting = spaces >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            row = open_rows[space].pop()
            if not open_rows[space]:
                spaces &= ~(1 << space)
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(example)
        if (left := space - size) and len(rows[row]) < bound:
            open_rows[left].append(row)
            spaces |= 1 << left
    return tuple(tuple(row) for row in rows)


def fill(lengths: Sequence[int], rows: Plan, capacity: int) -> float:
    """The share of the rows' tokens that are real."""
    return sum(lengths) / (len(rows) * capacity)


def fingerprint(rows: Plan) -> str:
    """sha256 of a plan; two runs with the same one put the same examples together."""
    return hashlib.sha256(repr(rows).encode()).hexdigest()
