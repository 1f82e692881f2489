"""`fit` for several adapters at once: one base and task, one compiled step; each leaves a work directory behind."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lora_jax import adapters, optim
from lora_jax.ablation.running.mixed import MixedBatches, draws, masks_keep, own_weights
from lora_jax.ablation.running.packed import Pack, Program, make_program
from lora_jax.ablation.running.together import Job, Together
from lora_jax.adapters import Adapter
from lora_jax.data import Batches
from lora_jax.data.row_store import RowStores
from lora_jax.errors import UserError
from lora_jax.train import identity, init_delta, make_batches, make_plan, make_stores, plan_cache
from lora_jax.train_settings import TrainSettings

# What the arms' settings may differ in.
FREE = ("learning_rate", "warmup", "weight_decay", "clip_norm", "lora_plus_ratio", "patience")


def fit_together(
    base: Any,
    methods: Sequence[Adapter],
    task: Any,
    splits: Mapping[str, Sequence[Any]],
    settings: Sequence[TrainSettings],
    workdirs: Sequence[Path],
    folder: Path,
    *,
    seeds: Sequence[int] = (),
    bases: Sequence[Any] = (),
    max_length: int | None = None,
    saves: Sequence[Callable[[Path, Any], None]] | None = None,
    about: Sequence[Mapping[str, Any]] | None = None,
    ended: Callable[[int, str], None] = lambda index, why: None,
    tick: Callable[[int, int], None] = lambda step, total: None,
    compiled: Callable[[Pack, str, Callable[[], Program]], Program] = lambda pack, cut, make: make(),
    stores: RowStores | None = None,
) -> None:
    """Trains arms in one compiled program, or goes on with arms that were broken off.

    Each arm gets what `train.fit` would give it, up to rounding: its products are parts of larger ones, which a device
    may sum in another order. After 4 steps on a tiny decoder in float32 the losses differ by less than 1e-5 relative
    (tested to 1e-4).

    Args:
      base, task, splits, max_length: as of `train.fit`.
      methods: one adapter per arm; their deltas must be `stack.alike`.
      settings: one per arm; they may differ in `FREE` alone.
      workdirs: one per arm.
      folder: for the checkpoints of the pack.
      seeds: one per arm; none are zeros. Arms with one seed see one batch, which is cheaper: what lies below the lowest
        adapted weight is then computed once for all of them.
      bases: one per arm where a head is drawn by the seed (`models.reseeded`), the first of them `base`; they share all
        other arrays.
      saves: one per arm, as `train.fit(save=)`.
      about: more fields of each manifest.
      ended: is called with an arm's index, and why it failed or '', when its files are there.
      tick: is called with (step, total) at every log line.
      compiled: gives the program, by `make()` or one that was made for another pack of the same signature and the same
        cut of the prefix cache.
      stores: where the prefix cache keeps activations; packs may share it. None: as the settings say.

    Raises:
      UserError: settings or seeds that cannot share a program, or whatever `train.fit` raises.
      Interrupted: stopped by a signal, after saving.
    """
    _check(settings)
    first = settings[0]
    seeds, bases = tuple(seeds) or (0,) * len(methods), list(bases) or [base] * len(methods)
    batches = make_batches(task, methods[0], splits, first, seeds[0], None, max_length)
    of_seed = {seed: _with_seed(batches, seed) if seed != seeds[0] else batches for seed in seeds}
    total = first.total(batches["train"].steps_per_epoch)
    timed = [adapters.for_steps(method, total) for method in methods]
    starts = [init_delta(own, method, seed) for own, method, seed in zip(bases, timed, seeds, strict=True)]
    pack = Pack(timed[0], starts, settings, total, seeds, own := own_weights(bases))
    stores = stores or make_stores(first, Path(folder))
    cached = plan_cache(
        base, [*zip(timed, starts, strict=True)], task, first, total, batches, stores, also=frozenset(own)
    )
    variables = jax.device_put(base.variables, jax.devices()[0])
    apply, full = base.apply, task
    if cached is not None:
        cached.variables, apply, task = variables, cached.apply, cached.task
    program = compiled(
        pack, cached.cut if cached else "", lambda: make_program(pack, apply, timed[0], task, first, total)
    )
    jobs = [
        Job(
            Path(workdir), method, identity(bases[i], method, full, own, seeds[i], of_seed[seeds[i]], cached),
            saves[i] if saves else _unsaved, about[i] if about else {},
        )
        for i, (workdir, method, own) in enumerate(zip(workdirs, timed, settings, strict=True))
    ]  # fmt: skip
    fed = batches | (cached.batches if cached else {})
    more: dict[str, Any] = {}
    if pack.mixed:
        _check_masks(base, timed[0], starts[0], task, first, batches["train"])
        trains = [of_seed[seed]["train"] for seed in pack.order]
        mixed = MixedBatches(trains, [pack.order.index(seed) for seed in seeds], cached.place if cached else dict)
        fed, more = fed | {"train": mixed}, {"place": mixed.feed}
    together = Together(
        jobs=jobs, pack=pack, program=program, hyper=pack.hyper(), state=pack.state(program),
        variables=variables, task=task, splits=splits, batches=fed,
        plan=make_plan(first, total), patience=[own.patience for own in settings],
        learning_rates=[optim.make_schedule(s.schedule, s.learning_rate, total, s.warmup) for s in settings],
        folder=Path(folder), ended=ended, tick=lambda step: tick(step, total), **more,
    )  # fmt: skip
    try:
        together.run()
    finally:
        if cached is not None:
            cached.close()


def _with_seed(batches: Mapping[str, Batches], seed: int) -> dict[str, Batches]:
    return {name: one.with_seed(seed) for name, one in batches.items()}


def _check_masks(base: Any, adapter: Adapter, delta: Any, task: Any, settings: TrainSettings, train: Batches) -> None:
    """Arms that draw dropout would draw other masks at another length than alone."""
    if len(train.lengths) == 1 and masks_keep():
        return
    inputs = task.inputs(train.empty(train.lengths[0]))
    if draws(base, adapter, delta, inputs, base_dropout=settings.prefix_cache != "on"):
        raise UserError(
            f"arms that train together draw dropout and differ in the seed, but their batches have the lengths "
            f"{', '.join(map(str, train.lengths))}: padding would change the masks. Give train.buckets one length or "
            "set train.share_rows, or train the seeds apart"
        )


def _unsaved(where: Path, delta: Any) -> None:
    del where, delta


def _check(settings: Sequence[TrainSettings]) -> None:
    fixed = [{n: v for n, v in dataclasses.asdict(own).items() if n not in FREE} for own in settings]
    for own in fixed[1:]:
        for name, value in own.items():
            if value != fixed[0][name]:
                raise UserError(
                    f"arms that train together must agree in train.{name}, but have {fixed[0][name]!r} and {value!r}; "
                    f"only {', '.join(FREE)} may differ"
                )
