"""One pack of arms, trained in this process: what a launcher runs, here or on another machine.

A pack of one arm is a run as any other. Data, task and base stay loaded for the next pack that needs the same.
"""

import dataclasses
import functools
import json
import shutil
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax import data, models, records
from lora_jax.ablation.arms import Arm, digest
from lora_jax.ablation.running.expense import EVERY, Expense
from lora_jax.ablation.running.fit import fit_together
from lora_jax.ablation.running.packed import Pack
from lora_jax.assemble import Parts, load_base, load_data, make_adapter, make_mesh, make_task, save_adapter, start_data
from lora_jax.data.row_store import RowStores
from lora_jax.errors import UserError
from lora_jax.records import plain
from lora_jax.settings import Config
from lora_jax.stopping import Diverged, Interrupted
from lora_jax.train import fit, init_delta, make_stores

Ended = Callable[[str, str], None]  # (arm id, why it failed or '')
Stores = Callable[[Config], RowStores]
SUMMARY, FAILURE, CONFIG = "summary.json", "failure.json", "config.json"
CHECKPOINTS = "checkpoints"
REASON_LENGTH = 500  # characters of a reason, which is one field of results.csv


def run_folder(workdir: Path, arm_id: str) -> Path:
    """Where an arm's run is kept."""
    return Path(workdir) / "runs" / arm_id


def pack_folder(workdir: Path, ids: Sequence[str]) -> Path:
    """Where a pack keeps its checkpoints."""
    return Path(workdir) / "packs" / digest({"arms": sorted(ids)})


def status(folder: Path) -> str:
    """'done', 'failed' or 'missing', by the files of a run."""
    if (folder / SUMMARY).exists():
        return "done"
    return "failed" if (folder / FAILURE).exists() else "missing"


def begun_file(workdir: Path, ids: Sequence[str]) -> Path:
    """Says which arms a pack has; there from the pack's beginning until the grid is finished or the pack given up."""
    return pack_folder(workdir, ids).with_suffix(".json")


def execute(
    arms: Sequence[Arm],
    workdir: Path,
    ended: Ended = lambda arm, why: None,
    tick: Any = None,
    scratch: Path | None = None,
) -> None:
    """Trains a pack to its end; a failing arm is written down and does not fail the others.

    Where the pack as a whole fails, for one arm's sake or for want of memory, its halves train instead; an error that
    nobody foresaw fails an arm like any other, its traceback in failure.json.

    Args:
      arms: of one pack; those that have ended stay as they are.
      workdir: of the ablation.
      ended: is called whenever an arm has ended.
      tick: is called with (steps made, steps in all) now and then.
      scratch: where activations are kept on disk, for this process alone; None is the work directory.

    Raises:
      Interrupted: a signal came; what can be resumed is saved.
    """
    left = [arm for arm in arms if status(run_folder(workdir, arm.id)) == "missing"]
    stores = functools.partial(_stores, workdir=scratch or workdir)
    for arm in left:
        _begin_anew(arms, arm, workdir)
        records.write_json(run_folder(workdir, arm.id) / CONFIG, arm.values)
    expense = Expense({arm.id: run_folder(workdir, arm.id) for arm in left}, len(arms))

    def close(arm_id: str, failure: Mapping[str, Any] | None) -> None:
        if failure:
            records.write_json(run_folder(workdir, arm_id) / FAILURE, failure)
        expense.close(arm_id)
        ended(arm_id, failure["reason"] if failure else "")

    def told(step: int, total: int) -> None:
        expense.note(least=EVERY)
        if tick is not None:
            tick(step, total)

    try:
        if left and len(arms) == 1:
            _alone(arms[0], workdir, told, stores)
            close(arms[0].id, None)
        elif left:
            records.write_json(begun_file(workdir, [arm.id for arm in arms]), {"arms": [arm.id for arm in arms]})
            tell = lambda arm_id, why: close(arm_id, {"reason": why} if why else None)  # noqa: E731
            _together(arms, workdir, tell, told, stores)
    except Interrupted:
        expense.note()
        raise
    except Exception as error:
        expense.note()
        if len(arms) == 1:
            close(arms[0].id, _failure(error))
            return
        _forget(workdir, [arm.id for arm in arms])
        half = (len(left) + 1) // 2
        for part in (left[:half], left[half:]):
            execute(part, workdir, ended, tick, scratch)


def _begin_anew(arms: Sequence[Arm], arm: Arm, workdir: Path) -> None:
    """Without a checkpoint, what an earlier attempt left is of no use: it may have been in other company."""
    together = len(arms) > 1
    own = run_folder(workdir, arm.id)
    folder = pack_folder(workdir, [one.id for one in arms]) if together else own / CHECKPOINTS
    if not any(folder.glob("[0-9]*")):
        for name in ("manifest.json", "metrics.jsonl"):
            (own / name).unlink(missing_ok=True)
    if together:
        shutil.rmtree(own / CHECKPOINTS, ignore_errors=True)


def _failure(error: Exception) -> dict[str, str]:
    """What failure.json holds."""
    if isinstance(error, (UserError, Diverged)):
        return {"reason": str(error)}
    text = " ".join(str(error).split())
    short = text if len(text) <= REASON_LENGTH else text[: REASON_LENGTH - 3] + "..."
    return {"reason": f"{type(error).__name__}: {short}", "traceback": "".join(traceback.format_exception(error))}


