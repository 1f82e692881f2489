"""What ends a run before its last step: no improvement, a loss that is not finite, a signal."""

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class Interrupted(Exception):
    """A signal stopped the run, after its checkpoint was saved. `code` is what the process should exit with.

    `step` is None where no run was at work: between the runs of an ablation, or while they run elsewhere.
    """

    def __init__(self, number: int, step: int | None, workdir: str | Path):
        self.signal, self.step, self.code = number, step, 128 + number
        name = signal.Signals(number).name
        where = f"; what is done is in {workdir}" if step is None else f" at step {step}; saved in {workdir}"
        super().__init__(f"stopped by {name}{where}. Run the same command to go on")


class Diverged(Exception):
    """The loss or its gradient is not finite. `checkpoint` is the last good one's step, or None; `code` is 3."""

    code = 3

    def __init__(self, step: int, what: str, checkpoint: int | None, folder: str | Path):
        self.step, self.checkpoint, self.folder = step, checkpoint, Path(folder)
        good = f"the last good checkpoint is {self.folder / str(checkpoint)}"
        super().__init__(
            f"training diverged: {what} at step {step}; "
            f"{good if checkpoint is not None else 'there is no checkpoint from before'}. "
            "Lower train.learning_rate, add train.warmup or set train.clip_norm"
        )


@dataclasses.dataclass
class Best:
    """The best evaluation so far, and how many have come since.

    Attributes:
      metric: name of the metric that decides.
      mode: 'min' or 'max'.
      step: of the best evaluation; None before the first.
      metrics: of the best evaluation.
      since: evaluations without improvement since then.
    """

    metric: str
    mode: str
    step: int | None = None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    since: int = 0

    def update(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Takes an evaluation; True if it is the best so far (of equals the first stays)."""
        new = metrics[self.metric]
        old = self.metrics.get(self.metric)
        if old is None or (new < old if self.mode == "min" else new > old):
            self.step, self.metrics, self.since = step, dict(metrics), 0
            return True
        self.since += 1
        return False


@contextlib.contextmanager
def interrupted_by_signals(workdir: str | Path) -> Iterator[None]:
    """Inside `with`, SIGINT and SIGTERM raise `Interrupted` where no `Signals` takes them."""
    caught = signal.SIGINT

    def handle(number: int, frame: Any) -> None:
        nonlocal caught
        del frame
        caught = signal.Signals(number)
        raise KeyboardInterrupt  # no `except Exception` on the way up may take it for an error of its own

    old = {}
    if threading.current_thread() is threading.main_thread():
        old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(caught, None, workdir) from None
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class Signals:
    """Inside `with`, SIGINT and SIGTERM only set `caught`; a second SIGINT ends the process at once."""

    def __init__(self):
        self.caught: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        # Python delivers signals to the main thread alone, and lets no other install a handler.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def stopped(self) -> bool:
        """True once a signal came."""
        return self.caught is not None

    def _handle(self, number: int, frame: Any) -> None:
        del frame
        if self.caught is not None and number == signal.SIGINT:
            os._exit(128 + number)
        self.caught = self.caught or number
