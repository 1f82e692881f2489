"""A whole grid: plan, skip what is done, launch what is missing.

The directories of the runs are the truth: an arm is done if its summary.json is there, failed if its failure.json is.
`results.csv` is made from them anew whenever an arm ends, so it can never disagree with them.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import models
from lora_jax.ablation import results
from lora_jax.ablation.arms import Arm
from lora_jax.ablation.grid_file import GridFile
from lora_jax.ablation.running import launchers, planner
from lora_jax.ablation.running.board import Board, Echo
from lora_jax.ablation.running.execute import FAILURE, pack_folder, run_folder, status
from lora_jax.ablation.running.mixed import draws
from lora_jax.assemble import delta_shapes, load_data, make_adapter, make_task, model_path
from lora_jax.errors import UserError
from lora_jax.records import read_json, write_json
from lora_jax.settings import Config
from lora_jax.stopping import interrupted_by_signals


def run(
    arms: Sequence[Arm],
    workdir: Path,
    described: GridFile,
    *,
    launch: launchers.Launch | None = None,
    most: int = planner.MOST,
    memory: float | None = None,
    shapes: "Shapes | None" = None,
    retry: bool = False,
    echo: Echo | None = print,
) -> list[results.Row]:
    """Trains every arm that has no result yet.

    Args:
      arms: of `expand`.
      workdir: of the ablation.
      described: for grid.json.
      launch: trains packs; None does it in this process, one after the other.
      most: arms of a pack.
      memory: bytes that a pack may use beside the base; None is `usual_memory`.
      shapes: what is known of models and data already.
      retry: trains failed arms again, where a worker died or a disk was full.
      echo: takes what is shown.

    Returns:
      The rows of results.csv.

    Raises:
      Interrupted: a signal came; the same command goes on.
    """
    workdir, known = Path(workdir), shapes or Shapes()
    bounds = planner.Bounds(usual_memory() if memory is None else memory, most)
    for arm in arms if retry else ():
        (run_folder(workdir, arm.id) / FAILURE).unlink(missing_ok=True)
    with interrupted_by_signals(workdir), Board(arms, workdir, described, echo) as board:
        board.write()
        good = [arm for arm in arms if fits(arm, workdir, known)]
        packs = planner.plan(good, known, bounds)
        todo = unfinished(good, packs, workdir, most)
        board.begin(todo)
        for why in planner.reasons(good, known) if todo and most > 1 else ():
            board.say(why)
        if todo:
            (launch or launchers.make("local"))(todo, workdir, board)
        rows = board.write()
    if not any(row["status"] == "missing" for row in rows):
        for name in ("packs", "prefix_cache"):
            shutil.rmtree(workdir / name, ignore_errors=True)
    return rows


def begun(arms: Sequence[Arm], workdir: Path, most: int) -> list[list[Arm]]:
    """Packs that were broken off, with all the arms they began with: in other company an arm would round otherwise.

    One that has neither a checkpoint nor an arm that has ended has nothing to go on with, and is planned anew; so is
    one with more than `most` arms, or with an arm that the grid has no more. Of two for one arm the later counts.
    """
    known: dict[str, Arm] = {arm.id: arm for arm in arms}
    packs: list[list[Arm]] = []
    taken: set[str] = set()
    for file in sorted((workdir / "packs").glob("*.json"), key=lambda file: -file.stat().st_mtime_ns):
        ids = read_json(file)["arms"]
        left = {one for one in ids if one in known and status(run_folder(workdir, one)) == "missing"}
        started = len(left) < len(ids) or any(pack_folder(workdir, ids).glob("[0-9]*"))
        if left and started and len(ids) <= most and known.keys() >= set(ids) and not left & taken:
            packs.append([known[one] for one in ids])
            taken |= left
    return packs


def unfinished(arms: Sequence[Arm], packs: Sequence[Sequence[Arm]], workdir: Path, most: int) -> list[list[Arm]]:
    """What still has to train: packs that were begun, then of each planned pack the arms that have no end yet."""
    first = begun(arms, workdir, most)
    taken = {arm.id for pack in first for arm in pack}
    rest = [
        [arm for arm in pack if arm.id not in taken and status(run_folder(workdir, arm.id)) == "missing"]
        for pack in packs
    ]
    return [*first, *(pack for pack in rest if pack)]


def fits(arm: Arm, workdir: Path, shapes: Callable[[Arm], Any]) -> bool:
    """Whether an arm can be planned; one that cannot is a failed arm with the reason."""
    try:
        shapes(arm)
        return True
    except UserError as error:
        folder = run_folder(workdir, arm.id)
        if status(folder) == "missing":
            write_json(folder / FAILURE, {"reason": str(error)})
        return False


class Shapes:
    """Arm -> what the planner knows of it; models and data are looked at once."""

    def __init__(self) -> None:
        self._bases: dict[str, Any] = {}
        self._tasks: dict[str, Any] = {}
        self._found: dict[str, planner.Shape] = {}

    def __call__(self, arm: Arm) -> planner.Shape:
        if arm.id not in self._found:
            config, base = arm.config, self._base(arm.config)
            adapter = make_adapter(config, base)
            tokens = config.train.batch_size * config.data.max_length // config.train.accumulate
            delta = delta_shapes(adapter, base)
            self._found[arm.id] = planner.Shape(adapter, delta, base.sites, tokens, self._random)
        return self._found[arm.id]

    def _random(self, arm: Arm) -> bool:
        """Whether a step of an arm draws dropout."""
        shape, train = self(arm), arm.config.train
        tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
        return draws(self._base(arm.config), shape.adapter, shape.delta, {"tokens": tokens}, train.prefix_cache != "on")

    def task(self, config: Config) -> tuple[Any, dict[str, int]]:
        """(task, {split: how many records}) of a config."""
        name = str((config.data, config.task, model_path(config)))
        if name not in self._tasks:
            splits = load_data(config, ("train", "dev"))
            sizes = {split: len(records) for split, records in splits.items() if records}
            self._tasks[name] = (make_task(config, splits), sizes)
        return self._tasks[name]

    def _base(self, config: Config) -> Any:
        model, labels = config.model, self.task(config)[0].labels or ()
        name = str((model, model_path(config), len(labels)))
        if name not in self._bases:
            self._bases[name] = models.outline(model_path(config), model.dtype, len(labels) or None, model.dropout)
        return self._bases[name]


def usual_memory(here: bool = True) -> float:
    """Half of the memory of the device, or of the machine where the device does not tell; of a CPU 3 GB at most.

    Args:
      here: arms train on this machine; others may be of another kind, so that nothing is known of them.
    """
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return 0.5 * stats["bytes_limit"]
    whole = 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(planner.CPU_MEMORY, whole) if here and jax.default_backend() == "cpu" else whole
