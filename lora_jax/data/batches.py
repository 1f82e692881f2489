"""Batches: batch i is a pure function of (examples, seed, i), so the only state that a resume needs is the step.

The rows (an example each, or with packing the rows of a plan) are taken in the order of a seeded permutation per
epoch, and the permutations follow each other without a gap: batch i holds the places i*B to i*B + B - 1 of that
endless sequence. So every batch is full, every row comes exactly once per epoch, none is dropped, and an epoch
smaller than a batch just repeats itself within the batch.

With packing `batch_size` counts rows, and the plan (made once from the seed) fixes which examples share a row; the
epochs shuffle the rows. With `share_rows` it counts examples: each batch holds the examples that it would hold without,
in fewer rows.

An example is a dict of numpy arrays: 1-D arrays of one length hold one value per token (`tokens`, `targets`, `weights`,
`token_type_ids`), 0-D arrays one value per example (`labels`, `pool_at`). `pool_at` points into the example and is
moved with it.
"""

import copy
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.data import buckets as bucket_lengths
from lora_jax.data import packing as packing_plan
from lora_jax.data import sharing
from lora_jax.errors import UserError

Example = Mapping[str, np.ndarray]
Batch = dict[str, np.ndarray]
POINTERS = ("pool_at",)  # fields that hold a position and so move with their example
MAX_SEGMENTS = 32  # of a packed row, unless told; a bound keeps (B, S) arrays small when texts are very short
RESERVED = ("segment_ids", "positions", "ids")


