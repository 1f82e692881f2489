"""Training: from a base, an adapter, a task and data to a work directory with a trained delta.

`fit` sets up what `loop.Loop` runs, and afterwards evaluates what is saved. Running it again with the same arguments
goes on where the last checkpoint left off, bit for bit at fixed devices and threads, and does nothing more once it is
finished.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lora_jax import adapters, evaluate, feed, manifest, optim, prefix_cache, records, sharding, trees
from lora_jax.checkpoint import Checkpoints
from lora_jax.data import Batches
from lora_jax.data.row_store import RowStores
from lora_jax.errors import UserError
from lora_jax.lift import is_adapted, lift
from lora_jax.loop import Book, Loop, Plan, evaluation_record
from lora_jax.progress import Echo, Progress
from lora_jax.step import TrainState, delta_of, init_state, make_train_step
from lora_jax.stopping import Best, Diverged, Interrupted, Signals
from lora_jax.train_settings import SHOWN_ONLY, TrainSettings

__all__ = ["Diverged", "Interrupted", "Summary", "TrainSettings", "TrainState", "fit", "init_delta", "make_train_step"]


class Summary(dict):
    """What summary.json holds; `delta` is the saved delta itself."""

    delta: Any = None


def init_delta(base: Any, adapter: Any, seed: int = 0, given: Any = None) -> Any:
    """The delta that a run with this seed starts from; `given` is what `adapter.needs`."""
    key = jax.random.fold_in(jax.random.key(seed), trees.stable_hash("init"))
    return adapter.init(key, base.variables, base.sites, batch=given)


def fit(
    base: Any,
    adapter: Any,
    task: Any,
    splits: Mapping[str, Sequence[Any]],
    settings: TrainSettings,
    workdir: str | Path,
    *,
    seed: int = 0,
    mesh: Mesh | None = None,
    max_length: int | None = None,
    writers: Sequence[records.Writer] = (),
    echo: Echo | None = print,
    about: Mapping[str, Any] | None = None,
    save: Callable[[Path, Any], None] | None = None,
    start: Any = None,
    stores: RowStores | None = None,
) -> Summary:
    """Trains a delta, or goes on with a run that was broken off.

    Args:
      base: `apply`, `variables`, `sites` and `fingerprint` are used; never changed.
      adapter: the method.
      task: what a batch holds, the loss, the metrics.
      splits: {"train", "dev", "test"}: records; dev and test may be missing or empty.
      settings: how to train.
      workdir: of the run; made if need be.
      seed: of initial values, data order and dropout.
      mesh: from `sharding.make_mesh`; None is one device.
      max_length: tokens of a row at most; with packing, of a packed row.
      writers: take every record besides metrics.jsonl.
      echo: takes what is shown; None shows nothing.
      about: more fields of the manifest.
      save: writes the adapter into a folder: `save(workdir / "adapter", delta)`.
      start: the delta to start from; None makes it by `init_delta`.
      stores: where the prefix cache keeps activations; runs of one process may share it. None: as the settings say.

    Returns:
      The content of summary.json, with the saved delta as its attribute `delta`.

    Raises:
      UserError: something the user can mend, such as a work directory of another run.
      Interrupted: stopped by a signal, after saving.
      Diverged: the loss is not finite.
    """
    workdir = Path(workdir)
    mesh = mesh if mesh is not None and mesh.size > 1 else None
    batches = make_batches(task, adapter, splits, settings, seed, mesh, max_length)
    cut = feed.cut_notice(task, batches["train"], max_length)
    total = settings.total(batches["train"].steps_per_epoch)
    adapter = adapters.for_steps(adapter, total)
    mine = stores is None
    stores = stores or make_stores(settings, workdir)
    cached = plan_cache(base, [(adapter, start)], task, settings, total, batches, stores, mesh)
    own = identity(base, adapter, task, settings, seed, batches, cached)
    manifest.open_run(workdir / "manifest.json", manifest.collect(own, mesh=mesh, extra=about))
    with (
        sharding.use(mesh),
        Checkpoints(workdir / "checkpoints", keep=settings.keep) as checkpoints,
        Signals() as signals,
    ):
        parts = _parts(base, adapter, task, settings, total, seed, mesh, echo, start, cached)
        batches = batches | (cached.batches if cached else {})
        book, state = _resume(checkpoints, parts["state"], task)
        finished = (workdir / "summary.json").exists()
        metrics = records.MetricsFile(workdir / "metrics.jsonl", lambda record: finished or _known(record, book))
        try:
            with Progress(total, book.step, echo) as progress:
                if book.step:
                    progress.say(f"going on from step {book.step} of {total}")
                for line in [] if book.done else [*cut, *(cached.notes if cached else ())]:
                    progress.say(line)
                loop = Loop(
                    **{**parts, "state": state},
                    plan=make_plan(settings, total),
                    book=book,
                    task=task,
                    batches=batches["train"],
                    dev=batches.get("dev"),
                    checkpoints=checkpoints,
                    writers=[metrics, *writers],
                    progress=progress,
                    signals=signals,
                    mesh=mesh,
                )
                loop.run()
                return _finish(loop, base, settings, splits, batches, workdir, save)
        finally:
            metrics.close()
            if cached is not None:
                cached.close()
            if mine:
                (stores.remove if (workdir / "summary.json").exists() else stores.close)()
            for writer in writers:
                writer.close()


def make_batches(task, adapter, splits, settings, seed, mesh=None, max_length=None) -> dict[str, Batches]:
    """Batches of every split that has records; arguments as of `fit`.

    Raises:
      UserError: train is missing or empty, or a batch does not divide over devices and micro-batches.
    """
    if not splits.get("train"):
        raise UserError("the data has no training examples: the split 'train' is missing or empty")
    evaluation = settings.eval_batch_size or settings.batch_size
    sharding.check_batch(mesh, settings.batch_size, accumulate=settings.accumulate)
    sharding.check_batch(mesh, evaluation, name="train.eval_batch_size")
    out = {}
    for name in ("train", "dev", "test"):
        if splits.get(name):
            out[name] = feed.make_batches(
                task, splits[name], settings, seed=seed, max_length=max_length, mesh=mesh, adapter=adapter,
                training=name == "train",
            )  # fmt: skip
    return out


def make_stores(settings: TrainSettings, workdir: Path) -> RowStores:
    """Where the prefix cache keeps activations, as the settings say."""
    gb = prefix_cache.GB
    return RowStores(settings.prefix_cache_gb * gb, settings.prefix_cache_disk_gb * gb, workdir / "prefix_cache")


def plan_cache(
    base, arms, task, settings, total, batches, stores, mesh=None, also=frozenset()
) -> prefix_cache.Cached | None:
    """The prefix cache over the splits that are read more than once; None where there is none.

    Args:
      arms: (adapter, its first delta or None) of each arm that trains.
      base, task, settings, total, batches, stores, mesh: of all of them.
      also: paths of weights that are not the same for all arms, beside those that they adapt.
    """
    on = settings.prefix_cache == "on"
    again = {
        "train": total * settings.batch_size > len(batches["train"].rows),
        "dev": "dev" in batches and total > (settings.eval_every or total),
    }
    repeated = {name: batches[name] for name in again if name in batches and (on or again[name])}
    if settings.prefix_cache == "off" or not repeated:
        return None
    found = [_adapted(base, adapter, start) for adapter, start in arms]
    known = [paths for paths in found if paths is not None]
    everything = frozenset(also).union(*known) if len(known) == len(found) else None
    return prefix_cache.for_run(
        base, everything, task, repeated, stores, mode=settings.prefix_cache, accumulate=settings.accumulate, mesh=mesh
    )


def _adapted(base, adapter, start) -> frozenset[str] | None:
    delta = jax.eval_shape(lambda: init_delta(base, adapter)) if start is None else start
    return prefix_cache.adapted_paths(adapter, base.variables, delta)


def identity(base, adapter, task, settings, seed, batches, cached=None) -> dict[str, Any]:
    """What must be the same for a run to be the same run."""
    shown = {*SHOWN_ONLY, *(() if cached and cached.without_dropout else ("prefix_cache",))}
    own = {f"train.{k}": v for k, v in dataclasses.asdict(settings).items() if k not in shown}
    return {
        "seed": seed,
        "adapter": adapter.spec,
        "task": {"name": task.name, "options": dict(task.options)},
        **own,
        "base": base.fingerprint,
        "data": {name: one.fingerprint for name, one in batches.items()},
    }


def _parts(base, adapter, task, settings, total, seed, mesh, echo, start, cached) -> dict[str, Any]:
    """Everything that lives on the devices or is compiled for them."""
    learning_rate = optim.make_schedule(settings.schedule, settings.learning_rate, total, settings.warmup)
    tx = optim.make_optimizer(
        learning_rate,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
        lora_plus_ratio=settings.lora_plus_ratio,
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
    )
    tx = adapter.wrap(tx) if getattr(adapter, "wrap", None) else tx
    delta = init_delta(base, adapter, seed) if start is None else start
    mask = adapter.trainable(delta)
    if not any(jax.tree.leaves(mask)):
        raise UserError("the adapter trains nothing: it has no trainable leaf; choose other targets or another method")
    state = init_state(delta, mask, tx, seed)
    rules = getattr(getattr(base, "family", None), "sharding", ())
    specs = None if mesh is None else sharding.base_specs(base.variables, rules, mesh, note=echo)
    places = state_shardings(state, mask, specs, mesh)
    variables = sharding.place_base(base.variables, specs, mesh)
    apply, task = lift(base.apply if cached is None else cached.apply), task if cached is None else cached.task
    if cached is not None:
        cached.variables = variables
    return {
        "state": jax.device_put(state, places),
        "variables": variables,
        "mask": mask,
        "train_step": make_train_step(
            apply, adapter, task, tx, mask, accumulate=settings.accumulate, out_shardings=places if mesh else None
        ),
        "eval_step": evaluate.make_eval_step(apply, adapter, task),
        "learning_rate": jax.jit(learning_rate),  # for the log: one program instead of ten small ones
    }


def state_shardings(state: TrainState, mask: Any, specs: Mapping[str, P] | None, mesh: Mesh | None) -> Any:
    """Shardings of a whole state: the delta by its base, optimizer slots by their leaves, the rest replicated.

    Args:
      state: of the run.
      mask: from `adapter.trainable`.
      specs: {path: spec} of the base; None on one device.
      mesh: or None.
    """
    if mesh is None:
        return jax.tree.map(lambda _: sharding.sharding(None, P()), state)
    trainable, frozen = optim.split(sharding.delta_specs(delta_of(state, mask), specs or {}, mesh), mask)
    slots = sharding.slot_specs(state.opt_state, state.trainable, trainable)
    specs_of_state: Any = TrainState(trainable, frozen, slots, step=P(), seed=P())  # type: ignore[arg-type]
    return sharding.shardings(mesh, specs_of_state)


def make_plan(settings: TrainSettings, total: int) -> Plan:
    """What a run of `total` steps does when."""
    return Plan(
        total=total,
        log_every=settings.log_every,
        eval_every=settings.eval_every or total,
        checkpoint_every=settings.checkpoint_every or total,
        patience=settings.patience,
    )


def _resume(checkpoints: Checkpoints, state: TrainState, task: Any) -> tuple[Book, TrainState]:
    """The newest checkpoint's book and state, or fresh ones."""
    steps = checkpoints.steps()
    if not steps:
        metric, mode = task.better
        return Book(best=Best(metric, mode)), state
    return Book.from_json(checkpoints.meta(max(steps))), checkpoints.restore(max(steps), state)


