"""Exact evaluation: every example once, sums added on the device, one value per example kept for paired tests.

Means come from sums over the whole split, so an uneven last batch weighs what it holds and the result does not depend
on the batch size beyond rounding.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lora_jax import feed


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of one split.

    Attributes:
      metrics: from `task.summary`: `loss`, `accuracy`, ...
      values: {name: (N,) array}: one value per example, in the order of the split.
      seconds: it took.
      tokens: real tokens read.
    """

    metrics: dict[str, float]
    values: dict[str, np.ndarray]
    seconds: float
    tokens: int


def make_eval_step(apply: Callable, adapter: Any, task: Any) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """Builds the jitted step `(variables, delta, batch) -> (sums, per_example)`.

    Args:
      apply: `lift(base.apply)`.
      adapter: its `bind`; None evaluates the base alone (the step's delta is then ignored).
      task: `inputs`, `sums`, `per_example`.
    """

    return jax.jit(eval_step(apply, adapter, task))


def eval_step(apply: Callable, adapter: Any, task: Any) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """The step as a pure function, not compiled."""

    def step(variables, delta, batch):
        bound = variables if adapter is None else adapter.bind(variables, delta)
        outputs = apply(bound, **task.inputs(batch))
        return task.sums(outputs, batch), task.per_example(outputs, batch)

    return step


@jax.jit
def _add(total, new):
    return jax.tree.map(jnp.add, total, new)


def evaluate(
    step: Callable,
    variables: Any,
    delta: Any,
    task: Any,
    batches: Any,
    *,
    mesh: Mesh | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluates one split.

    Args:
      step: from `make_eval_step`.
      variables: the base.
      delta: of the adapter.
      task: `summary` turns the sums into metrics.
      batches: `in_order()` yields every example exactly once.
      mesh: where batches go.
      stop: asked before every batch; True ends the evaluation without a result.

    Returns:
      The result, or None if it was stopped.

    Raises:
      RuntimeError: an example was missing or came twice.
    """
    found = gather(step, variables, delta, batches, mesh=mesh, stop=stop)
    return None if found is None else found.evaluation(task)


@dataclasses.dataclass(frozen=True)
class Gathered:
    """What came of one pass over a split, on the host.

    Attributes:
      sums: from `task.sums`, added up.
      values: {name: array} of each batch, from `task.per_example`.
      ids: (B, S) of each batch.
      seconds, tokens: as of `Evaluation`.
    """

    sums: Any
    values: list[dict[str, np.ndarray]]
    ids: list[np.ndarray]
    seconds: float
    tokens: int

    def evaluation(self, task: Any) -> Evaluation:
        """The metrics, and the values by example.

        Raises:
          RuntimeError: an example was missing or came twice.
        """
        metrics = {k: float(v) for k, v in task.summary(self.sums).items()}
        return Evaluation(metrics, _by_example(self.ids, self.values), self.seconds, self.tokens)

    def of_arm(self, index: int, count: int) -> "Gathered":
        """One arm's part, where every array has a leading axis over `count` arms; the seconds are shared evenly."""
        sums, values = jax.tree.map(lambda x: np.asarray(x)[index], (self.sums, self.values))
        return dataclasses.replace(self, sums=sums, values=values, seconds=self.seconds / count)


def gather(
    step: Callable,
    variables: Any,
    delta: Any,
    batches: Any,
    *,
    mesh: Mesh | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Gathered | None:
    """One pass over a split; arguments as of `evaluate`. None if it was stopped."""
    start, total, tokens = time.perf_counter(), None, 0
    ids, values = [], []
    throttle = feed.Throttle()
    fed = feed.prefetch(batches.in_order(), lambda batch: feed.place(batch, mesh, check=False))
    try:
        for batch in fed:
            if stop():
                return None
            sums, per_example = step(variables, delta, batch.arrays)
            total = sums if total is None else _add(total, sums)
            throttle(sums)
            ids.append(batch.ids)
            values.append(per_example)
            tokens += batch.tokens
    finally:
        fed.close()
    total, values = jax.device_get((total, values))
    return Gathered(total, values, ids, time.perf_counter() - start, tokens)


def _by_example(ids: Sequence[np.ndarray], values: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Values of all batches, padding left out, in the order of the examples."""
    flat = np.concatenate([np.asarray(i).reshape(-1) for i in ids])
    real = flat >= 0
    order = np.argsort(flat[real], kind="stable")
    if not np.array_equal(flat[real][order], np.arange(real.sum())):
        raise RuntimeError("evaluation must see every example exactly once; the batches' ids do not number them")
    columns = {name: np.concatenate([np.asarray(v[name]).reshape(-1) for v in values]) for name in values[0]}
    return {name: column[real][order] for name, column in columns.items()}


def predictions(task: Any, examples: Sequence[Any], result: Evaluation) -> list[dict[str, Any]]:
    """One dictionary per example, in order: its number and what `task.prediction` says of it."""
    out = []
    for i, example in enumerate(examples):
        values = {name: column[i].item() for name, column in result.values.items()}
        out.append({"id": i, **task.prediction(example, values)})
    return out
