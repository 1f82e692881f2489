"""Ray, for many machines or several accelerators of one: every pack is a task of Ray core.

The machines must share a file system for the work directory, the data and the model, at the same paths, and have the
same checkout there: results travel through the work directory. A pack whose worker dies is started again by Ray, and
goes on from its checkpoint with the arms that have no result yet. Without `address` or RAY_ADDRESS, Ray joins the
cluster of this machine or starts one that ends with the command.
"""

import os
import signal
import socket
import warnings
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lora_jax.ablation
from lora_jax.ablation.arms import Arm
from lora_jax.ablation.running import remote
from lora_jax.ablation.running.launchers import Launch, needed
from lora_jax.errors import UserError

LOOK = 1.0  # seconds between two looks at the directories
ROOT = Path(lora_jax.ablation.__file__).parents[2]  # what a worker imports lora_jax from
LEAVE = 20.0  # seconds that workers have to save after a signal


def ray(
    *, cpus: int = 0, gpus: float = -1.0, retries: int = 3, at_once: int = 0, address: str = ""
) -> Launch:  # fmt: skip
    """A launcher that trains on a Ray cluster.

    Args:
      cpus: cores of a pack. Where it uses no GPU it runs as many threads, which changes float results by rounding.
        0: one where it uses a GPU, else half of the smallest machine's.
      gpus: of a pack; below 1 several share one. -1: one, where the cluster has any.
      retries: how often a pack is started again after its worker died.
      at_once: packs that run at the same time at most; 0 leaves it to the cores and GPUs there are.
      address: of a running cluster; '' is Ray's own choice, RAY_ADDRESS first.

    Raises:
      UserError: Ray is not installed.
    """
    core = needed("ray", "ray")

    def launch(packs: Sequence[Sequence[Arm]], workdir: Path, board: Any) -> None:
        with _Cluster(core, address) as cluster:
            resources = cluster.resources(cpus, gpus)
            board.say(f"ray: {cluster.words()}; a pack has {resources['num_cpus']} cores, {resources['num_gpus']} GPUs")
            train = core.remote(remote.train).options(max_retries=retries, **resources)
            _Tasks(core, train, packs, workdir, board).run(at_once or len(packs))

    return launch


class _Cluster:
    """Ray, started or joined; stopped again if nobody had started it before."""

    def __init__(self, core: Any, address: str):
        self._core, self._address, self._own = core, address, not core.is_initialized()

    def __enter__(self) -> "_Cluster":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        handler = signal.getsignal(signal.SIGTERM)  # Ray takes the signal for itself
        try:
            if self._own:
                self._start()
        except (OSError, RuntimeError, ValueError) as error:
            where = self._address or os.environ.get("RAY_ADDRESS", "this machine")
            raise UserError(f"--launcher=ray: no cluster at {where}: {error}") from None
        finally:
            try:
                signal.signal(signal.SIGTERM, handler)
            except ValueError:  # not the main thread: Ray could not take it either
                pass
        return self

    def _start(self) -> None:
        host, _, port = (self._address or os.environ.get("RAY_ADDRESS", "")).rpartition(":")
        if port.isdigit() and "//" not in host:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        with warnings.catch_warnings():  # Ray forks to start its processes, and does no more in the fork than that
            warnings.filterwarnings("ignore", message=".*os.fork", category=RuntimeWarning)
            self._core.init(
                address=self._address or None, include_dashboard=None if self._address else False,
                log_to_driver=False, logging_level="ERROR",
            )  # fmt: skip

    def __exit__(self, *_) -> None:
        if self._own:
            self._core.shutdown()

    def resources(self, cpus: int, gpus: float) -> dict[str, Any]:
        """The options of a task."""
        nodes = [node["Resources"] for node in self._core.nodes() if node["Alive"]]
        gpus = min(1.0, max(node.get("GPU", 0.0) for node in nodes)) if gpus < 0 else gpus
        cpus = cpus or (1 if gpus else max(1, int(min(node.get("CPU", 1.0) for node in nodes)) // 2))
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
            raise UserError(
                f"--launcher=ray: a pack asks for cpus={cpus}, gpus={gpus:g}, and no machine of the cluster has that; "
                "ask for less with --launcher_options"
            )
        paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        environment = {"PYTHONPATH": os.pathsep.join(paths)}
        if not gpus:
            environment["NPROC"] = str(cpus)  # threads of XLA, which otherwise takes every core it sees
        return {"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": environment}}

    def words(self) -> str:
        """What there is."""
        there = self._core.cluster_resources()
        return f"{len(self._core.nodes())} machines, {there.get('CPU', 0):g} cores, {there.get('GPU', 0):g} GPUs"


class _Tasks:
    """The packs of one grid as tasks."""

    def __init__(self, core: Any, train: Any, packs: Sequence[Sequence[Arm]], workdir: Path, board: Any):
        self._core, self._train, self._workdir, self._board = core, train, workdir, board
        self._waiting = deque(packs)
        self._running: dict[Any, Sequence[Arm]] = {}
        self._watch = remote.Watch(packs, workdir, board)

    def run(self, at_once: int) -> None:
        """Returns when all arms have ended."""
        try:
            while self._waiting or self._running:
                while self._waiting and len(self._running) < at_once:
                    pack = self._waiting.popleft()
                    self._board.start(pack)
                    self._running[self._train.remote(remote.task(pack, self._workdir))] = pack
                ready, _ = self._core.wait(list(self._running), num_returns=1, timeout=LOOK)
                self._watch.look()
                for one in ready:
                    self._close(self._running.pop(one), one)
        except KeyboardInterrupt:
            self._leave()
            raise

    def _close(self, pack: Sequence[Arm], one: Any) -> None:
        """A task has ended; a pack that it did not finish is tried arm by arm, and then it is over."""
        try:
            why = self._core.get(one)
        except self._core.exceptions.RayError as error:
            why = f"the worker died: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self._watch.look()
        left = self._watch.unfinished(pack)
        if left and len(pack) > 1:
            self._board.say(f"a pack of {len(pack)} arms did not end ({why}); its arms are tried one by one")
            self._waiting.extend([arm] for arm in left)
        elif left:
            self._watch.give_up(left, why)

    def _leave(self) -> None:
        """A worker that is told to stop saves first."""
        for one in self._running:
            self._core.cancel(one, force=False)
        if self._running:
            self._core.wait(list(self._running), num_returns=len(self._running), timeout=LEAVE)
