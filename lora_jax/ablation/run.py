"""A whole grid: plan, skip what is done, launch what is missing, and keep `results.csv` whole at every moment.

The directories of the runs are the truth: an arm is done if its summary.json is there, failed if its failure.json is.
`results.csv` is made from them anew whenever an arm ends, so it can never disagree with them.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lora_jax import models
from lora_jax.ablation import planner, results
from lora_jax.ablation.arms import Arm
from lora_jax.ablation.execute import COST, FAILURE, SUMMARY, execute, pack_folder, run_folder
from lora_jax.assemble import delta_shapes, load_data, make_adapter, make_task, model_path
from lora_jax.errors import UserError
from lora_jax.progress import duration
from lora_jax.records import read_json, write_json

RESULTS = "results.csv"
Launch = Callable[[Sequence[Sequence[Arm]], Path, "Board"], None]
METRICS = ("dev", "test")


def run(
    arms: Sequence[Arm],
    workdir: Path,
    *,
    launch: Launch | None = None,
    most: int = planner.MOST,
    memory: float | None = None,
    echo: Callable[[str], None] | None = print,
) -> list[results.Row]:
    """Trains every arm that has no result yet.

    Args:
      arms: of `expand`.
      workdir: of the ablation.
      launch: trains packs; None does it in this process, one after the other.
      most: arms of a pack.
      memory: bytes that a pack may use beside the base; None takes half of what the machine has.
      echo: takes what is shown.

    Returns:
      The rows of results.csv.

    Raises:
      Interrupted: a signal came; the same command goes on.
    """
    workdir = Path(workdir)
    board = Board(arms, workdir, echo)
    board.write()
    known = Shapes()
    good = [arm for arm in arms if board.fits(arm, known)]
    memory = usable_memory() if memory is None else memory
    packs = planner.plan(good, known, memory=memory, most=most)
    todo = [pack for pack in (missing(pack, workdir) for pack in packs) if pack]
    board.begin(todo)
    (launch or locally)(todo, workdir, board)
    rows = board.write()
    if not any(row["status"] == "missing" for row in rows):
        shutil.rmtree(workdir / "packs", ignore_errors=True)
    return rows


def locally(packs: Sequence[Sequence[Arm]], workdir: Path, board: "Board") -> None:
    """One pack after the other, in this process."""
    for pack in packs:
        board.start(pack)
        execute(pack, workdir, board.ended, board.tick)


def missing(pack: Sequence[Arm], workdir: Path) -> list[Arm]:
    """The arms of a pack that still have to train; all of them where a checkpoint of the whole pack can go on."""
    left = [arm for arm in pack if status(run_folder(workdir, arm.id)) == "missing"]
    if left and any(pack_folder(workdir, [arm.id for arm in pack]).glob("[0-9]*")):
        return list(pack)
    return left


def status(folder: Path) -> str:
    """'done', 'failed' or 'missing'."""
    if (folder / SUMMARY).exists():
        return "done"
    return "failed" if (folder / FAILURE).exists() else "missing"


def row_of(arm: Arm, workdir: Path) -> results.Row:
    """One line of results.csv, from the arm's directory."""
    folder = run_folder(workdir, arm.id)
    state = status(folder)
    row: results.Row = {"arm": arm.id, "label": arm.label, "status": state, "reason": None, **arm.axes}
    if state == "failed":
        row["reason"] = read_json(folder / FAILURE)["reason"]
    if state == "done":
        summary = read_json(folder / SUMMARY)
        row["trainable_params"] = summary["trainable_params"]
        row |= {f"{split}.{name}": value for split in METRICS for name, value in summary[split].items()}
        row["step"] = summary["step"]
        row["seconds"] = summary["seconds"]
    if (folder / COST).exists():
        row |= read_json(folder / COST)
    return row


