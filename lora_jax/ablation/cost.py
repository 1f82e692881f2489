"""What an arm costs, before anything trains: parameters, bytes, FLOPs and peak memory, from shapes alone.

FLOPs are those of the step as it is lowered for the compiler; nothing is compiled or run. Activations are what
`jax.vjp` keeps for the backward pass, without the weights that it merely passes on. Both are estimates: a compiler
fuses and reorders. On MiniLM with a classifier, 32 rows of 64 tokens (CPU, jax 0.10.2, compiled 2026-11-28):

    adapter                   GFLOP a step, compiled   MB of activations, compiled's temporaries
    lora on q,v, all layers         79.9      78.5               193     254
    lora on q,v, last layer         40.2      39.5                66      60
    full                           119.3     118.4               193     454, its gradients of 91 among them
    head                            40.0      39.4                59      60
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import adapters, optim, quant, trees
from lora_jax.adapters.parts.ranks import default_targets
from lora_jax.assemble import delta_shapes
from lora_jax.lift import lift
from lora_jax.prefix_cache import FIELD, Cached, CachedBatches
from lora_jax.recompute import between_products
from lora_jax.sites import count_layers
from lora_jax.step import delta_of, init_state, make_train_step, step_keys
from lora_jax.train_settings import TrainSettings


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one arm, all devices of a mesh together.

    Attributes:
      trainable_params: as summary.json counts them, the head included.
      delta_bytes: what the adapter takes, frozen parts included.
      slot_bytes: of the optimizer's state.
      base_bytes: of the frozen weights.
      activation_bytes: of one micro-batch of the longest rows: what is kept for the backward pass, and what one layer
        works with.
      step_flops: of one optimizer step on the longest rows.
      run_flops: of all training steps at the rows' mean length, and of the one pass over the data that fills the prefix
        cache; evaluations are not counted.
      steps: of the run.
      cache_bytes: of the prefix cache, on the host; 0 where the run has none.
    """

    trainable_params: int
    delta_bytes: int
    slot_bytes: int
    base_bytes: int
    activation_bytes: int
    step_flops: float
    run_flops: float
    steps: int
    cache_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """Base, delta, optimizer, gradients (float32) and activations at once."""
        gradients = 4 * self.trainable_params
        return self.base_bytes + self.delta_bytes + self.slot_bytes + gradients + self.activation_bytes


def estimate(
    base: Any,
    adapter: Any,
    task: Any,
    settings: TrainSettings,
    batch: Mapping[str, Any],
    *,
    steps: int,
    fill: float = 1.0,
    quantized: str = "",
    cached: Cached | None = None,
) -> Cost:
    """What a run costs.

    Args:
      base: with arrays or shapes as variables; dense.
      adapter: the method.
      task: what a batch holds, and the loss.
      settings: how to train.
      batch: one batch of the longest rows, arrays or shapes.
      steps: of the run.
      fill: mean over longest length of a batch.
      quantized: the number format that the base will have; FLOPs and activations are those of the dense one.
      cached: the prefix cache that the run will have: a step then begins where it ends.
    """
    adapter = adapters.for_steps(adapter, steps)
    shapes, batch = _shapes(base.variables), _shapes(batch)
    delta = delta_shapes(adapter, base)
    mask = adapter.trainable(delta)
    tx = optim.make_optimizer(
        optim.make_schedule(settings.schedule, settings.learning_rate, steps, settings.warmup),
        weight_decay=settings.weight_decay, clip_norm=settings.clip_norm, lora_plus_ratio=settings.lora_plus_ratio,
    )  # fmt: skip
    tx = adapter.wrap(tx) if adapter.wrap else tx
    state = jax.eval_shape(lambda d: init_state(d, mask, tx), delta)
    working = _working(base, task, shapes, _micro(batch, settings.accumulate))
    apply, filling, kept = lift(base.apply), 0.0, 0
    if cached is not None:
        apply, filling, kept, batch, task = _with_cache(cached, shapes, batch, task)
    # Micro-batches add up to the same FLOPs, but XLA would count the body of their loop once.
    step: Any = make_train_step(apply, adapter, task, tx, mask)
    flops = _flops(step.lower(state, shapes, batch))
    micro = _micro(batch, settings.accumulate)
    return Cost(
        trainable_params=trees.count(state.trainable),
        delta_bytes=_bytes(delta),
        slot_bytes=_bytes(state.opt_state),
        base_bytes=base_bytes(base, quantized),
        activation_bytes=_activations(apply, adapter, task, mask, state, shapes, micro)
        + working
        + _bytes(micro.get(FIELD, ())),
        step_flops=flops,
        run_flops=(flops * steps + filling) * fill,
        steps=steps,
        cache_bytes=kept,
    )


