"""What a run shows while it trains: a bar with loss, speed and time left on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

Echo = Callable[[str], None]


def line(record: Mapping[str, Any], total: int) -> str:
    """One record as a line: `step 50/300  train  loss 0.5123  12,345 tokens/s`."""
    parts = [f"step {record['step']}/{total}", f"{record['split']:<5}"]
    for name, value in record.items():
        if name in ("step", "split", "seconds", "tokens", "grad_norm", "penalty"):
            continue
        if name == "tokens_per_second":
            parts.append(f"{value:,.0f} tokens/s")
        elif isinstance(value, float):
            parts.append(f"{name.replace('_', ' ')} {value:.4g}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """75 -> '1:15', 3700 -> '1:01:40'."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """Shows the steps of one run; a context manager.

    The bar redraws itself in a thread of its own and is told nothing but numbers that the host already has, so it
    costs the loop no wait for a device.
    """

    def __init__(self, total: int, start: int = 0, echo: Echo | None = print):
        """Args:
        total: steps of the run.
        start: step that it starts from.
        echo: takes the lines; None shows nothing. The bar appears only with the default, on a terminal.
        """
        self._total, self._echo, self._bar, self._task = total, echo, None, None
        self._start, self._began = start, time.perf_counter()
        if echo is print and sys.stdout.isatty():
            self._bar = _bar()
            self._task = self._bar.add_task("", total=total, completed=start, loss="", speed="")

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def show(self, record: Mapping[str, Any]) -> None:
        """Shows a record: training in the bar or as a line with the time left, evaluations always as a line."""
        if record["split"] != "train":
            self.say(line(record, self._total))
        elif self._bar is not None:
            self._bar.update(
                self._task, loss=f"loss {record['loss']:.4f}", speed=f"{record['tokens_per_second']:,.0f} tokens/s"
            )
        else:
            self.say(f"{line(record, self._total)}  {self._left(record['step'])} left")

    def say(self, text: str) -> None:
        """Shows a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._echo is not None:
            self._echo(text)

    def _left(self, step: int) -> str:
        done = max(1, step - self._start)
        return duration((time.perf_counter() - self._began) / done * (self._total - step))


def _bar() -> Any:
    from rich import progress as rich

    return rich.Progress(
        rich.BarColumn(), rich.MofNCompleteColumn(), rich.TextColumn("{task.fields[loss]}"),
        rich.TextColumn("{task.fields[speed]}"), rich.TimeRemainingColumn(), rich.TimeElapsedColumn(),
    )  # fmt: skip
