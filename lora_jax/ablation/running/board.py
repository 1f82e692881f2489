"""What is done, running and left of a grid: results.csv, grid.json, and the lines or the table that one watches."""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.ablation import grid_file, results
from lora_jax.ablation.arms import Arm
from lora_jax.ablation.grid_file import GridFile
from lora_jax.ablation.running.execute import FAILURE, SUMMARY, run_folder, status
from lora_jax.ablation.running.expense import COST
from lora_jax.progress import duration
from lora_jax.records import read_json

RESULTS = "results.csv"
Echo = Callable[[str], None]


def row_of(arm: Arm, workdir: Path) -> results.Row:
    """One line of results.csv, from the arm's directory."""
    folder = run_folder(workdir, arm.id)
    state = status(folder)
    row: results.Row = {"arm": arm.id, "label": arm.label, "status": state, "reason": None, **arm.axes}
    if state == "failed":
        row["reason"] = read_json(folder / FAILURE)["reason"]
    if state == "done":
        summary = read_json(folder / SUMMARY)
        row["trainable_params"] = summary["trainable_params"]
        row |= {f"{split}.{name}": value for split in ("dev", "test") for name, value in summary[split].items()}
        row |= {"step": summary["step"], "seconds": summary["seconds"]}
    if state != "missing" and (folder / COST).exists():
        row |= read_json(folder / COST)
    return row


class Board:
    """Keeps the files of a grid true and tells how it goes; a context manager."""

    def __init__(self, arms: Sequence[Arm], workdir: Path, described: GridFile, echo: Echo | None = print):
        """Args:
        arms: all of the grid.
        workdir: of the grid.
        described: what grid.json says, but for the seconds.
        echo: takes lines; None shows nothing. On a terminal the default shows a table that is redrawn.
        """
        self._arms, self._workdir, self._echo = list(arms), Path(workdir), echo
        before = grid_file.read(workdir)
        self._described = dataclasses.replace(described, started=before.started or described.started)
        self._spent_before, self._began = before.seconds or 0.0, time.perf_counter()
        self._left: set[str] = set()
        self._running: dict[str, float] = {}  # arm -> share of its steps
        self._count, self._live = 0, _live() if echo is print and sys.stdout.isatty() else None

    def __enter__(self) -> "Board":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        self.write()
        if self._live is not None:
            self._live.stop()

    def begin(self, packs: Sequence[Sequence[Arm]]) -> None:
        """Tells what will be done."""
        rows = self.write()
        ended = {row["arm"] for row in rows if row["status"] != "missing"}
        self._left = {arm.id for pack in packs for arm in pack} - ended
        done, failed = (sum(row["status"] == name for row in rows) for name in ("done", "failed"))
        self._count, self._began = len(self._left), time.perf_counter()
        self.say(f"{len(rows)} arms: {done} done, {failed} failed, {len(self._left)} to train in {len(packs)} packs")

    def start(self, pack: Sequence[Arm]) -> None:
        """A pack begins."""
        self._running |= {arm.id: 0.0 for arm in pack if arm.id in self._left}
        words = pack[0].label if len(pack) == 1 else f"{len(pack)} arms together: {pack[0].label} ... {pack[-1].label}"
        self.say(f"training {words}")

    def tick(self, step: int, total: int) -> None:
        """What runs in this process has made so many of its steps."""
        self._running = {arm: step / max(1, total) for arm in self._running}
        self._show()

    def ended(self, arm_id: str, why: str) -> None:
        """An arm has ended; its files are there."""
        self._left.discard(arm_id)
        self._running.pop(arm_id, None)
        row = next(row for row in self.write() if row["arm"] == arm_id)
        what = f"failed: {why}" if why else self._score(row)
        self.say(f"{self._count - len(self._left):>4}/{self._count}  {row['label']}  {what}  {self._rest()} left")
        self._show()

    def write(self) -> list[results.Row]:
        """Makes results.csv from the directories of the runs, and grid.json."""
        rows = [row_of(arm, self._workdir) for arm in self._arms]
        axes = list(dict.fromkeys(name for arm in self._arms for name in arm.axes))
        results.write_results(self._workdir / RESULTS, rows, axes)
        seconds = self._spent_before + time.perf_counter() - self._began
        grid_file.write(self._workdir, dataclasses.replace(self._described, seconds=seconds))
        return rows

    def say(self, text: str) -> None:
        """One line."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        elif self._echo is not None:
            self._echo(text)

    def _score(self, row: Mapping[str, Any]) -> str:
        name = self._described.metric
        value = row.get(name or "")
        return f"{name} {value:.4g}" if isinstance(value, (int, float)) else "done"

    def _rest(self) -> str:
        """The time that is left, were all arms alike; packs that ran before this process do not count."""
        made = self._count - len(self._left) + sum(self._running.values())
        spent = time.perf_counter() - self._began
        return duration(spent / made * (self._count - made)) if made else "?"

    def _show(self) -> None:
        if self._live is not None:
            self._live.update(self._table(), refresh=True)

    def _table(self) -> Any:
        from rich.table import Table

        table = Table("done", "running", "left", "steps of the running", "time left", box=None)
        share = sum(self._running.values()) / len(self._running) if self._running else 0.0
        waiting = len(self._left) - len(self._running)
        done = len(self._arms) - len(self._left)
        table.add_row(f"{done}/{len(self._arms)}", str(len(self._running)), str(waiting), f"{share:.0%}", self._rest())
        return table


def _live() -> Any:
    from rich.live import Live

    return Live(auto_refresh=False)
