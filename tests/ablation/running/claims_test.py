"""An arm has one process at a time, and a process that dies lets go."""

import os
import signal
import subprocess
import sys

from lora_jax.ablation.running.claims import claimed
from tests.ablation.grids import ROOT

HOLD = """
import sys
from pathlib import Path
from lora_jax.ablation.running.claims import claimed
with claimed(Path(sys.argv[1]), ["b", "a"]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_waits_until_the_first_is_gone(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "held\n"
    with claimed(tmp_path, ["c"], say=lambda text: (_ for _ in ()).throw(AssertionError(text))):
        pass
    said = []

    def say(text):
        said.append(text)
        assert first.poll() is None
        first.send_signal(signal.SIGKILL)  # only now can the lock be had

    with claimed(tmp_path, ["b", "c"], say):
        first.wait(30)
    assert said == [f"another process is training {tmp_path / 'runs' / 'b'}; waiting for it to end"]