def _with_cache(cached: Cached, variables: Any, batch: Any, task: Any) -> tuple[Any, float, int, Any, Any]:
    """(function of a step, FLOPs that fill the cache at the longest rows, its bytes, batch with its frontier, task)."""
    train, apply = cached.batches["train"], lift(cached.apply, unused="allow")
    if cached.prefix is None or not isinstance(train, CachedBatches):
        return apply, 0.0, 0, batch, cached.task  # without dropout all the same, if it was said so
    prefix = cached.prefix
    once = _flops(jax.jit(lambda v, b: prefix(v, **task.inputs(b))).lower(variables, batch))
    return (
        apply,
        once * train.steps_per_epoch,
        train.nbytes,
        {**batch, FIELD: train.shapes(*batch["tokens"].shape)},
        cached.task,
    )


def base_bytes(base: Any, quantized: str = "") -> int:
    """Bytes of the frozen weights, with the default options of a number format where one is given.

    A quantized weight has a constant for every block of its fan_in: 8 bits and a share of a float32 where the constants
    are quantized too, else a float32. Padding to whole blocks is not counted.
    """
    leaves = trees.flatten(base.variables)
    small = set(default_targets(base.sites)) if quantized else set()
    bits = {path: 8 * leaf.dtype.itemsize for path, leaf in leaves.items()}
    for path in small:
        form = quant.get(quantized)()
        site = base.sites[path]
        block = min(form.block or math.inf, math.prod(site.dims(site.fan_in)))
        bits[path] = form.bits + ((8 + 32 / 256) if form.double else 32) / block
    return round(sum(bits[path] * leaf.size for path, leaf in leaves.items()) / 8)


def _activations(apply, adapter, task, mask, state, variables, batch) -> int:
    """Bytes that the backward pass waits for."""

    def kept(state, variables, batch):
        adapter_key, base_key = step_keys(state.seed, state.step)

        def model(trainable):
            bound = adapter.bind(variables, delta_of(state._replace(trainable=trainable), mask), key=adapter_key)
            return apply(bound, **task.inputs(batch), dropout_key=base_key)

        return _residuals(model, task, batch, state.trainable)

    there = (variables, state.trainable, state.frozen, batch)
    return _new_bytes(jax.eval_shape(kept, state, variables, batch), there)


def _working(base, task, variables, batch) -> int:
    """Bytes that one layer works with: a layer's share of all that a backward pass through the whole base needs.

    An arm that adapts few layers keeps little, but the layers below still need this much while they run.
    """

    def kept(variables, batch):
        _, key = step_keys(jnp.uint32(0), jnp.int32(0))
        model = lambda v: base.apply(v, **task.inputs(batch), dropout_key=key)  # noqa: E731
        return _residuals(model, task, batch, variables)

    total = _new_bytes(jax.eval_shape(kept, variables, batch), (variables, batch))
    return total // max(1, count_layers(base.sites))


def _residuals(model, task, batch, at) -> Any:
    """What a step's forward pass leaves for the backward pass, by the same rule as in `step`."""
    return jax.vjp(lambda x: task.loss(between_products(model)(x), batch)[0], at)[1]


def _new_bytes(residuals: Any, there: Any) -> int:
    """Bytes of what a backward pass keeps, less the arrays that are there anyway and are merely passed on."""
    left = Counter(_kind(x) for x in jax.tree.leaves(residuals)) - Counter(_kind(x) for x in jax.tree.leaves(there))
    return sum(math.prod(shape) * dtype.itemsize * n for (shape, dtype), n in left.items())


def _kind(leaf: Any) -> tuple[tuple[int, ...], Any]:
    return tuple(leaf.shape), leaf.dtype  # of a key too, which a backward pass keeps to draw dropout again


def _flops(lowered: Any) -> float:
    found = lowered.cost_analysis() or lowered.compile().cost_analysis()  # not every backend tells before compiling
    return float((found[0] if isinstance(found, list) else found)["flops"])


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _micro(batch: Any, count: int) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0] // count, *x.shape[1:]), x.dtype), batch)
