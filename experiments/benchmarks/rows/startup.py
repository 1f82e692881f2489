"""From the command to the first step of `experiments.train` whose numbers are known, everything compiled before.

Next to it, what importing torch and PEFT alone takes.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from experiments import environment
from experiments.benchmarks import sentences
from experiments.benchmarks.row import ROOT, TORCH, Claim, Plan, Row, Side
from experiments.benchmarks.row import ours as our_side

SUITE = "cpu"


def row(plan: Plan) -> Row:
    flags = sentences.flags(plan, train__steps=sentences.steps(plan, 300), train__log_every=1)
    flags["workdir"] = "{scratch}/run"
    imports = Side("peft_import", (sys.executable, "-c", "import torch, peft"), {}, needs=TORCH, read=_read)
    claims = (
        Claim("seconds to the first step's numbers, compiled before", "ready_seconds", target=("<=", 6.0)),
        Claim("the same, as a share of `import torch, peft`", "ready_seconds", "ours", "peft_import", "share"),
    )
    return Row((our_side("startup", {"flags": flags}, warm=True), imports), claims)


def ours(settings: dict[str, Any]) -> dict[str, float]:
    """Starts the command, waits for the first line of metrics.jsonl, and stops it."""
    metrics = Path(os.environ["BENCHMARK_RESULT"]).parent / "run" / "metrics.jsonl"
    argv = [f"--{name}={value}" for name, value in settings["flags"].items()]
    env = dict(os.environ)
    if env[environment.TUNABLES] == f"{environment.SETTING}=1":
        del env[environment.TUNABLES]  # the command asks for huge pages itself, and the time that takes is its own
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "experiments.train", *argv], cwd=ROOT, env=env)
    try:
        while not (metrics.exists() and b"\n" in metrics.read_bytes()):
            if process.poll() is not None:
                raise RuntimeError(f"experiments.train ended with {process.returncode} before its first step")
            time.sleep(0.005)
        seconds = time.perf_counter() - began
        assert json.loads(metrics.read_text().splitlines()[0])["step"] == 1
    finally:
        process.kill()
        process.wait()
    return {"ready_seconds": seconds}


def _read(scratch: Path, seconds: float) -> dict[str, float]:
    del scratch
    return {"ready_seconds": seconds}
