"""A small grid with every kind of end, and the real command that trains it in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

from lora_jax import records
from lora_jax.ablation import results
from tests import commands

ROOT = Path(__file__).parents[2]
PAIRS = [{"prompt": f"count {i % 4}", "completion": f"{i % 4} and {i % 4 + 1}"} for i in range(12)]
TIMES = ("seconds", "tokens_per_second", "peak_memory_mb")

CONFIG = """'''Which rank and which learning rate?'''
from lora_jax import config
from lora_jax.ablation import axis, product, zipped

def get_config():
    cfg = config.default()
    cfg.model.path, cfg.data.path = {model!r}, {data!r}
    cfg.data.max_length = 32
    cfg.adapter.targets = "q,v"
    cfg.train.steps, cfg.train.batch_size, cfg.train.eval_batch_size = {steps}, 4, 4
    cfg.train.eval_every, cfg.train.checkpoint_every, cfg.train.log_every = 8, 3, 2
    return cfg

def sweep():
    return {sweep}
"""
# Two packs of 4 (see `spawn`). In each: one arm that stops early, one that diverges, two that go on to the end.
ENDS = """product(
        axis("seed", range(2)),
        zipped(axis("adapter.rank", [1, 2, 2, 4]), axis("train.learning_rate", [1e-2, 1e38, 1e-9, 2e-2]),
               axis("train.patience", [0, 0, 1, 0])),
    )"""


def world(folder: Path, sweep: str = ENDS, steps: int = 40) -> Path:
    """A model, data and the config file of a grid over them; returns the file."""
    model, data = folder / "model", folder / "data"
    if not model.exists():
        commands.make_model(model)
        commands.write(data, train=PAIRS, dev=PAIRS[:4], test=PAIRS[4:7])
    file = folder / "grid.py"
    file.write_text(CONFIG.format(model=str(model), data=str(data), steps=steps, sweep=sweep))
    return file


def spawn(
    file: Path, workdir: Path, *more: str, most: int = 4, cwd: Path = ROOT, **environment: str
) -> subprocess.Popen:
    """`python -m experiments.ablate` as a process.

    Compiled programs are shared by all that have one config file, and by nobody else: some of them are killed.
    """
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(file.parent / "cache")}
    env |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    line = [
        sys.executable,
        "-m",
        "experiments.ablate",
        f"--config={file}",
        f"--workdir={workdir}",
        f"--arms_together={most}",
        *more,
    ]
    return subprocess.Popen(
        line, cwd=cwd, env={**env, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen, seconds: float = 240) -> str:
    """What a process printed; it must end well."""
    out = process.communicate(timeout=seconds)[0]
    assert process.returncode == 0, out
    return out


def lines(workdir: Path) -> int:
    """How far a grid is: lines of all metrics files."""
    return sum(file.read_text().count("\n") for file in workdir.glob("runs/*/metrics.jsonl"))


def ended(workdir: Path) -> dict[str, tuple]:
    """What must never change again: of every arm with an end, its files with their content and time of change."""
    out = {}
    for folder in workdir.glob("runs/*"):
        if (folder / "summary.json").exists() or (folder / "failure.json").exists():
            files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in (".lock", "cost.json")]
            out[folder.name] = tuple((str(p.relative_to(folder)), p.stat().st_mtime_ns, p.read_bytes()) for p in files)
    return out


def outcome(workdir: Path) -> dict[str, object]:
    """All that a grid leaves, times and speeds aside."""
    out: dict[str, object] = {}
    for row in results.read_results(workdir / "results.csv"):
        folder = workdir / "runs" / row["arm"]
        out[row["arm"], "row"] = {k: v for k, v in row.items() if k not in TIMES}
        out[row["arm"], "metrics"] = [
            {k: v for k, v in one.items() if k not in TIMES} for one in records.read_jsonl(folder / "metrics.jsonl")
        ]
        for file in [*folder.glob("predictions/*"), *folder.glob("adapter/*.safetensors")]:
            out[row["arm"], file.name] = file.read_bytes()
    return out