def _forget(workdir: Path, ids: Sequence[str]) -> None:
    """A pack that cannot train is not gone on with."""
    begun_file(workdir, ids).unlink(missing_ok=True)
    shutil.rmtree(pack_folder(workdir, ids), ignore_errors=True)


def _alone(arm: Arm, workdir: Path, tick: Any, stores: Stores) -> None:
    parts = parts_of(arm.config)
    total = arm.config.train.steps
    echo = lambda text: tick(_step_of(text), total)  # noqa: E731
    start = init_delta(parts.base, parts.adapter, arm.config.seed, start_data(arm.config, parts))
    fit(
        parts.base, parts.adapter, parts.task, parts.splits, arm.config.train, run_folder(workdir, arm.id),
        seed=arm.config.seed, mesh=parts.mesh, max_length=arm.config.data.max_length, echo=echo, start=start,
        about={"config": arm.values}, save=lambda where, delta: save_adapter(where, parts, delta),
        stores=stores(arm.config),
    )  # fmt: skip


def _step_of(line: str) -> int:
    """The step that a line of `progress.line` begins with."""
    words = line.split(maxsplit=2)
    return int(words[1].partition("/")[0]) if words[:1] == ["step"] and "/" in words[1] else 0


def _together(arms: Sequence[Arm], workdir: Path, close: Ended, tick: Any, stores: Stores) -> None:
    parts, config = [parts_of(arm.config) for arm in arms], arms[0].config
    first = parts[0]
    fit_together(
        first.base, [own.adapter for own in parts], first.task, first.splits, [arm.config.train for arm in arms],
        [run_folder(workdir, arm.id) for arm in arms], pack_folder(workdir, [arm.id for arm in arms]),
        seeds=[arm.config.seed for arm in arms], bases=[own.base for own in parts], max_length=config.data.max_length,
        saves=[functools.partial(_save, own) for own in parts],
        about=[{"config": arm.values, "arms_together": [other.id for other in arms]} for arm in arms],
        ended=lambda index, why: close(arms[index].id, why),
        tick=tick,
        compiled=lambda pack, cut, make: _once("program", (cut, *_program_key(pack, first, config)), make),
        stores=stores(config),
    )  # fmt: skip


def _stores(config: Config, workdir: Path) -> RowStores:
    """One for all packs of a grid: what two of them have in common is computed once."""
    sizes = (config.train.prefix_cache_gb, config.train.prefix_cache_disk_gb, str(workdir))
    return _once("stores", sizes, lambda: make_stores(config.train, workdir))


def _save(parts: Parts, where: Path, delta: Any) -> None:
    save_adapter(where, parts, delta)


_known: dict[str, dict[str, Any]] = {}


def _once(kind: str, key: Any, make: Callable[[], Any]) -> Any:
    """`make()`, unless the last of this kind had the same key: one data set and one base stay in memory, not all."""
    name = json.dumps(plain(key), sort_keys=True)
    if name not in _known.get(kind, {}):
        _known[kind] = {name: make()}
    return _known[kind][name]


def parts_of(config: Config) -> Parts:
    """As `assemble`, with what the last call loaded where it is the same."""
    text = dataclasses.asdict(config)
    about_data = (text["data"], text["task"], text["model"]["path"])
    splits, task = _once("data", about_data, lambda: _data(config))
    about_base = (text["model"], text["quant"], list(task.labels or ()))
    loaded: models.Base = _once(
        "base", about_base, lambda: load_base(config, len(task.labels) if task.labels else None)
    )
    of_seed: dict[int, models.Base] = _once("of seed", about_base, dict)
    base = of_seed.setdefault(config.seed, of_seed.get(config.seed) or models.reseeded(loaded, config.seed))
    adapter = _once_adapter(text["adapter"], about_base, lambda: make_adapter(config, base))
    return Parts(base, task, splits, adapter, make_mesh(config))


def _data(config: Config) -> tuple[data.Splits, Any]:
    splits = load_data(config, ("train", "dev"))
    return splits, make_task(config, splits)


_adapters: dict[str, Any] = {}


def _once_adapter(section: Mapping[str, Any], about_base: Any, make: Callable[[], Any]) -> Any:
    """An adapter holds no arrays, so all of them may stay."""
    name = json.dumps(plain((section, about_base)), sort_keys=True)
    if name not in _adapters:
        _adapters[name] = make()
    return _adapters[name]


def _program_key(pack: Pack, parts: Parts, config: Config) -> Any:
    """Equal for packs that one compiled program serves; those that differ in the seed do."""
    settings = dataclasses.asdict(config.train)
    static = {name: settings[name] for name in ("accumulate", "schedule", "b1", "b2", "eps")}
    method = {n: v for n, v in parts.adapter.spec.items() if n not in ("rank", "alpha", "layers", "targets")}
    model = (dataclasses.asdict(config.model), config.quant, list(parts.task.labels or ()))
    return (pack.signature, *model, static, pack.total, str(method), str(parts.task.options))
