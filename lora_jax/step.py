"""One training step: gradients of the trainable leaves alone, summed over micro-batches, then the optimizer.

The base is an argument: closed over, it would become a constant of the program; donated, it would be gone after the
first step. The state is donated: the delta and its optimizer slots exist once. The loss of a batch is the sum over
its examples or tokens divided by their total weight. Micro-batches add sums and weights, and the division comes last,
so the result is that of the undivided batch and not a mean of means.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax import optim, recompute, trees

Batch = Any


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
      trainable: the delta with None in place of its frozen leaves.
      frozen: the delta with None in place of its trainable leaves.
      opt_state: of the optimizer, for `trainable`.
      step: int32 scalar; updates made so far.
      seed: uint32 scalar; root of the step's random keys. Data, so that another seed does not recompile.
    """

    trainable: Any
    frozen: Any
    opt_state: Any
    step: jax.Array
    seed: jax.Array


def init_state(delta: Any, mask: Any, tx: optax.GradientTransformation, seed: int = 0) -> TrainState:
    """Makes the state of step 0.

    Args:
      delta: from `adapter.init`. Copied: its leaves may be the base's own arrays, and the state is donated.
      mask: from `adapter.trainable(delta)`.
      tx: the optimizer.
      seed: of dropout.
    """
    trainable, frozen = optim.split(_copy(delta), mask)
    return TrainState(
        trainable=trainable,
        frozen=frozen,
        opt_state=tx.init(trainable),
        step=jnp.zeros((), jnp.int32),
        seed=jnp.asarray(seed % 2**32, jnp.uint32),
    )


@jax.jit
def _copy(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def delta_of(state: TrainState, mask: Any) -> Any:
    """The whole delta of a state."""
    return optim.join(mask, state.trainable, state.frozen)


def step_keys(seed: jax.Array, step: jax.Array, micro: Any = 0) -> tuple[jax.Array, jax.Array]:
    """The step's random keys (for the adapter, for the base), folded from names and counts, not from call order."""
    key = jax.random.fold_in(jax.random.key(seed), trees.stable_hash("dropout"))
    key = jax.random.fold_in(jax.random.fold_in(key, step), micro)
    adapter_key, base_key = jax.random.split(key)
    return adapter_key, base_key


def make_train_step(
    apply: Callable,
    adapter: Any,
    task: Any,
    tx: optax.GradientTransformation,
    mask: Any,
    *,
    accumulate: int = 1,
    dropout: bool = True,
    out_shardings: Any = None,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds the jitted step: `train_step` compiled, its state donated.

    Args:
      apply, adapter, task, tx, mask, accumulate, dropout: as for `train_step`.
      out_shardings: shardings of the state, or None for one device.
    """
    step = train_step(apply, adapter, task, tx, mask, accumulate=accumulate, dropout=dropout)
    if out_shardings is None:
        return jax.jit(step, donate_argnums=0, compiler_options=compiler_options())
    return jax.jit(step, donate_argnums=0, out_shardings=(out_shardings, None), compiler_options=compiler_options())


def compiler_options() -> dict[str, Any] | None:
    """What a training step is compiled with.

    On a CPU XLA by default orders a program for many small operations side by side. It then computes again what remat
    left out long before it is needed, and keeps it: the memory that remat saves would be used all the same. Its vectors
    have 256 bits by default; with 512, where a CPU has them, a step of MiniLM takes 2 % less (Zen 5).
    """
    if jax.default_backend() != "cpu":
        return None
    recompute.trim_after_compiling()
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED", "xla_cpu_prefer_vector_width": "512"}


def train_step(
    apply: Callable,
    adapter: Any,
    task: Any,
    tx: optax.GradientTransformation,
    mask: Any,
    *,
    accumulate: int = 1,
    dropout: bool = True,
    kept: Any = None,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The step as a pure function, not compiled.

    Args:
      apply: `lift(base.apply)`.
      adapter: its `bind` puts the delta on the base; its `penalty(delta)`, if there is one, is added to the loss.
      task: `inputs(batch)` and `loss(outputs, batch) -> (sum, weight)`.
      tx: the optimizer, already wrapped by `adapter.wrap` where there is one.
      mask: from `adapter.trainable(delta)`.
      accumulate: number of micro-batches that a batch is divided into; it must divide the leading axis of every array
        of the batch.
      dropout: whether the adapter's and the base's dropout are on.
      kept: tree of booleans like the trainable leaves, arrays allowed: False keeps a leaf as it is, as if it were not
        there (no gradient, no decay, no part in the norm). None changes all.

    Returns:
      `step(state, variables, batch) -> (state, metrics)`; metrics are float32 scalars on the device: `loss_sum`,
      `weight`, `grad_norm` (before clipping) and `penalty`.
    """

    def model(trainable, frozen, variables, batch, keys):
        delta = optim.join(mask, trainable, frozen)
        adapter_key, base_key = keys if dropout else (None, None)
        inputs = task.inputs(batch)
        if dropout:
            inputs = {**inputs, "dropout_key": base_key}
        return apply(adapter.bind(variables, delta, key=adapter_key), **inputs)

    def loss_sum(trainable, frozen, variables, batch, keys):
        # Without the loss: logits that it reads would be copied, to be kept.
        outputs = recompute.between_products(model)(trainable, frozen, variables, batch, keys)
        total, weight = task.loss(outputs, batch)
        return total.astype(jnp.float32), weight.astype(jnp.float32)

    gradient = jax.value_and_grad(loss_sum, has_aux=True)

    def sums(state, variables, batch):
        """(sum of losses, weight, gradient of the sum) over the whole batch."""
        if accumulate == 1:
            keys = step_keys(state.seed, state.step)
            (total, weight), grads = gradient(state.trainable, state.frozen, variables, batch, keys)
            return total, weight, grads

        def body(carry, xs):
            micro, index = xs
            keys = step_keys(state.seed, state.step, index)
            (total, weight), grads = gradient(state.trainable, state.frozen, variables, micro, keys)
            return jax.tree.map(jnp.add, carry, (total, weight, grads)), None

        zeros = jax.tree.map(jnp.zeros_like, state.trainable)
        start = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32), zeros)
        return jax.lax.scan(body, start, (_micro_batches(batch, accumulate), jnp.arange(accumulate)))[0]

    def penalty_of(trainable, frozen):
        return adapter.penalty(optim.join(mask, trainable, frozen)).astype(jnp.float32)

    def step(state: TrainState, variables: Any, batch: Batch):
        total, weight, grads = sums(state, variables, batch)
        grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
        penalty = jnp.zeros((), jnp.float32)
        if getattr(adapter, "penalty", None) is not None:
            penalty, extra = jax.value_and_grad(penalty_of)(state.trainable, state.frozen)
            grads = jax.tree.map(jnp.add, grads, extra)
        grads = _where(kept, grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        new = state._replace(
            trainable=optax.apply_updates(state.trainable, _where(kept, updates)),
            opt_state=opt_state,
            step=state.step + 1,
        )
        norm = optax.global_norm(grads)
        return new, {"loss_sum": total, "weight": weight, "grad_norm": norm, "penalty": penalty}

    return step


def _where(kept: Any, tree: Any) -> Any:
    return tree if kept is None else jax.tree.map(lambda k, x: jnp.where(k, x, 0.0).astype(x.dtype), kept, tree)


def _micro_batches(batch: Batch, count: int) -> Batch:
    """(B, ...) -> (count, B / count, ...).

    Micro-batch i takes rows i, i + count, ...: on a mesh each device then cuts up its own rows and none has to move.
    """
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0), batch)
