"""The training loop: steps, and between them what is due (a log line, an evaluation, a checkpoint), until an end.

The host reads no step's numbers inside the loop: they stay on the device until a line is due, and only then is it
seen whether they are finite. How far the host runs ahead is `feed.Throttle`'s. Whatever the loop knows besides arrays
is in its `Book`, which is saved with every checkpoint; a run that is resumed does and writes what the unbroken run
would have.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from lora_jax import evaluate, feed
from lora_jax.checkpoint import Checkpoints
from lora_jax.progress import Progress
from lora_jax.records import Writer
from lora_jax.step import TrainState, delta_of
from lora_jax.stopping import Best, Diverged, Interrupted, Signals


@dataclasses.dataclass
class Book:
    """What the host knows of a run; JSON.

    Attributes:
      step: updates made.
      seconds: spent so far, in all processes together.
      tokens: real tokens trained on.
      evaluated: step of the last evaluation on dev; -1 before the first.
      dev: its metrics.
      best: the best evaluation; see `stopping.Best`.
      pending: [loss sum, weight, gradient norm, penalty] of each step since the last log line.
      done: whether the training is over.
    """

    best: Best
    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    evaluated: int = -1
    dev: dict[str, float] = dataclasses.field(default_factory=dict)
    pending: list[list[float]] = dataclasses.field(default_factory=list)
    done: bool = False

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Book":
        """Undoes `dataclasses.asdict`."""
        return cls(**{**values, "best": Best(**values["best"])})


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is done when. `total` steps; the others are periods in steps; `patience` in evaluations, 0 = off."""

    total: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    patience: int


