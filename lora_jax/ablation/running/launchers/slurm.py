"""SLURM, by submitit: one array, every pack a job of it.

The command waits for the jobs, so run it on a login node, in tmux or in a small job of its own. The machines share the
file system with the work directory, and jobs start in the current directory, which must be the checkout. A job that is
preempted or runs out of time is queued again and goes on from its checkpoint; what jobs print is in `slurm/` in the
work directory.
"""

import contextlib
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_jax.ablation.arms import Arm
from lora_jax.ablation.running import remote
from lora_jax.ablation.running.launchers import Launch, needed
from lora_jax.errors import UserError

LOGS = "slurm"


def slurm(
    *, partition: str = "", minutes: int = 720, cpus: int = 4, gpus: int = 0, memory_gb: float = 0.0, at_once: int = 64,
    account: str = "", qos: str = "", constraint: str = "", retries: int = 3, poll: float = 10.0, cluster: str = "slurm"
) -> Launch:  # fmt: skip
    """A launcher that trains in jobs of SLURM.

    Args:
      partition, account, qos, constraint: as of sbatch; '' leaves it to the cluster.
      minutes: that a job may take; after that it is queued again.
      cpus, gpus: of a pack, on one machine.
      memory_gb: of a pack; 0 leaves it to the cluster.
      at_once: jobs of the array that run at the same time at most.
      retries: how often a pack is started again after its job died or ran out of time.
      poll: seconds between two looks at jobs and directories.
      cluster: of submitit: 'slurm', or 'local' for processes of this machine, to try it out.

    Raises:
      UserError: submitit is not installed, or there is no SLURM.
    """
    submitit = needed("submitit", "slurm")
    absent = [command for command in ("sbatch", "srun") if shutil.which(command) is None]
    if cluster == "slurm" and absent:
        raise UserError(
            f"--launcher=slurm: there is no {absent[0]} on this machine; run the command on a login node of the "
            "cluster, or try it here with --launcher_options=cluster=local"
        )
    if cluster not in ("slurm", "local"):
        raise UserError(f"--launcher_options=cluster={cluster}: expected slurm or local")
    own = {"partition": partition, "account": account, "qos": qos, "constraint": constraint}
    asked: dict[str, Any] = {f"slurm_{name}": value for name, value in own.items() if value}
    asked |= {"timeout_min": minutes, "cpus_per_task": cpus, "gpus_per_node": gpus, "name": "lora_jax"}
    asked |= {"mem_gb": memory_gb} if memory_gb else {}
    asked |= {"slurm_array_parallelism": max(1, at_once)} if cluster == "slurm" else {}

    def launch(packs: Sequence[Sequence[Arm]], workdir: Path, board: Any) -> None:
        executor = submitit.AutoExecutor(
            folder=Path(workdir).absolute() / LOGS, cluster=cluster, slurm_max_num_timeout=retries
        )
        executor.update_parameters(**asked)
        width = len(packs) if cluster == "slurm" else max(1, at_once)  # SLURM itself holds back the rest of an array
        _Jobs(executor, packs, workdir, board, retries).run(width, poll)

    return launch


class Job:
    """What a job calls; submitit asks it for `checkpoint` when the job has to leave its machine."""

    def __call__(self, task: remote.Task) -> str:
        return remote.train(task)

    def checkpoint(self, task: remote.Task) -> Any:
        """What the job does when it is started again: the same, which goes on from the pack's own checkpoint."""
        return needed("submitit", "slurm").helpers.DelayedSubmission(self, task)


class _Jobs:
    """The packs of one grid as jobs."""

    def __init__(self, executor: Any, packs: Sequence[Sequence[Arm]], workdir: Path, board: Any, retries: int):
        self._executor, self._workdir, self._board = executor, workdir, board
        self._waiting = [(pack, retries) for pack in packs]
        self._running: list[tuple[Any, Sequence[Arm], int]] = []
        self._watch = remote.Watch(packs, workdir, board)

    def run(self, width: int, poll: float) -> None:
        """Returns when all arms have ended."""
        try:
            while self._waiting or self._running:
                if self._waiting and len(self._running) < width:
                    self._submit(width - len(self._running))
                time.sleep(poll)
                self._watch.look()
                for job in [job for job in self._running if job[0].done()]:
                    self._running.remove(job)
                    self._close(*job)
        except KeyboardInterrupt:
            for job, _, _ in self._running:
                with contextlib.suppress(Exception):  # one that has just ended, or a queue that does not answer
                    job.cancel()
            raise

    def _submit(self, count: int) -> None:
        now, self._waiting = self._waiting[:count], self._waiting[count:]
        for pack, _ in now:
            self._board.start(pack)
        jobs = self._executor.map_array(Job(), [remote.task(pack, self._workdir) for pack, _ in now])
        self._running += [(job, pack, left) for job, (pack, left) in zip(jobs, now, strict=True)]

    def _close(self, job: Any, pack: Sequence[Arm], retries: int) -> None:
        """A job has ended; a pack that it did not finish is tried again, then arm by arm, and then it is over."""
        error = job.exception()
        why = job.result() if error is None else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self._watch.look()
        left = self._watch.unfinished(pack)
        if not left:
            return
        if retries:
            self._board.say(f"job {job.job_id} did not end its pack ({why}); it is started again")
            self._waiting.append((pack, retries - 1))
        elif len(pack) > 1:
            self._waiting += [([arm], 0) for arm in left]
        else:
            self._watch.give_up(left, f"the job died: {why}")
