"""What every arm of an ablation costs, before anything trains: the work of `--dry_run`, and what a planner packs by.

Data and config.json are read, no weights. Arms that are alike in what shapes depend on share the work.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax import adapters, feed, models, prefix_cache
from lora_jax.ablation.arms import Arm
from lora_jax.ablation.cost import Cost, estimate
from lora_jax.assemble import delta_shapes, load_data, make_adapter, make_task, model_path
from lora_jax.data import Batches
from lora_jax.data.row_store import RowStores
from lora_jax.prefix_cache import Cached
from lora_jax.records import plain
from lora_jax.settings import Adapter, Config, Data, Model, Task
from lora_jax.train import plan_cache

LOOKED_AT = 64  # batches whose lengths stand for those of a run


def survey(arms: Sequence[Arm]) -> list[Cost]:
    """What each arm costs.

    Raises:
      UserError: whatever is wrong with an arm's data, model or adapter.
    """
    known: dict[str, Any] = {}
    return [_of_arm(known, arm.config) for arm in arms]


def table(arms: Sequence[Arm], costs: Sequence[Cost]) -> str:
    """One line an arm, and the sum of what all of them will compute."""
    head = ("arm", "label", "trainable", "adapter MB", "optimizer MB", "peak MB", "GFLOP a step", "TFLOP a run")
    rows = [
        (
            arm.id, arm.label, f"{cost.trainable_params:,}", f"{cost.delta_bytes / 1e6:.1f}",
            f"{cost.slot_bytes / 1e6:.1f}", f"{cost.peak_bytes / 1e6:,.0f}", f"{cost.step_flops / 1e9:,.1f}",
            f"{cost.run_flops / 1e12:,.1f}",
        )
        for arm, cost in zip(arms, costs, strict=True)
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    pad = lambda i, cell: cell.ljust(widths[i]) if i < 2 else cell.rjust(widths[i])  # noqa: E731
    lines = ["  ".join(pad(i, cell) for i, cell in enumerate(row)).rstrip() for row in [head, *rows]]
    total = sum(cost.run_flops for cost in costs) / 1e12
    cached = [cost.cache_bytes for cost in costs if cost.cache_bytes]
    if cached:
        lines.append(
            f"{len(cached)} of {len(costs)} arms compute what lies below the adapter once a data set "
            f"(train.prefix_cache, up to {max(cached) / 1e6:,.0f} MB on the host): their steps begin above it, "
            "their runs count one pass"
        )
    return "\n".join([*lines, f"{len(rows)} arms, {total:,.1f} TFLOP in all; estimates, of each arm alone"])


def _of_arm(known: dict[str, Any], config: Config) -> Cost:
    """The cost of a config; `known` keeps what other arms can use."""
    train = config.train
    model = (config.model, model_path(config))
    records = (config.data, config.task, model_path(config))
    own_rows = adapters.get(config.adapter.method)(**config.adapter.arguments).own_rows
    rows = (*records, own_rows, train.batch_size, train.packing, train.share_rows, train.buckets)
    task, splits = _once(known, ("data", *records), _data, config)
    batches = _once(known, ("batches", *rows), _batches, config, task, splits, own_rows)
    base = _once(known, ("base", *model, task.labels), _outline, config, task.labels)
    # No shape depends on the seed, the learning rate and the like.
    method = (config.adapter, config.quant, train.lora_plus_ratio)
    cache = (train.prefix_cache, train.prefix_cache_gb, train.prefix_cache_disk_gb, dataclasses.asdict(config.mesh))
    shape = (*rows, *model, *method, train.accumulate, train.steps, train.epochs, *cache)
    return _once(known, ("cost", *shape), _of_config, config, base, task, batches)


def _of_config(config: Config, base: Any, task: Any, batches: Batches) -> Cost:
    longest, most, first = max(batches.lengths), max(batches.row_counts), batches[0]
    looked = [batches[i]["tokens"].size for i in range(min(batches.steps_per_epoch, LOOKED_AT))]
    adapter = make_adapter(config, base)
    return estimate(
        base,
        adapter,
        task,
        config.train,
        {name: _of_length(x, first["tokens"].shape, most, longest) for name, x in first.items()},
        steps=config.train.total(batches.steps_per_epoch),
        fill=float(np.mean(looked)) / (most * longest),
        quantized=config.quant,
        cached=_cached(config, base, adapter, task, batches),
    )


def _cached(config: Config, base: Any, adapter: Any, task: Any, batches: Batches) -> Cached | None:
    """The prefix cache that a run will have, as planned from shapes; nothing is computed or kept."""
    mesh, train, shaped = config.mesh, config.train, dataclasses.replace(base)
    vars(shaped).update(sites=base.sites, fingerprint="")  # there are no weights to hash, and no store outlives this
    devices = jax.device_count() if mesh.data == -1 else mesh.data
    if max(devices, mesh.fsdp, mesh.tensor) > 1:
        return None
    stores = RowStores(max(train.prefix_cache_gb, train.prefix_cache_disk_gb) * prefix_cache.GB)
    total = train.total(batches.steps_per_epoch)
    arms = [(adapter, delta_shapes(adapter, base))]
    found = plan_cache(shaped, arms, task, train, total, {"train": batches}, stores)
    return None if found is None or (found.prefix is None and not found.without_dropout) else found


def _data(config: Config) -> tuple[Any, Any]:
    splits = load_data(config, ("train",))
    return make_task(config, splits), splits


def _batches(config: Config, task: Any, splits: Any, own_rows: bool) -> Batches:
    train = dataclasses.replace(config.train, share_rows=config.train.share_rows and not own_rows)
    return feed.make_batches(task, splits["train"], train, max_length=config.data.max_length, training=True)


def _outline(config: Config, labels: Sequence[str] | None) -> Any:
    model = config.model
    return models.outline(model_path(config), model.dtype, len(labels) if labels else None, model.dropout, model.remat)


def _once(known: dict[str, Any], key: Sequence[Any], make: Callable[..., Any], *args: Any) -> Any:
    """`make(*args)`, unless the same key made it before."""
    parts = [dataclasses.asdict(k) if isinstance(k, (Adapter, Data, Model, Task)) else k for k in key]
    name = json.dumps(plain(parts))
    if name not in known:
        known[name] = make(*args)
    return known[name]


def _of_length(x: Any, tokens: tuple[int, ...], rows: int, length: int) -> jax.ShapeDtypeStruct:
    """The shape of one array of a batch, were it of so many rows of this length."""
    return jax.ShapeDtypeStruct((rows, length) if x.shape == tokens else (rows, *x.shape[1:]), x.dtype)
