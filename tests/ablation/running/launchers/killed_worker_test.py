"""Real Ray and real jobs of submitit on this machine: two workers, one of which is killed in the middle of its pack."""

import os
import signal
import time
from pathlib import Path

import pytest

from lora_jax.ablation import results
from tests.ablation import grids

PACKAGES = {"ray": "ray", "slurm": "submitit"}
OPTIONS = {"ray": "cpus=1,at_once=2", "slurm": "cluster=local,cpus=1,at_once=2,poll=0.2"}
# Two packs of two (`most=2`); a step is quick, so that there are many of them to be killed in.
SWEEP = 'product(axis("seed", range(2)), axis("adapter.rank", [1, 2]))'


def parent(pid: int) -> int:
    """0 where a process has gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0


def worker_of(driver: int, arm: Path) -> int | None:
    """The process that trains an arm: it holds the arm's lock, and comes from the driver's own cluster."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            holds = any(os.readlink(fd) == str(arm / ".lock") for fd in (folder / "fd").iterdir())
        except OSError:
            continue
        pid = above = int(folder.name)
        while holds and above > 1:
            above = parent(above)
            if above == driver:
                return pid
    return None


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return grids.world(tmp_path_factory.mktemp("world"), SWEEP, steps=150)


@pytest.fixture(scope="module")
def straight(file):
    """The work directory of the grid without launcher and disturbance."""
    grids.finish(grids.spawn(file, file.parent / "straight", most=2, NPROC="1"))
    return file.parent / "straight"


def kill_one(process, workdir) -> tuple[Path, dict]:
    """Kills a worker in the middle of its pack; returns an arm of the pack, and what had ended by then."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        for metrics in workdir.glob("runs/*/metrics.jsonl"):
            if 10 < metrics.read_text().count("\n") < 70 and (worker := worker_of(process.pid, metrics.parent)):
                os.kill(worker, signal.SIGKILL)
                assert not (metrics.parent / "summary.json").exists(), "too late: the arm had ended"
                return metrics.parent, grids.ended(workdir)
        time.sleep(0.01)
    raise AssertionError("no worker was found in the middle of its pack")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds the worker in /proc")
@pytest.mark.parametrize("launcher", ["ray", pytest.param("slurm", marks=pytest.mark.slow)])
def test_a_killed_worker_is_replaced_and_the_grid_ends_as_undisturbed(file, straight, tmp_path, launcher):
    pytest.importorskip(PACKAGES[launcher], reason=f"needs the extra: pip install 'lora_jax[{launcher}]'")
    workdir, options = tmp_path / "grid", (f"--launcher={launcher}", f"--launcher_options={OPTIONS[launcher]}")
    process = grids.spawn(file, workdir, *options, most=2, cwd=tmp_path, RAY_ADDRESS="local", NPROC="1")
    try:
        arm, before = kill_one(process, workdir)
        out = grids.finish(process)
    finally:
        process.kill()
    after = grids.ended(workdir)
    assert {one: after[one] for one in before} == before
    assert "4 arms done, 0 failed" in out
    assert [row["status"] for row in results.read_results(workdir / "results.csv")] == ["done"] * 4
    resumed = [f for f in workdir.glob("runs/*/manifest.json") if '"resumed"' in f.read_text()]
    assert arm / "manifest.json" in resumed and len(resumed) == 2, "the pack went on from its checkpoint"
    found, wanted = grids.outcome(workdir), grids.outcome(straight)
    assert [key for key in wanted if found[key] != wanted[key]] == []
