"""What an arm cost: cost.json, added up over all processes that worked on it.

Written at the log lines of a run, when a signal stops it and at its end, so a process that is killed counts up to its
last line. A pack's time is shared evenly by its arms.
"""

import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax import records

COST = "cost.json"
EVERY = 2.0  # seconds between two writings, at least


class Expense:
    """The cost of the arms of one pack, in this process and those before."""

    def __init__(self, folders: Mapping[str, Path], count: int):
        """Args:
        folders: {arm id: its run's directory} of the arms that have no end yet.
        count: arms of the pack.
        """
        self._folders, self._count, self._began, self._written = dict(folders), count, time.perf_counter(), 0.0
        self._before = {one: _read(folder) for one, folder in folders.items()}

    def note(self, least: float = 0.0) -> None:
        """Writes what all arms that go on have cost so far, unless that was done `least` seconds ago or later."""
        if time.perf_counter() - self._written >= least:
            self._written = time.perf_counter()
            for arm_id in self._folders:
                self._write(arm_id)

    def close(self, arm_id: str) -> None:
        """An arm has ended."""
        self._write(arm_id)
        self._folders.pop(arm_id, None)

    def _write(self, arm_id: str) -> None:
        folder, before = self._folders[arm_id], self._before[arm_id]
        seconds = before.get("seconds", 0.0) + (time.perf_counter() - self._began) / self._count
        peak = max(before.get("peak_memory_mb", 0.0), _peak_memory_mb())
        found = {"seconds": seconds, "peak_memory_mb": peak, "arms_together": self._count}
        lines = [line for line in records.read_jsonl(folder / "metrics.jsonl") if line["split"] == "train"]
        if lines:
            found["tokens_per_second"] = lines[-1]["tokens_per_second"]
        records.write_json(folder / COST, found)


def _peak_memory_mb() -> float:
    """Of this process, so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def _read(folder: Path) -> dict[str, Any]:
    return records.read_json(folder / COST) if (folder / COST).exists() else {}
