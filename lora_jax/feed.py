"""Batches on their way to the devices: prepared ahead in a thread, and never more steps in flight than needed.

A batch is made on the host and sent off while the devices work on earlier ones. JAX returns from a step before it is
computed, so a loop that never reads a result would run arbitrarily far ahead; `Throttle` waits for a result of some
steps ago, which leaves the devices busy and neither memory nor a signal's delay unbounded.
"""

import collections
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lora_jax import sharding
from lora_jax.data import Batches
from lora_jax.errors import UserError
from lora_jax.train_settings import TrainSettings


class Fed(NamedTuple):
    """A batch on the devices, and what the host knows about it.

    Attributes:
      arrays: the batch, placed.
      ids: (B, S) int32 on the host: which example each segment is, -1 = none.
      tokens: how many real (not padding) tokens it holds; of several arms' batches an array.
    """

    arrays: Any
    ids: np.ndarray | None
    tokens: Any


def make_batches(
    task: Any,
    records: Sequence[Any],
    settings: TrainSettings,
    *,
    seed: int = 0,
    max_length: int | None = None,
    mesh: Mesh | None = None,
    adapter: Any = None,
    training: bool = False,
) -> Batches:
    """The batches of one split, as a run's settings shape them.

    Args:
      task: `prepare` and `encode` are used.
      records: of the split, at least one.
      settings: of the run.
      seed: of the order.
      max_length: tokens of a row at most.
      mesh: over which the rows are split.
      adapter: of the run; one that needs a row for each text gets it.
      training: whether rows are cut into micro-batches, and which batch size counts.
    """
    own = task.prepare(records)
    parts = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    return Batches(
        [task.encode(record) for record in own],
        batch_size=settings.batch_size if training else settings.eval_batch_size or settings.batch_size,
        seed=seed,
        max_length=max_length,
        packing=settings.packing,
        buckets=settings.buckets,
        names=[getattr(record, "where", str(i)) for i, record in enumerate(own)],
        share_rows=settings.share_rows and not getattr(adapter, "own_rows", False),
        multiple=parts * (settings.accumulate if training else 1),
    )


def cut_notice(task: Any, batches: Batches, max_length: int | None) -> list[str]:
    """A line about texts that are cut, or none. An example that fills its row may also just fit: it is not known."""
    if not task.cuts or not batches.full:
        return []
    return [
        f"{batches.full:,} of {batches.examples:,} training texts fill max_length={max_length}: what was longer is cut"
    ]


def place(batch: Mapping[str, np.ndarray], mesh: Mesh | None, *, check: bool = True) -> Fed:
    """Sends one batch off; its leading axis is split over the mesh's data and fsdp axes.

    Raises:
      UserError: no token of the batch has a target, so that its loss would be 0 / 0.
    """
    if check:
        check_targets(batch)
    target = sharding.sharding(mesh, sharding.BATCH)
    arrays = jax.device_put(dict(batch), target)
    return Fed(arrays, batch.get("ids"), tokens_of(batch))


def check_targets(batch: Mapping[str, np.ndarray]) -> None:
    """Raises the error of `place`."""
    weights = batch.get("weights")
    if weights is not None and not np.any(weights):
        raise UserError(
            "a batch has no token with a target (all its weights are 0): were the examples cut before their targets? "
            "Raise data.max_length, or use a larger train.batch_size"
        )


def tokens_of(batch: Mapping[str, np.ndarray]) -> int:
    """How many real tokens a batch holds."""
    segments = batch.get("segment_ids")
    return int(np.count_nonzero(segments) if segments is not None else next(iter(batch.values())).size)


def prefetch(batches: Iterable[Any], function: Callable[[Any], Any], depth: int = 2) -> Generator[Any, None, None]:
    """Yields `function(batch)` for every batch, made `depth` ahead in a thread.

    An error in the thread is raised here, at its batch. Closing the generator ends the thread.
    """
    ready: queue.Queue = queue.Queue(maxsize=depth)
    closed = threading.Event()
    end = object()

    def put(item: tuple[Any, BaseException | None]) -> bool:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for batch in batches:
                if not put((function(batch), None)):
                    return
            put((end, None))
        except BaseException as error:  # Whatever it is belongs to the caller.
            put((None, error))

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        closed.set()
        thread.join()


class Throttle:
    """Keeps at most `depth` results in flight; by default 4, and none on a CPU.

    A CPU has nothing to overlap: the host that waits leaves its cores to the step, and the memory of one step is given
    back before the next one asks for its own (9 % of a step, 30M Llama, 2 cores).
    """

    def __init__(self, depth: int | None = None):
        self._queue: collections.deque = collections.deque()
        self._depth = (0 if jax.default_backend() == "cpu" else 4) if depth is None else depth

    def __call__(self, result: Any) -> None:
        """Takes a step's result and waits until the one `depth` steps ago is there."""
        self._queue.append(result)
        if len(self._queue) > self._depth:
            jax.block_until_ready(self._queue.popleft())
