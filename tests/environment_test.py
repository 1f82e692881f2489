"""The environment of a command, in real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import environment

COMMAND = """
import os, sys
print("started", os.getpid(), flush=True)
from experiments import environment
environment.prepare(__name__)
print(environment.huge_pages(), sys.argv[1:], os.environ.get("GLIBC_TUNABLES"))
"""


def run(tmp_path, *arguments, tunables=None):
    """What a command printed, line by line."""
    file = tmp_path / "command.py"
    file.write_text(COMMAND)
    env = {k: v for k, v in os.environ.items() if k != environment.TUNABLES} | {"PYTHONPATH": os.getcwd()}
    env |= {environment.TUNABLES: tunables} if tunables else {}
    command = [sys.executable, str(file), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.skipif(not environment._can_help(), reason="huge pages are not to be had by asking here")
def test_a_command_starts_again_once_with_huge_pages_and_its_arguments(tmp_path):
    first, again, end = run(tmp_path, "--a=b c", tunables="glibc.malloc.perturb=0")
    assert first == again  # the same process
    assert end == "True ['--a=b c'] glibc.malloc.perturb=0:glibc.malloc.hugetlb=1"


@pytest.mark.parametrize("arguments, tunables", [(("--nohuge_pages",), None), ((), "glibc.malloc.hugetlb=0")])
def test_it_does_not_where_told(tmp_path, arguments, tunables):
    (end,) = run(tmp_path, *arguments, tunables=tunables)[1:]
    assert end.endswith(f" {list(arguments)} {tunables}")


def test_no_two_commands_define_one_flag():
    """They share a process in tests and in notebooks."""
    names = [p.stem for p in (Path(environment.__file__).parent).glob("*.py")]
    command = "\n".join(f"import experiments.{name}" for name in sorted(names))
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
