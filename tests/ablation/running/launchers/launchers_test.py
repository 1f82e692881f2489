"""Launchers by name and by options as text; what is missing is said before anything trains."""

import sys
import types

import pytest

from lora_jax.ablation.running import launchers
from lora_jax.ablation.running.launchers import ray, slurm
from lora_jax.errors import UserError
from tests import commands
from tests.ablation import grids


def test_the_folder_is_the_list():
    assert launchers.launchers() == ["local", "ray", "slurm"]
    assert launchers.make("local") is launchers.get("local")()


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("slurn", [], "--launcher=slurn: there is no such launcher; did you mean 'slurm'"),
        ("slurm", ["partitoin=gpu"], "the launcher 'slurm' has no option 'partitoin'; did you mean 'partition'"),
        ("slurm", ["gpus"], "--launcher_options=gpus: expected name=value, such as partition=..."),
        ("slurm", ["gpus=two"], "--launcher_options=gpus=two: expected a whole number, 0 or more"),
        ("ray", ["gpus=half"], "--launcher_options=gpus=half: expected a number, 0 or more"),
        ("ray", ["cpus=-2"], "--launcher_options=cpus=-2: expected a whole number, 0 or more"),
        ("local", ["cpus=2"], "the launcher 'local' has no option 'cpus'"),
    ],
)
def test_a_wrong_name_or_option_is_said(name, options, message):
    with pytest.raises(UserError) as info:
        launchers.make(name, options)
    assert message in str(info.value)


def test_options_are_read_as_their_types(monkeypatch):
    seen = {}

    def slurm(*, partition: str = "", minutes: int = 720, memory_gb: float = 0.0):
        seen.update(partition=partition, minutes=minutes, memory_gb=memory_gb)

    monkeypatch.setattr(launchers, "get", lambda name: slurm)
    launchers.make("slurm", ["partition=a=b", " minutes = 60"])
    assert seen == {"partition": "a=b", "minutes": 60, "memory_gb": 0.0}


@pytest.mark.parametrize("name, package", [("ray", "ray"), ("slurm", "submitit")])
def test_without_the_package_the_line_to_install_it(capsys, tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    file = grids.world(tmp_path)
    ended = commands.command(capsys, "ablate", f"--config={file}", f"--workdir={tmp_path / 'x'}", f"--launcher={name}")
    assert ended.code == 2 and ended.err.count("\n") == 1
    assert f"needs the package {package}" in ended.err and f"pip install 'lora_jax[{name}]'" in ended.err
    assert not (tmp_path / "x").exists()


def test_slurm_needs_slurm(monkeypatch):
    pytest.importorskip("submitit", reason="needs the extra `slurm`")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="there is no sbatch on this machine; .* --launcher_options=cluster=local"):
        slurm.slurm()
    with pytest.raises(UserError, match="cluster=lokal: expected slurm or local"):
        slurm.slurm(cluster="lokal")


def test_slurm_gets_one_array_with_what_was_asked_for(monkeypatch, tmp_path):
    pytest.importorskip("submitit", reason="needs the extra `slurm`")
    for name in ("sbatch", "srun"):  # takes the job and runs nothing
        (tmp_path / name).write_text(f'#!/bin/sh\ncp "$1" {tmp_path}/submitted\necho "Submitted batch job 12"\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(slurm._Jobs, "run", lambda self, width, poll: self._submit(width))
    options = ["partition=gpu", "account=us", "minutes=60", "gpus=1", "cpus=3", "memory_gb=32", "at_once=2"]
    started, packs = [], [[types.SimpleNamespace(id=name)] for name in "abc"]
    board = types.SimpleNamespace(start=started.append)
    launchers.make("slurm", options)(packs, tmp_path / "grid", board)
    wanted = ("partition=gpu", "account=us", "time=60", "gpus-per-node=1", "cpus-per-task=3", "mem=32GB", "array=0-2%2")
    lines = (tmp_path / "submitted").read_text().splitlines()
    assert [one for one in wanted if f"#SBATCH --{one}" not in lines] == []
    assert started == packs and not any("qos" in line for line in lines), "what was not asked for is the cluster's"


class Core:
    """A Ray cluster of two machines that are not there."""

    def __init__(self, *machines):
        self.machines = [{"Alive": True, "Resources": one} for one in machines]

    def is_initialized(self):
        return True

    def nodes(self):
        return self.machines


def resources(core, cpus=0, gpus=-1.0):
    return ray._Cluster(core, "").resources(cpus, gpus)


def test_a_pack_takes_half_of_the_smallest_machine_or_one_gpu():
    found = resources(Core({"CPU": 16.0}, {"CPU": 6.0}))
    assert (found["num_cpus"], found["num_gpus"]) == (3, 0)
    assert found["runtime_env"]["env_vars"]["NPROC"] == "3", "as many threads as cores it asked for"
    found = resources(Core({"CPU": 16.0}, {"CPU": 6.0, "GPU": 2.0}))
    assert (found["num_cpus"], found["num_gpus"]) == (1, 1) and "NPROC" not in found["runtime_env"]["env_vars"]
    assert resources(Core({"CPU": 1.0}))["num_cpus"] == 1
    assert resources(Core({"CPU": 8.0, "GPU": 1.0}), cpus=4, gpus=0.5)["num_gpus"] == 0.5


def test_more_than_any_machine_has_is_said_and_not_waited_for():
    with pytest.raises(UserError, match="asks for cpus=9, gpus=0, and no machine of the cluster has that"):
        resources(Core({"CPU": 8.0}, {"CPU": 8.0}), cpus=9)


def test_a_cluster_that_is_not_there(capsys, tmp_path):
    pytest.importorskip("ray", reason="needs the extra `ray`")
    file, options = grids.world(tmp_path), "--launcher_options=address=127.0.0.1:1"
    ended = commands.command(
        capsys, "ablate", f"--config={file}", f"--workdir={tmp_path / 'x'}", "--launcher=ray", options
    )
    assert ended.code == 2 and "--launcher=ray: no cluster at 127.0.0.1:1" in ended.err
