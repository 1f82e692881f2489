"""Arrays that belong to rows of different lengths, each kept at its row's own length, in memory or on disk.

A store is one flat buffer per kind of array, and a row's place in it follows from the lengths alone. Memory is touched
when a row is written, so an unfilled store costs nothing. On disk the buffers are memory-mapped files; which rows they
hold is written after the rows are, at `close`: a store that a crash left behind counts as empty, never as half right.
"""

import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SEGMENT = -1  # in a shape: the axis counts the rows that lie side by side in one row of a batch


class Place(NamedTuple):
    """Where a row lies in a row of a batch: from token `start` on, as segment number `segment`."""

    row: int
    start: int = 0
    segment: int = 0


class Kind(NamedTuple):
    """Attributes:
    shape: of one row; None stands for the row's length, SEGMENT for the axis over rows that share one.
    dtype: of the array.
    """

    shape: tuple[int | None, ...]
    dtype: Any

    def row(self, length: int, segments: int = 1) -> tuple[int, ...]:
        """The shape at a length."""
        return tuple(length if n is None else segments if n == SEGMENT else n for n in self.shape)

    def part(self, place: Place, length: int) -> tuple[slice, ...]:
        """Where a row of a length lies in the arrays of a row of a batch."""
        at = {None: slice(place.start, place.start + length), SEGMENT: slice(place.segment, place.segment + 1)}
        return tuple(at.get(n) or slice(n) for n in self.shape)


def size(kinds: Sequence[Kind], lengths: Sequence[int]) -> int:
    """Bytes of a full store."""
    return sum(_count(kind, n) * np.dtype(kind.dtype).itemsize for kind in kinds for n in lengths)


def _count(kind: Kind, length: int) -> int:
    return int(np.prod(kind.row(length), dtype=np.int64))