class Shapes:
    """Arm -> what the planner knows of it; models are looked at once."""

    def __init__(self):
        self._bases: dict[tuple, Any] = {}
        self._found: dict[str, planner.Shape] = {}

    def __call__(self, arm: Arm) -> planner.Shape:
        if arm.id not in self._found:
            config = arm.config
            base = self._base(config)
            adapter = make_adapter(config, base)
            tokens = config.train.batch_size * config.data.max_length // config.train.accumulate
            self._found[arm.id] = planner.Shape(adapter, delta_shapes(adapter, base), base.sites, tokens)
        return self._found[arm.id]

    def _base(self, config: Any) -> Any:
        model = config.model
        about = (config.data, config.task)
        labels = self._bases.get(key := ("labels", str(about), model_path(config)))
        if labels is None:
            labels = self._bases[key] = make_task(config, load_data(config, ("train", "dev"))).labels or ()
        name = ("base", str(model), model_path(config), len(labels))
        if name not in self._bases:
            self._bases[name] = models.outline(model_path(config), model.dtype, len(labels) or None, model.dropout)
        return self._bases[name]


class Board:
    """What is done, running and left; writes results.csv and tells how it goes."""

    def __init__(self, arms: Sequence[Arm], workdir: Path, echo: Callable[[str], None] | None):
        self._arms, self._workdir, self._echo = list(arms), workdir, echo
        self._labels = {arm.id: arm.label for arm in arms}
        self._left: set[str] = set()
        self._began, self._count = time.perf_counter(), 0

    def fits(self, arm: Arm, shapes: Callable[[Arm], Any]) -> bool:
        """Whether an arm can be planned; one that cannot is a failed arm with the reason."""
        try:
            shapes(arm)
            return True
        except UserError as error:
            folder = run_folder(self._workdir, arm.id)
            if status(folder) == "missing":
                write_json(folder / FAILURE, {"reason": str(error)})
            return False

    def begin(self, packs: Sequence[Sequence[Arm]]) -> None:
        """Tells what will be done."""
        self._left = {arm.id for pack in packs for arm in pack}
        rows = self.write()
        done, failed = (sum(row["status"] == name for row in rows) for name in ("done", "failed"))
        self._count, self._began = len(self._left), time.perf_counter()
        self.say(f"{len(rows)} arms: {done} done, {failed} failed, {len(self._left)} to train in {len(packs)} packs")

    def start(self, pack: Sequence[Arm]) -> None:
        """A pack begins."""
        words = pack[0].label if len(pack) == 1 else f"{len(pack)} arms together: {pack[0].label} ... {pack[-1].label}"
        self.say(f"training {words}")

    def tick(self, step: int, total: int) -> None:
        """A pack has made steps."""

    def ended(self, arm_id: str, why: str) -> None:
        """An arm has ended; its files are there."""
        self._left.discard(arm_id)
        rows = self.write()
        row = next(row for row in rows if row["arm"] == arm_id)
        what = f"failed: {why}" if why else shown(row)
        ended = self._count - len(self._left)
        spent = time.perf_counter() - self._began
        rest = duration(spent / max(1, ended) * len(self._left))
        self.say(f"{ended:>4}/{self._count}  {self._labels[arm_id]}  {what}  {rest} left")

    def write(self) -> list[results.Row]:
        """Makes results.csv from the directories of the runs."""
        rows = [row_of(arm, self._workdir) for arm in self._arms]
        axes = list(dict.fromkeys(name for arm in self._arms for name in arm.axes))
        results.write_results(self._workdir / RESULTS, rows, axes)
        return rows

    def say(self, text: str) -> None:
        """One line."""
        if self._echo is not None:
            self._echo(text)


def shown(row: Mapping[str, Any]) -> str:
    """The metrics of a row that one looks at first."""
    names = [name for name in row if name.startswith("dev.")]
    return "  ".join(f"{name} {row[name]:.4g}" for name in names if isinstance(row[name], (int, float)))


def usable_memory() -> float:
    """Half of the memory of the device, or of the machine where the device does not tell."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return 0.5 * stats["bytes_limit"]
    return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
