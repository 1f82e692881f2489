"""What launchers of other processes share: the function that a worker runs, and the driver's watch over its files.

Work directory, data and model are on a file system that driver and workers share; results travel through it and not
through the launcher. So a worker that is started again finds how far the last one came, and a driver that is started
again finds what has ended without it.
"""

import atexit
import dataclasses
import functools
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_jax import kept
from lora_jax.ablation.arms import Arm
from lora_jax.ablation.running.claims import claimed
from lora_jax.ablation.running.execute import FAILURE, execute, run_folder, status
from lora_jax.kept import Kept
from lora_jax.records import read_json, write_json
from lora_jax.stopping import Interrupted


@dataclasses.dataclass(frozen=True)
class Task:
    """A pack for a worker; plain values, which can be pickled.

    Attributes:
      arms: of the pack.
      workdir: of the ablation; absolute.
      folder: the driver's current directory, which relative paths of data and models start from.
      kept: where compiled programs and tokenizers are.
    """

    arms: tuple[Arm, ...]
    workdir: str
    folder: str
    kept: Kept


def task(pack: Sequence[Arm], workdir: Path) -> Task:
    """The task of a pack."""
    return Task(tuple(pack), str(Path(workdir).absolute()), os.getcwd(), kept.used())


def train(task: Task) -> str:
    """Trains a pack in a worker process, or what is left of it.

    Returns:
      '', or what stopped it before its end. Arms that fail are no error: their directories say so.
    """
    os.chdir(task.folder)
    logging.getLogger("jax").setLevel(logging.WARNING)
    kept.use(task.kept)
    try:
        with claimed(Path(task.workdir), [arm.id for arm in task.arms]):
            execute(task.arms, Path(task.workdir), scratch=_scratch())
    except Interrupted as stopped:
        return str(stopped)
    return ""


@functools.cache
def _scratch() -> Path:
    """A folder of this process on this machine: two processes must not map one file."""
    folder = tempfile.mkdtemp(prefix="lora_jax_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


class Watch:
    """Tells the board of arms that have ended in other processes."""

    def __init__(self, packs: Sequence[Sequence[Arm]], workdir: Path, board: Any):
        self._workdir, self._board = workdir, board
        self._left = [arm.id for pack in packs for arm in pack if self.missing(arm.id)]

    def look(self) -> None:
        """Looks at the directories once."""
        for arm in [arm for arm in self._left if not self.missing(arm)]:
            self._left.remove(arm)
            self._board.ended(arm, self._why(arm))

    def missing(self, arm_id: str) -> bool:
        """Whether an arm has no end yet."""
        return status(run_folder(self._workdir, arm_id)) == "missing"

    def unfinished(self, pack: Sequence[Arm]) -> list[Arm]:
        """The arms of a pack that have no end yet."""
        return [arm for arm in pack if self.missing(arm.id)]

    def give_up(self, pack: Sequence[Arm], why: str) -> None:
        """A worker died for good: its arms without an end are failed arms."""
        for arm in self.unfinished(pack):
            write_json(run_folder(self._workdir, arm.id) / FAILURE, {"reason": why})
        self.look()

    def _why(self, arm_id: str) -> str:
        file = run_folder(self._workdir, arm_id) / FAILURE
        return read_json(file)["reason"] if file.exists() else ""