class RowStore:
    """The arrays of all rows.

    Attributes:
      kinds: of the arrays of a row.
      lengths: of the rows.
      folder: where they lie; None is in memory.
      present: (rows,) bool: which rows are there.
    """

    def __init__(self, kinds: Sequence[Kind], lengths: Sequence[int], folder: Path | None = None):
        """Makes a store, or opens the one that `close` left in the folder."""
        self.kinds, self.lengths, self.folder = tuple(kinds), tuple(lengths), folder
        self.present = np.zeros(len(self.lengths), bool)
        self._starts = [np.cumsum([0, *(_count(kind, n) for n in self.lengths)]) for kind in self.kinds]
        self._buffers: list[np.ndarray] | None = None
        self.lock = threading.RLock()
        if folder is not None and (folder / "present.npy").exists() and all(map(self._whole, range(len(self.kinds)))):
            self.present = np.load(folder / "present.npy")

    @property
    def nbytes(self) -> int:
        """Bytes when every row is there."""
        return size(self.kinds, self.lengths)

    def put(self, place: Place, arrays: Sequence[np.ndarray]) -> None:
        """Keeps the arrays of one row, cut out of those of the row of a batch that it lies in."""
        for kind, own, array in zip(self.kinds, self._places(place.row), arrays, strict=True):
            own[...] = array[kind.part(place, self.lengths[place.row])]
        self.present[place.row] = True

    def batch(self, rows: Sequence[Sequence[Place]], length: int, segments: int = 1) -> tuple[np.ndarray, ...]:
        """The arrays of a batch, zeros where no row lies.

        Args:
          rows: what lies in each row of the batch.
          length: of the batch's rows.
          segments: that a row of the batch has place for.

        Raises:
          KeyError: a row that was never put.
        """
        out = tuple(np.zeros((len(rows), *kind.row(length, segments)), kind.dtype) for kind in self.kinds)
        for b, places in enumerate(rows):
            for place in places:
                if not self.present[place.row]:
                    raise KeyError(f"row {place.row} is not in the store")
                for kind, array, own in zip(self.kinds, out, self._places(place.row), strict=True):
                    array[b][kind.part(place, self.lengths[place.row])] = own
        return out

    def close(self) -> None:
        """Lets go of the buffers; on disk, what is there is found again."""
        with self.lock:
            if self.folder is not None and self._buffers is not None and self.folder.exists():
                for buffer in self._buffers:
                    buffer.flush()  # type: ignore[attr-defined]
                new = self.folder / "present.new.npy"
                np.save(new, self.present)
                new.replace(self.folder / "present.npy")
            if self._buffers is not None:
                self._buffers, self.present = None, np.zeros_like(self.present)

    def _places(self, row: int) -> list[np.ndarray]:
        if self._buffers is None:
            self._buffers = [self._buffer(i) for i in range(len(self.kinds))]
        shapes = [kind.row(self.lengths[row]) for kind in self.kinds]
        spans = [slice(starts[row], starts[row + 1]) for starts in self._starts]
        return [b[span].reshape(shape) for b, span, shape in zip(self._buffers, spans, shapes, strict=True)]

    def _buffer(self, i: int) -> np.ndarray:
        count, kind = int(self._starts[i][-1]), self.kinds[i]
        if self.folder is None:
            return np.empty(count, kind.dtype)
        self.folder.mkdir(parents=True, exist_ok=True)
        return np.memmap(self._file(i), kind.dtype, "r+" if self._whole(i) else "w+", shape=(count,))

    def _file(self, i: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{i}.bin"

    def _whole(self, i: int) -> bool:
        path, expected = self._file(i), int(self._starts[i][-1]) * np.dtype(self.kinds[i].dtype).itemsize
        return path.exists() and path.stat().st_size == expected


class RowStores:
    """The stores that the runs of one process share, within limits of memory and disk.

    A store lies in memory if it fits, else on disk if it fits there. What no run uses any more makes room, the longest
    unused first.
    """

    def __init__(self, memory: float, disk: float = 0.0, folder: str | Path | None = None):
        """Args:
        memory: bytes at most.
        disk: bytes at most, in `folder`, with what earlier processes left there.
        folder: None: nothing goes to disk.
        """
        self.memory, self.disk = memory, disk if folder is not None else 0.0
        self.folder = None if folder is None else Path(folder)
        self._stores: dict[str, RowStore] = {}  # the longest unused first
        self._users: dict[str, int] = {}
        self._lock = threading.Lock()

    def open(self, key: str, kinds: Sequence[Kind], lengths: Sequence[int]) -> RowStore | None:
        """The store of a key, for as long as until `release`; None if no place is large enough."""
        with self._lock:
            store = self._stores.pop(key, None) or self._make(key, kinds, lengths)
            if store is not None:
                self._stores[key] = store
                self._users[key] = self._users.get(key, 0) + 1
            return store

    def release(self, key: str) -> None:
        """Ends one use; the store stays until its room is needed."""
        with self._lock:
            self._users[key] -= 1

    def close(self) -> None:
        """Ends all stores; those on disk stay there."""
        with self._lock:
            for store in self._stores.values():
                store.close()
            self._stores, self._users = {}, {}

    def remove(self) -> None:
        """As `close`, and nothing stays on disk."""
        self.close()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _make(self, key: str, kinds: Sequence[Kind], lengths: Sequence[int]) -> RowStore | None:
        need = size(kinds, lengths)
        if self._room(need, on_disk=False):
            return RowStore(kinds, lengths)
        if self.folder is None or not self._room(need, on_disk=True, spare=key):
            return None
        return RowStore(kinds, lengths, self.folder / key)

    def _room(self, need: int, *, on_disk: bool, spare: str = "") -> bool:
        """Whether so many bytes are free, once unused stores are gone. Nothing goes if that would not help."""
        limit = self.disk if on_disk else self.memory
        mine = {key: s for key, s in self._stores.items() if (s.folder is not None) == on_disk}
        if need + sum(s.nbytes for key, s in mine.items() if self._users[key]) > limit:
            return False
        unused = [key for key in mine if not self._users[key]]
        left = self._left_behind(spare) if on_disk else []
        while need + sum(s.nbytes for s in mine.values()) + sum(map(_bytes_in, left)) > limit:
            if left:
                shutil.rmtree(left.pop(0), ignore_errors=True)
            else:
                self._drop(mine, unused.pop(0))
        return True

    def _drop(self, mine: dict[str, RowStore], key: str) -> None:
        store = mine.pop(key)
        del self._stores[key], self._users[key]
        store.close()
        if store.folder is not None:
            shutil.rmtree(store.folder, ignore_errors=True)

    def _left_behind(self, spare: str) -> list[Path]:
        """Folders of earlier processes, oldest first."""
        assert self.folder is not None
        known = {*self._stores, spare}
        found = self.folder.iterdir() if self.folder.exists() else ()
        return sorted((p for p in found if p.is_dir() and p.name not in known), key=lambda p: p.stat().st_mtime)


def _bytes_in(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir() if p.suffix == ".bin")
