"""Work directories of made-up grids, whose effects are known."""

import itertools
from pathlib import Path

import numpy as np

from lora_jax import records
from lora_jax.ablation import grid_file, results

M, T = "dev.accuracy", "test.accuracy"


def cells(**axes):
    """Every combination, seeds fastest: cells(adapter__rank=[1, 4], seed=range(3))."""
    names = [name.replace("__", ".") for name in axes]
    return [dict(zip(names, values)) for values in itertools.product(*axes.values())]


def rows(grid, effect, *, spread=0.005, common=0.01, rng=None, test=False):
    """One finished arm per cell: an accuracy of what a seed does to all, the cell's effect, and what else happens.

    Args:
      grid: cells with a seed each.
      effect: cell -> true accuracy, None for an arm that failed.
      spread: standard deviation of each arm.
      common: of what a seed does to all arms.
      rng: of numpy.
      test: a test accuracy too, with the same effect and spread of its own.
    """
    rng = rng or np.random.default_rng(0)
    shared = {cell["seed"]: rng.normal(0, common) for cell in grid}
    out = []
    for i, cell in enumerate(grid):
        true = effect(cell)
        row = {"arm": f"a{i:04d}", "label": f"arm {i}", "status": "done", "reason": None, **cell}
        row["trainable_params"] = size(cell)
        if true is None:
            row |= {"status": "failed", "reason": "diverged: the loss is NaN at step 12"}
        else:
            row[M] = float(true + shared[cell["seed"]] + rng.normal(0, spread))
            row |= {T: float(true + shared[cell["seed"]] + rng.normal(0, spread))} if test else {}
            row |= {"dev.loss": 1.2 - row[M], "seconds": 60.0 + i % 7}
        out.append(row)
    return out


def size(cell):
    layers = {"all": 6, "last:1": 1, "last:3": 3}.get(str(cell.get("adapter.layers", "all")), 1)
    method = {"lora": 1, "full": 150, "head": 0.05}.get(cell.get("adapter.method", "lora"), 0.7)
    return round(3072 * (cell.get("adapter.rank") or 8) * layers * method)


def write(folder: Path, table, curves=True, **about):
    """results.csv, grid.json and learning curves that end where the rows say."""
    results.write_results(folder / "results.csv", table)
    axes = [name for name in results.columns(table) if results.is_axis(name)]
    arms = [{"id": row["arm"], "label": row["label"], "axes": {n: row.get(n) for n in axes}} for row in table]
    said = dict(question="Which choice is best?", command="python -m experiments.ablate --config=x.py", metric=M)
    said |= {"axes": axes, "arms": arms, "examples": {"dev": 872, "test": 1821}, **about}
    grid_file.write(folder, grid_file.GridFile(**said))
    for row in table if curves else []:
        if row["status"] == "done":
            steps = [
                {"step": s, "split": "dev", "accuracy": row[M] - 0.3 * 0.985**s, "loss": 0.4}
                for s in range(30, 301, 30)
            ]
            records.write_jsonl(folder / "runs" / row["arm"] / "metrics.jsonl", steps)
    return folder


RANK_GRID = cells(adapter__rank=[1, 2, 4, 8, 16, 32], adapter__layers=["last:1", "last:3", "all"], seed=range(3))
METHODS = ["lora", "full", "head", "bitfit", "ia3", "vera", "dora", "adalora", "loha", "lokr"]
METHOD_GRID = cells(adapter__method=METHODS, train__learning_rate=[3e-4, 1e-3, 3e-3, 1e-2], seed=range(3))
MAP_GRID = cells(
    adapter__layers=[[i] for i in range(6)], adapter__targets=["q", "k", "v", "o", "up", "down"], seed=range(3)
)


def rank_effect(cell):
    return 0.83 + 0.006 * np.log2(cell["adapter.rank"]) * (0.3 if cell["adapter.rank"] > 8 else 1) + {
        "last:1": -0.03, "last:3": 0.0, "all": 0.01}[cell["adapter.layers"]]  # fmt: skip


def method_effect(cell):
    method, rate = cell["adapter.method"], cell["train.learning_rate"]
    best = {"full": 3e-4, "ia3": 1e-2, "head": 3e-3}.get(method, 1e-3)
    if method == "full" and rate == 1e-2:
        return None
    return {"head": 0.71, "bitfit": 0.82, "ia3": 0.80}.get(method, 0.845) - 0.03 * abs(np.log10(rate / best))


def map_effect(cell):
    return 0.78 + 0.01 * cell["adapter.layers"][0] + {"v": 0.02, "o": 0.015}.get(cell["adapter.targets"], 0)