class Batches:
    """The batches of one split.

    Attributes:
      batch_size: rows of a batch; examples, where they share rows.
      rows: the example numbers of each row, before the examples of a step share rows.
      row_sizes: the tokens of each row.
      segments: S, the examples that a row has place for; 1 where each has its own.
      lengths: the bucket lengths, ascending; every batch has one of them.
      steps_per_epoch: batches that hold every row at least once.
      examples: how many there are.
      full: how many of them are as long as `max_length`.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        seed: int = 0,
        max_length: int | None = None,
        packing: bool = False,
        buckets: Any = None,
        max_segments: int | None = None,
        names: Sequence[str] | None = None,
        share_rows: bool = False,
        multiple: int = 1,
    ):
        """Makes the plan; nothing random is left after this.

        Args:
          examples: what `task.encode` returns, at least one.
          batch_size: rows of a batch, at least 1.
          seed: of the plan and of the epochs' orders.
          max_length: no row is longer; None = the longest example. With packing, the length of a packed row.
          packing: put several examples into a row.
          buckets: see `buckets.choose`; with packing there is one.
          max_segments: examples of a packed or shared row at most; None = 32.
          names: where each example came from, for messages.
          share_rows: put the examples of a step into fewer rows; they stay the same examples.
          multiple: what the number of shared rows must be a multiple of (devices times micro-batches).

        Raises:
          UserError: no example, a batch size below 1, an example that is too long or has no token or no target token,
            packing together with shared rows.
        """
        if type(batch_size) is not int or batch_size < 1:
            raise UserError(f"batch_size must be a whole number, at least 1; got {batch_size!r}")
        self._examples, self.batch_size, self._seed = list(examples), batch_size, int(seed)
        sizes = _check(self._examples, max_length, names)
        capacity = max_length or max(sizes)
        self.examples, self.full = len(sizes), sum(size == max_length for size in sizes)
        self.packing, self.share_rows = bool(packing), bool(share_rows)
        if self.packing and self.share_rows:
            raise UserError("packing and share_rows exclude each other: set one of them to false")
        self.rows: packing_plan.Plan = (
            packing_plan.plan(sizes, capacity, self._seed, max_segments or MAX_SEGMENTS)
            if packing
            else tuple((i,) for i in range(len(sizes)))
        )
        self.segments = max(len(row) for row in self.rows)
        self.row_sizes = tuple(sum(sizes[i] for i in row) for row in self.rows)
        if packing and buckets is None:
            self.lengths: tuple[int, ...] = (bucket_lengths.round_up(max(self.row_sizes), capacity),)
        else:
            self.lengths = bucket_lengths.choose(self.row_sizes, batch_size, max_length, buckets)
        self.steps_per_epoch = -(-len(self.rows) // batch_size)
        self._order = functools.lru_cache(maxsize=4)(self._permutation)
        self.row_counts: tuple[int, ...] = (batch_size,)
        if self.share_rows:
            self._share(capacity, max_segments or MAX_SEGMENTS, multiple)

    def __getitem__(self, step: int) -> Batch:
        """The batch of one step: any step from 0 on, in any order.

        Returns:
          tokens, segment_ids, positions (B,T) int32 with 0 as padding; ids (B,S) int32, -1 = none; the examples' own
          arrays, (B,T) per token and (B,S) per example.
        """
        if step < 0:
            raise IndexError(f"steps count from 0, got {step}")
        return self.collate(self._drawn(step))

    def with_seed(self, seed: int) -> "Batches":
        """The same rows in the order of another seed, as if made with it.

        Raises:
          UserError: the rows are packed, so that they depend on the seed too.
        """
        if self.packing:
            raise UserError("packing plans its rows by the seed: make the batches of another seed anew")
        new = copy.copy(self)
        new.__dict__.pop("fingerprint", None)
        new._seed = int(seed)
        new._order = functools.lru_cache(maxsize=4)(new._permutation)
        return new

    def in_order(self) -> Iterator[Batch]:
        """Every row exactly once; the last batch is filled with empty rows (ids -1, everything else 0).

        In order, but where examples share rows: then all batches are of one shape, and those share one that fit best.
        """
        if self.share_rows:
            rows, count = self._all_shared
            for first in range(0, len(rows), count):
                yield self._filled(rows[first : first + count], self.lengths[0], count)
            return
        for first in range(0, len(self.rows), self.batch_size):
            yield self.collate(list(range(first, min(first + self.batch_size, len(self.rows)))))

    def _drawn(self, step: int) -> list[int]:
        """The rows that a step draws."""
        count = len(self.rows)
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [int(self._order(place // count)[place % count]) for place in places]

    def _share(self, capacity: int, bound: int, multiple: int) -> None:
        """Chooses the shape of batches whose examples share rows; the shapes are the same for every seed."""
        self._multiple, self.lengths = multiple, (bucket_lengths.round_up(max(self.row_sizes), capacity),)
        fitting = max(1, self.lengths[0] // min(self.row_sizes))
        self.segments = min(bound, self.batch_size, fitting)
        order = packing_plan.permutation(len(self.rows), 0, 1).tolist()
        starts = range(0, max(1, len(order) - self.batch_size + 1), self.batch_size)
        looked = [order[first : first + self.batch_size] for first in starts[: sharing.LOOKED_AT]]
        self.row_counts = sharing.choose_counts([len(self._shared(drawn)) for drawn in looked], multiple)

    def _shared(self, drawn: Sequence[int]) -> list[tuple[int, ...]]:
        return sharing.rows_of(drawn, self.row_sizes, self.lengths[0], self.segments)

    @functools.cached_property
    def _all_shared(self) -> tuple[list[tuple[int, ...]], int]:
        """The rows that all examples share, and how many of them a batch holds: about `batch_size` examples."""
        rows = self._shared(range(len(self.rows)))
        usual = sharing.round_up(-(-len(rows) * self.batch_size // len(self.rows)), sharing.EVEN)
        return rows, sharing.round_up(min(usual, len(rows)), self._multiple)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over examples, plan and order: two objects with the same one give the same batch at every step."""
        shape = (self.batch_size, self._seed, self.lengths)
        total = hashlib.sha256(repr((*shape, self.row_counts) if self.share_rows else shape).encode())
        self._hash_rows(total)
        return total.hexdigest()

    @functools.cached_property
    def rows_fingerprint(self) -> str:
        """sha256 over examples and plan, not the order: two objects with the same one have the same rows."""
        total = hashlib.sha256()
        self._hash_rows(total)
        return total.hexdigest()

    def _hash_rows(self, total: Any) -> None:
        total.update(packing_plan.fingerprint(self.rows).encode())
        for example in self._examples:
            for key in sorted(example):
                value = np.ascontiguousarray(example[key])
                total.update(f"{key}{value.dtype}{value.shape}".encode() + value.tobytes())

    @property
    def fill(self) -> float:
        """The share of real tokens if every row were padded to the longest bucket."""
        rows = len(self.rows) * self.row_counts[0] / self.batch_size
        return sum(self.row_sizes) / (rows * self.lengths[-1])

    def _permutation(self, epoch: int) -> np.ndarray:
        # The plan takes stream 0.
        return packing_plan.permutation(len(self.rows), self._seed, epoch + 1)

    def collate(self, drawn: Sequence[int]) -> Batch:
        """A batch of given rows, at most `batch_size`, filled up with empty ones."""
        longest = max(self.row_sizes[r] for r in drawn)
        length = next(n for n in self.lengths if n >= longest)
        rows, count = [self.rows[r] for r in drawn], self.batch_size
        if self.share_rows:
            rows = self._shared(list(drawn))
            count = sharing.filled_up(len(rows), self.row_counts, self._multiple)
        return self._filled(rows, length, count)

    def _filled(self, rows: Sequence[Sequence[int]], length: int, count: int) -> Batch:
        """A batch of these rows of example numbers, and of empty ones up to `count`."""
        batch = self.empty(length, count)
        for b, row in enumerate(rows):
            start = 0
            for s, i in enumerate(row):
                start = _place(batch, self._examples[i], b, s, start)
                batch["ids"][b, s] = i
        return batch

    def empty(self, length: int, count: int | None = None, segments: int | None = None) -> Batch:
        """A batch of empty rows, `batch_size` of them unless told: what every batch of this length looks like.

        Args:
          length: tokens of a row.
          count: of the rows.
          segments: examples that a row has place for, if not as many as in this split.
        """
        count = self.batch_size if count is None else count
        tokens, places = (count, length), (count, segments or self.segments)
        batch = {key: np.zeros(tokens, np.int32) for key in ("tokens", "segment_ids", "positions")}
        for key, value in self._examples[0].items():
            kind = np.float32 if np.issubdtype(np.asarray(value).dtype, np.floating) else np.int32
            batch[key] = np.zeros(places if np.ndim(value) == 0 else tokens, kind)
        batch["ids"] = np.full(places, -1, np.int32)
        return batch


