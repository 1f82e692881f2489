"""Runs one side in a process of its own, on the threads and with the environment that all sides share."""

import importlib.metadata
import json
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from experiments import environment
from experiments.benchmarks.row import ROOT, Side

ABSENT = 77  # the exit code of a side that lacks something here, such as torch with CUDA


class Machine(NamedTuple):
    """What every process gets.

    Attributes:
      threads: cores and threads that it may use.
      huge_pages: whether glibc asks for huge pages; for the peers as for us.
      accelerator: whether JAX may use one; False pins it to the CPU.
      minutes: after which a process is stopped.
      cache: where all sides keep compiled programs, if in one place; else each run begins without any.
    """

    threads: int
    huge_pages: bool
    accelerator: bool
    minutes: float
    cache: Path | None = None

    def settings(self) -> dict[str, Any]:
        """As the CSV has it."""
        return {"threads": self.threads, "huge_pages": self.huge_pages}


class Ended(NamedTuple):
    """What a process measured, or why it did not; `absent` where something that it needs is not here."""

    values: dict[str, float]
    failure: str = ""
    absent: bool = False


def run(side: Side, repeat: int, folder: Path, machine: Machine) -> Ended:
    """Runs a side once.

    Args:
      side: what to run.
      repeat: its number; 0 is a run that warms up.
      folder: of this side; `scratch` in it is emptied first, `cache` keeps compiled programs of a warm side.
      machine: threads and environment.

    Returns:
      The values that the process wrote, and of every process `wall_seconds`, `max_rss_bytes` and the
      `load_average` of the machine just before it began.
    """
    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    cache = machine.cache or (folder / "cache" if side.warm else scratch / "cache")
    result, log = scratch / "result.json", scratch / "log"
    argv = [part.replace("{scratch}", str(scratch)).replace("{repeat}", str(repeat)) for part in side.argv]
    env = variables(machine, cache, result)
    load = os.getloadavg()[0]
    with open(log, "wb") as out:
        code, wall, peak = _timed(argv, env, out, machine)
    if code:
        return Ended({}, _why(code, log, machine), absent=code == ABSENT)
    values = json.loads(result.read_text()) if result.exists() else {}
    try:
        values |= side.read(scratch, wall) if side.read else {}
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        return Ended({}, f"its results cannot be read: {error}")
    return Ended({"wall_seconds": wall, "max_rss_bytes": peak, "load_average": load, **values})


def variables(machine: Machine, cache: Path, result: Path) -> dict[str, str]:
    """The environment of a process."""
    env = {**os.environ, "BENCHMARK_SPAWNED": repr(time.time()), "BENCHMARK_RESULT": str(result)}
    env |= {name: str(machine.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC")}
    # What commands keep by themselves (lora_jax.kept), in a place of the side's own: programs of any size, tokenizers.
    env |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env |= {"XDG_CACHE_HOME": str(cache / "kept")}
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
    env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    env[environment.TUNABLES] = f"{environment.SETTING}={int(machine.huge_pages)}"  # our commands leave it as it is
    env["BENCHMARK_ACCELERATOR"] = str(int(machine.accelerator))
    if not machine.accelerator:
        env |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return env


def versions(side: Side) -> dict[str, str]:
    """Versions of the packages that a side is measured with."""
    out = {}
    for name in side.needs:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def _timed(argv: list[str], env: dict[str, str], out: Any, machine: Machine) -> tuple[int, float, int]:
    """(exit code, seconds, most memory of the process or one that it started)."""
    cores = os.sched_getaffinity(0)
    began = time.perf_counter()
    os.sched_setaffinity(0, sorted(cores)[: machine.threads])  # of this thread; the process inherits it
    try:
        process = subprocess.Popen(
            argv, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    finally:
        os.sched_setaffinity(0, cores)
    late = threading.Timer(60 * machine.minutes, lambda: os.killpg(process.pid, signal.SIGKILL))
    late.start()
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    finally:
        late.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, time.perf_counter() - began, _bytes(usage)


def _bytes(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss * 1024  # Linux counts in kilobytes


def _why(code: int, log: Path, machine: Machine) -> str:
    """The last thing that a failed process said."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if code == -9:
        lines.append(f"it was killed: out of memory, or longer than {machine.minutes:g} minutes")
    return (lines[-1] if lines else f"exit code {code}")[:300]
