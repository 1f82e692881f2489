"""The loop of a pack: as `loop.Loop`, for several arms in step, each with a book, a metrics file and an end of its own.

Every arm leaves behind what a lone run leaves, in its own directory. An arm that diverges is a failed arm from then on,
and one whose patience is over is finished at once; the others go on. The checkpoint is one for the whole pack.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import evaluate, feed, manifest, records, trees
from lora_jax.ablation.running.packed import Hyper, Pack, PackState, Program
from lora_jax.adapters import Adapter
from lora_jax.checkpoint import Checkpoints
from lora_jax.lift import is_adapted
from lora_jax.loop import Plan, evaluation_record
from lora_jax.stopping import Best, Interrupted, Signals

NUMBERS = ("loss_sum", "weight", "grad_norm", "penalty")


@dataclasses.dataclass
class Book:
    """What the host knows of one arm; JSON. `ended` is '' while it trains, then 'done', or why it failed."""

    best: Best
    evaluated: int = -1
    dev: dict[str, float] = dataclasses.field(default_factory=dict)
    ended: str = ""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Book":
        """Undoes `dataclasses.asdict`."""
        return cls(**{**values, "best": Best(**values["best"])})


@dataclasses.dataclass(frozen=True)
class Job:
    """One arm of a pack.

    Attributes:
      folder: its run's directory.
      adapter: its own.
      identity: for its manifest.
      save: writes an adapter: `save(folder / "adapter", delta)`.
      about: more fields of its manifest.
    """

    folder: Path
    adapter: Adapter
    identity: Mapping[str, Any]
    save: Callable[[Path, Any], None]
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Together:
    """One pack.

    Attributes:
      jobs: the arms.
      pack, program, hyper: from `packed`.
      state: replaced by every step.
      variables: the base.
      task, splits: of all arms.
      batches: of every split; those of evaluation are the same for all arms.
      plan: what is done when; the same for all arms but `patience`.
      patience: of each arm, in evaluations; 0 is off.
      folder: of the pack's checkpoints.
      place: sends a batch of training off.
      ended: is called with (index, why or '') whenever an arm has ended, its files written.
      tick: is called with the step after every log line.
    """

    jobs: Sequence[Job]
    pack: Pack
    program: Program
    hyper: Hyper
    state: PackState
    variables: Any
    task: Any
    splits: Mapping[str, Sequence[Any]]
    batches: Mapping[str, Any]
    plan: Plan
    patience: Sequence[int]
    learning_rates: Sequence[Callable[[Any], Any]]
    folder: Path
    place: Callable[[Any], feed.Fed] = lambda batch: feed.place(batch, None)
    ended: Callable[[int, str], None] = lambda index, why: None
    tick: Callable[[int], None] = lambda step: None

    def run(self) -> None:
        """Trains all arms to their end.

        Raises:
          Interrupted: a signal came; the pack is saved.
        """
        metric, mode = self.task.better
        self._books = [Book(Best(metric, mode)) for _ in self.jobs]
        self._step, self._seconds = 0, 0.0
        self._tokens = np.zeros(len(self.jobs), np.int64)  # of each arm
        self._pending: list[dict[str, Any]] = []
        self._last_dev: tuple[int, Any] = (-1, None)
        self._kept = self.state.trainable if any(self.patience) else None
        self._kept = jax.tree.map(lambda x: jnp.array(x, copy=True), self._kept)
        with Checkpoints(self.folder, keep=1) as self._checkpoints, Signals() as self._signals:
            self._resume()
            self._open()
            try:
                self._train()
            finally:
                for file in self._files.values():
                    file.close()

    def _train(self) -> None:
        self._began = time.perf_counter() - self._seconds
        self._start_window()
        steps = range(self._step, self.plan.total)
        fed = feed.prefetch((self.batches["train"][i] for i in steps), self.place)
        throttle = feed.Throttle()
        try:
            self._due(after_step=False)
            while any(not book.ended for book in self._books) and self._step < self.plan.total:
                batch = next(fed)
                self.state, numbers = self.program.train(self.state, self.hyper, self.variables, batch.arrays)
                throttle(numbers["weight"])
                self._pending.append(numbers)
                self._step += 1
                self._tokens += batch.tokens
                self._window_tokens += batch.tokens
                self._due()
        finally:
            fed.close()

    def _due(self, after_step: bool = True) -> None:
        """Everything that comes after a step, as in `Loop`; a checkpoint knows of the lines before it."""
        step, plan = self._step, self.plan
        last = step >= plan.total
        if after_step and (step % plan.log_every == 0 or last):
            self._log()
        evaluated = step > 0 and (step % plan.eval_every == 0 or last) and self._evaluate()
        stopped = self._signals.stopped()
        over = [i for i, book in self._live() if last or 0 < self.patience[i] <= book.best.since]
        if stopped or evaluated or after_step and (over or step % plan.checkpoint_every == 0):
            self._save()
        if stopped or over:  # before an arm is done there is a checkpoint of all: what follows can be gone on with
            self._checkpoints.wait()
        if stopped:
            assert self._signals.caught is not None
            raise Interrupted(self._signals.caught, step, self.folder)
        if over:
            self._finish(over)

    def _live(self) -> list[tuple[int, Book]]:
        return [(i, book) for i, book in enumerate(self._books) if not book.ended]

    def _log(self) -> None:
        """One line for each arm: the mean over the steps since the last line."""
        found = jax.device_get(self._pending)
        first = self._step - len(found)
        columns = {name: np.stack([numbers[name] for numbers in found]) for name in NUMBERS}  # (steps, arms)
        now = time.perf_counter()
        speeds = self._window_tokens / max(now - self._window - self._away, 1e-9)
        for i, _ in self._live():
            own = {name: column[:, i] for name, column in columns.items()}
            total, weight = math.fsum(own["loss_sum"].tolist()), math.fsum(own["weight"].tolist())
            rate = float(jax.device_get(self.learning_rates[i](self._step - 1)))
            line = {
                "step": self._step, "split": "train", "loss": total / weight if weight else math.nan,
                "learning_rate": rate, "grad_norm": float(own["grad_norm"].mean()),
                "tokens_per_second": float(speeds[i]), "tokens": int(self._tokens[i]), "seconds": now - self._began,
            }  # fmt: skip
            if own["penalty"].any():
                line["penalty"] = float(own["penalty"].mean())
            self._files[i].write(line)
            bad = np.flatnonzero(~(np.isfinite(own["loss_sum"]) & np.isfinite(own["grad_norm"])))
            if bad.size:
                loss = own["loss_sum"][bad[0]] / own["weight"][bad[0]]
                what = f"the loss is {loss} and its gradient's norm {own['grad_norm'][bad[0]]}"
                self._fail(i, first + int(bad[0]) + 1, what)
        self._pending = []
        self.tick(self._step)
        self._start_window()

    def _fail(self, index: int, step: int, what: str) -> None:
        why = (
            f"training diverged: {what} at step {step}. Lower train.learning_rate, add train.warmup or set "
            "train.clip_norm"
        )
        self._books[index].ended = why
        self.ended(index, why)

    def _evaluate(self) -> bool:
        """Evaluates on dev what is not evaluated yet; True if that was done."""
        live = [i for i, book in self._live() if book.evaluated < self._step]
        if "dev" not in self.batches or not live:
            return False
        found = self._gathered("dev", self.state.trainable)
        self._last_dev = (self._step, found)
        improved = np.zeros(len(self.jobs), bool)
        for i in live:
            own, book = found.of_arm(i, len(self.jobs)).evaluation(self.task), self._books[i]
            self._files[i].write(evaluation_record(self._step, "dev", own))
            value = own.metrics[book.best.metric]
            if not math.isfinite(value):
                self._fail(i, self._step, f"{book.best.metric} on dev is {value}")
                continue
            book.evaluated, book.dev = self._step, own.metrics
            improved[i] = book.best.update(self._step, own.metrics)
        if self._kept is not None:
            chosen = jnp.asarray(improved)
            self._kept = jax.tree.map(
                lambda new, old: jnp.where(chosen.reshape(-1, *(1,) * (new.ndim - 1)), new, old),
                self.state.trainable, self._kept,
            )  # fmt: skip
        return True

    def _gathered(self, split: str, trainable: Any) -> evaluate.Gathered:
        began = time.perf_counter()
        arms = (trainable, self.state.own, self.state.shared, self.hyper)
        stop = self._signals.stopped
        found = evaluate.gather(self.program.evaluate, self.variables, arms, self.batches[split], stop=stop)
        self._away += time.perf_counter() - began
        if found is None:
            self._save()
            self._checkpoints.wait()
            assert self._signals.caught is not None
            raise Interrupted(self._signals.caught, self._step, self.folder)
        return found

    def _finish(self, over: Sequence[int]) -> None:
        """Writes the files of arms that have ended well; summary.json, which says so, comes last."""
        best = jnp.asarray([bool(p) for p in self.patience])
        chosen = self.state.trainable
        if self._kept is not None:
            chosen = jax.tree.map(
                lambda new, old: jnp.where(best.reshape(-1, *(1,) * (new.ndim - 1)), old, new), chosen, self._kept
            )
        dev = self._last_dev[1]
        if "dev" in self.batches and self._last_dev[0] != self._step:  # resumed at the very end
            dev = self._gathered("dev", self.state.trainable)
        test = self._gathered("test", chosen) if "test" in self.batches else None
        seconds = time.perf_counter() - self._began
        for i in over:
            self._finish_arm(i, chosen, {"dev": dev, "test": test}, seconds)

    def _finish_arm(self, i: int, chosen: Any, found: Mapping[str, Any], seconds: float) -> None:
        book, job, count = self._books[i], self.jobs[i], len(self.jobs)
        delta = self.pack.delta(chosen, i)
        job.save(job.folder / "adapter", delta)
        at = book.best.step if self.patience[i] and book.best.step is not None else self._step
        metrics: dict[str, dict[str, float]] = {"dev": book.dev, "test": {}}
        for name, gathered in found.items():
            if gathered is None:
                continue
            own = gathered.of_arm(i, count).evaluation(self.task)
            metrics[name] = own.metrics
            if name == "test":
                self._files[i].write(evaluation_record(at, name, own))
            rows = evaluate.predictions(self.task, self.task.prepare(self.splits[name]), own)
            records.write_jsonl(job.folder / "predictions" / f"{name}.jsonl", rows)
        summary = {
            "step": self._step,
            "trainable_params": _count(job.adapter, self.pack.starts[i]),
            "total_params": sum(math.prod(x.shape) for x in trees.flatten(self.variables, is_adapted).values()),
            "seconds": seconds / count,
            "dev": metrics["dev"],
            "test": metrics["test"],
            "best": {"step": book.best.step, "dev": book.best.metrics},
            "saved": "best" if self.patience[i] and book.best.step is not None else "last",
            "arms_together": count,
        }
        records.write_json(job.folder / "summary.json", summary)
        book.ended = "done"
        self.ended(i, "")

    def _save(self) -> None:
        self._log_pending_only()
        meta = {
            "step": self._step, "seconds": time.perf_counter() - self._began, "tokens": self._tokens.tolist(),
            "books": [dataclasses.asdict(book) for book in self._books],
            "pending": [{name: np.asarray(x).tolist() for name, x in numbers.items()} for numbers in self._pending],
        }  # fmt: skip
        self._checkpoints.save(self._step, {"state": self.state, "kept": self._kept}, meta)

    def _log_pending_only(self) -> None:
        """The numbers of steps that no line has yet become host arrays, which a checkpoint can hold."""
        self._pending = jax.device_get(self._pending)

    def _resume(self) -> None:
        steps = self._checkpoints.steps()
        if not steps:
            return
        meta = self._checkpoints.meta(max(steps))
        restored = self._checkpoints.restore(max(steps), {"state": self.state, "kept": self._kept})
        self.state, self._kept = restored["state"], restored["kept"]
        self._step, self._seconds = meta["step"], meta["seconds"]
        self._tokens = np.asarray(meta["tokens"], np.int64)
        self._books = [Book.from_json(book) for book in meta["books"]]
        self._pending = [{n: np.asarray(x, np.float32) for n, x in numbers.items()} for numbers in meta["pending"]]

    def _open(self) -> None:
        """Manifests, and metrics files without what came after the checkpoint; none of arms that have ended."""
        self._files: dict[int, records.MetricsFile] = {}
        for i, (job, book) in enumerate(zip(self.jobs, self._books, strict=True)):
            failed = job.folder / "failure.json"
            if (job.folder / "summary.json").exists():
                book.ended = "done"
            elif failed.exists():
                book.ended = records.read_json(failed)["reason"]
            else:
                book.ended = ""
                manifest.open_run(job.folder / "manifest.json", manifest.collect(job.identity, extra=job.about))
                keep = lambda record, book=book: self._known(record, book)  # noqa: E731
                self._files[i] = records.MetricsFile(job.folder / "metrics.jsonl", keep)

    def _known(self, record: Mapping[str, Any], book: Book) -> bool:
        if record["split"] == "train":
            return record["step"] <= self._step
        return record["split"] == "dev" and record["step"] <= book.evaluated

    def _start_window(self) -> None:
        self._window, self._away = time.perf_counter(), 0.0
        self._window_tokens = np.zeros(len(self.jobs), np.int64)


def _count(adapter: Adapter, delta: Any) -> int:
    mask = jax.tree.leaves(adapter.trainable(delta))
    return sum(leaf.size for leaf, flag in zip(jax.tree.leaves(delta), mask, strict=True) if flag)