def _known(record: Mapping[str, Any], book: Book) -> bool:
    """Whether the checkpoint that a run resumes from knows of a record; what came after it will be written again."""
    if record["split"] == "train":
        return record["step"] <= book.step
    return record["split"] == "dev" and record["step"] <= book.evaluated


def _finish(loop: Loop, base, settings, splits, batches, workdir: Path, save) -> Summary:
    """Saves the adapter, evaluates it on test, writes predictions and the summary."""
    book, path = loop.book, workdir / "summary.json"
    delta, saved, at = _chosen(loop, settings)
    if path.exists():
        loop.progress.say(f"{workdir} is finished; nothing to do")
        summary = Summary(json.loads(path.read_text(encoding="utf-8")))
        summary.delta = delta
        return summary
    if save is not None:
        save(workdir / "adapter", delta)
    found: dict[str, dict[str, float]] = {"dev": book.dev, "test": {}}
    for name, current in (("dev", loop.delta()), ("test", delta)):
        if name not in batches:
            continue
        result = loop.last_dev if name == "dev" and loop.last_dev else _evaluate(loop, batches[name], current)
        found[name] = result.metrics
        if name == "test":
            loop._write(evaluation_record(at, name, result))
        rows = evaluate.predictions(loop.task, loop.task.prepare(splits[name]), result)
        records.write_jsonl(workdir / "predictions" / f"{name}.jsonl", rows)
    summary = Summary(
        step=book.step,
        trainable_params=trees.count(loop.state.trainable),
        total_params=sum(math.prod(leaf.shape) for leaf in trees.flatten(base.variables, is_adapted).values()),
        seconds=book.seconds,
        dev=found["dev"],
        test=found["test"],
        best={"step": book.best.step, "dev": book.best.metrics},
        saved=saved,
    )
    records.write_json(path, summary)
    summary.delta = delta
    return summary


def _evaluate(loop: Loop, batches: Batches, delta: Any) -> evaluate.Evaluation:
    stop = loop.signals.stopped
    found = evaluate.evaluate(loop.eval_step, loop.variables, delta, loop.task, batches, mesh=loop.mesh, stop=stop)
    if found is None:
        assert loop.signals.caught is not None
        raise Interrupted(loop.signals.caught, loop.book.step, loop.checkpoints.folder.parent)
    return found


def _chosen(loop: Loop, settings: TrainSettings) -> tuple[Any, str, int]:
    """(the delta to save, 'best' or 'last', its step)."""
    best = loop.book.best.step
    if not settings.patience or best is None:
        return loop.delta(), "last", loop.book.step
    if best == loop.book.step:
        return loop.delta(), "best", best
    loop.checkpoints.wait()
    return delta_of(loop.checkpoints.restore(best, loop.state), loop.mask), "best", best