def _place(batch: Batch, example: Example, b: int, s: int, start: int) -> int:
    """Writes one example into row b as segment s from `start` on; returns its end."""
    end = start + len(example["tokens"])
    batch["segment_ids"][b, start:end] = s + 1
    batch["positions"][b, start:end] = np.arange(end - start)
    for key, value in example.items():
        if np.ndim(value):
            batch[key][b, start:end] = value
        else:
            batch[key][b, s] = value + start if key in POINTERS else value
    return end


def _check(examples: Sequence[Example], max_length: int | None, names: Sequence[str] | None) -> list[int]:
    """Returns the number of tokens of each example."""
    if not examples:
        raise UserError("there is no example to make a batch of: the split is empty")
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        raise UserError(f"max_length must be a whole number of tokens, at least 1; got {max_length!r}")
    sizes, without = [], []
    for i, example in enumerate(examples):
        sizes.append(_length(example, examples[0], _name(i, names), max_length))
        if "weights" in example and not np.any(example["weights"] > 0):
            without.append(_name(i, names))
    if without:
        raise UserError(
            f"{len(without)} of {len(examples)} examples have no target token, so nothing would be learned from them: "
            f"{', '.join(without[:5])}{', ...' if len(without) > 5 else ''}. Was the completion empty or cut off? "
            "Raise data.max_length or drop these records"
        )
    return sizes


def _length(example: Example, first: Example, name: str, max_length: int | None) -> int:
    if example.keys() != first.keys() or any(key in RESERVED for key in example):
        raise UserError(
            f"{name} has the arrays {sorted(example)}; expected {sorted(first)}, none of {', '.join(RESERVED)}"
        )
    size = len(example["tokens"])
    if size == 0:
        raise UserError(f"{name} has no tokens: its text is empty")
    if max_length is not None and size > max_length:
        raise UserError(
            f"{name} has {size} tokens, more than max_length={max_length}; truncate it or raise data.max_length"
        )
    wrong = [key for key, value in example.items() if np.ndim(value) and len(value) != size]
    if wrong:
        raise UserError(f"{name}: the array {wrong[0]!r} has {len(example[wrong[0]])} values for {size} tokens")
    return size


def _name(i: int, names: Sequence[str] | None) -> str:
    return names[i] if names else f"example {i}"