@dataclasses.dataclass
class Loop:
    """One run.

    Attributes:
      plan: what is done when.
      book: changed in place.
      state: on the devices; replaced by every step.
      variables: the base, on the devices.
      mask: from `adapter.trainable`.
      train_step: from `make_train_step`.
      eval_step: from `make_eval_step`.
      task: for its metrics.
      batches: of training; `batches[i]` for step i.
      dev: batches of the dev split, or None.
      learning_rate: the schedule, for the log.
      checkpoints, writers, progress, signals: where it all goes.
      mesh: where batches go.
      last_dev: the last evaluation made by this process.
    """

    plan: Plan
    book: Book
    state: TrainState
    variables: Any
    mask: Any
    train_step: Callable
    eval_step: Callable
    task: Any
    batches: Any
    dev: Any
    learning_rate: Callable
    checkpoints: Checkpoints
    writers: Sequence[Writer]
    progress: Progress
    signals: Signals
    mesh: Mesh | None = None
    last_dev: evaluate.Evaluation | None = None

    def run(self) -> None:
        """Trains to the end.

        Raises:
          Interrupted: a signal came; the state is saved.
          Diverged: the loss or its gradient is not finite; nothing of it is saved.
        """
        self._fetched: list[dict[str, jax.Array]] = []  # numbers of steps that are still on the device
        self._began = time.perf_counter() - self.book.seconds
        self._start_window()
        if self.book.done:
            return
        self._due(after_step=False)  # an evaluation that a signal cut short
        steps = range(self.book.step, self.plan.total)
        fed = feed.prefetch((self.batches[i] for i in steps), lambda batch: feed.place(batch, self.mesh))
        throttle, first = feed.Throttle(), True
        try:
            while not self.book.done:
                batch = next(fed)
                self.state, numbers = self.train_step(self.state, self.variables, batch.arrays)
                throttle(numbers["weight"])
                if first:
                    self._compiled(numbers)
                    first = False
                else:
                    self._window_tokens += batch.tokens
                self._fetched.append(numbers)
                self.book.step += 1
                self.book.tokens += batch.tokens
                self._due()
        finally:
            fed.close()

    def delta(self) -> Any:
        """The delta as it stands."""
        return delta_of(self.state, self.mask)

    def _due(self, after_step: bool = True) -> None:
        """Everything that comes after a step. Order matters: a checkpoint knows of the lines before it."""
        step, plan = self.book.step, self.plan
        last = step >= plan.total
        if after_step:
            self.progress.advance(step)
            if step % plan.log_every == 0 or last:
                self._log()
        improved = self._evaluate() if step and (step % plan.eval_every == 0 or last) else False
        stopped = self.signals.stopped()
        early = plan.patience > 0 and self.book.best.since >= plan.patience
        # An evaluation that a signal cut short is still owed, so the run is not over.
        owed = self.dev is not None and last and self.book.evaluated < step
        self.book.done = (last or early) and not owed
        if improved or self.book.done or stopped or (after_step and step % plan.checkpoint_every == 0):
            self._save()
        if stopped:
            self.checkpoints.wait()
            assert self.signals.caught is not None
            raise Interrupted(self.signals.caught, step, self.checkpoints.folder.parent)
        if early and not last:
            best = self.book.best
            self.progress.say(f"stopped early: {best.metric} has not improved since step {best.step}")

    def _log(self) -> None:
        """Writes the mean over the steps since the last line, weighted as one large batch would be."""
        self._fetch()
        book = self.book
        columns = list(zip(*book.pending, strict=True))
        loss = math.fsum(columns[0]) / math.fsum(columns[1]) if math.fsum(columns[1]) else math.nan
        now = time.perf_counter()
        record = {
            "step": book.step,
            "split": "train",
            "loss": loss,
            "learning_rate": float(jax.device_get(self.learning_rate(book.step - 1))),
            "grad_norm": math.fsum(columns[2]) / len(columns[2]),
            "tokens_per_second": self._window_tokens / max(now - self._window - self._away, 1e-9),
            "tokens": book.tokens,
            "seconds": now - self._began,
        }
        if any(columns[3]):
            record["penalty"] = math.fsum(columns[3]) / len(columns[3])
        self._write(record)
        self._check_finite()
        book.pending = []
        self._start_window()

    def _evaluate(self) -> bool:
        """Evaluates on dev if that is not done yet; True if it is the best so far."""
        book = self.book
        if self.dev is None or book.evaluated >= book.step:
            return False
        began = time.perf_counter()
        found = evaluate.evaluate(
            self.eval_step, self.variables, self.delta(), self.task, self.dev, mesh=self.mesh, stop=self.signals.stopped
        )
        self._away += time.perf_counter() - began
        if found is None:
            return False
        self._write(evaluation_record(book.step, "dev", found))
        if not math.isfinite(found.metrics[book.best.metric]):
            raise self._diverged(book.step, f"{book.best.metric} on dev is {found.metrics[book.best.metric]}")
        self.last_dev, book.evaluated, book.dev = found, book.step, found.metrics
        return book.best.update(book.step, found.metrics)

    def _save(self) -> None:
        self._fetch()
        self._check_finite()
        began = time.perf_counter()
        self.book.seconds = began - self._began
        self.checkpoints.save(self.book.step, self.state, dataclasses.asdict(self.book), best=self.book.best.step)
        self._away += time.perf_counter() - began

    def _fetch(self) -> None:
        """Brings the steps' numbers to the host: one transfer for all."""
        names = ("loss_sum", "weight", "grad_norm", "penalty")
        found = jax.device_get(self._fetched)
        self.book.pending += [[float(numbers[name]) for name in names] for numbers in found]
        self._fetched = []

    def _check_finite(self) -> None:
        pending = self.book.pending
        for i, (loss, weight, norm, _) in enumerate(pending):
            if not (math.isfinite(loss) and math.isfinite(norm)) or weight == 0:
                # The gradient can overflow while the loss is still a number; the parameters are lost all the same.
                what = f"the loss is {loss / weight if weight else math.nan} and its gradient's norm {norm}"
                raise self._diverged(self.book.step - len(pending) + i + 1, what)

    def _diverged(self, step: int, what: str) -> Diverged:
        self.checkpoints.wait()
        good = self.checkpoints.steps()
        return Diverged(step, what, max(good) if good else None, self.checkpoints.folder)

    def _write(self, record: dict[str, Any]) -> None:
        for writer in self.writers:
            writer.write(record)
        self.progress.show(record)

    def _compiled(self, numbers: dict[str, jax.Array]) -> None:
        """Waits for the first step, the only wait that is not for a line: speed is measured without compilation."""
        jax.block_until_ready(numbers["weight"])
        seconds = time.perf_counter() - self._window - self._away
        self.progress.say(f"first step (with compilation) after {seconds:.1f} s")
        self._start_window()

    def _start_window(self) -> None:
        self._window, self._away, self._window_tokens = time.perf_counter(), 0.0, 0


def evaluation_record(step: int, split: str, found: evaluate.Evaluation) -> dict[str, Any]:
    """One evaluation as a record."""
    speed = found.tokens / max(found.seconds, 1e-9)
    return {"step": step, "split": split, **found.metrics, "tokens_per_second": speed, "seconds": found.seconds}
