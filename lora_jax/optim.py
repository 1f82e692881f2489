"""The optimizer of a delta: AdamW with a schedule, clipping, weight decay where it belongs, and LoRA+.

Only what `adapter.trainable` names is optimized: `split` takes the trainable leaves out of a delta (None stands where a
frozen leaf was), so that gradients and optimizer slots exist for them alone, and `join` puts the delta together again.

AdamW (Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, arXiv 1711.05101) with the update `p <- p -
lr * (m / (sqrt(v) + eps) + decay * p)`, m and v bias-corrected. LoRA+ (Hayou, Ghosh and Yu, LoRA+: Efficient Low Rank
Adaptation of Large Models, 2024, arXiv 2402.12354) multiplies the learning rate of the factor B by a ratio.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.errors import UserError, did_you_mean

SCHEDULES = ("constant", "cosine", "linear")
# Above this, `warmup` counts steps; below, it is a fraction of all steps.
_FRACTION = 1


def make_schedule(kind: str, learning_rate: float, steps: int, warmup: float = 0) -> Callable[[Any], Any]:
    """The learning rate as a function of the number of updates already made.

    Linear from 0 during the warm-up, then constant, or down to 0 at `steps` on a line or half a cosine: step for step
    the schedules of transformers, so that runs compare.

    Args:
      kind: 'constant', 'cosine' or 'linear'.
      learning_rate: the peak.
      steps: of the whole run.
      warmup: below 1 a fraction of `steps` (rounded up), else a number of steps.

    Returns:
      A function of an integer (array) to a float32 scalar.

    Raises:
      UserError: an unknown kind, or a warm-up that is negative, not whole, or as long as the run.
    """
    if kind not in SCHEDULES:
        raise UserError(f"train.schedule={kind!r} is not a schedule; {did_you_mean(str(kind), SCHEDULES)}")
    return schedule(kind, learning_rate, steps, warmup_steps(warmup, steps))


def schedule(kind: str, learning_rate: Any, steps: int, warm: Any) -> Callable[[Any], Any]:
    """As `make_schedule`, with a peak and a warm-up (`warm` steps) that may be arrays, and nothing checked."""

    def rate(count):
        count = jnp.asarray(count, jnp.float32)
        progress = jnp.clip((count - warm) / jnp.maximum(1, steps - warm), 0.0, 1.0)
        falls = {"constant": 0.0 * progress, "linear": progress, "cosine": 0.5 * (1.0 - jnp.cos(jnp.pi * progress))}
        return learning_rate * jnp.where(count < warm, count / jnp.maximum(1, warm), 1.0 - falls[kind])

    return rate


def warmup_steps(warmup: float, steps: int) -> int:
    """`warmup` as a number of steps.

    Raises:
      UserError: negative, not whole, or as long as the run.
    """
    if not isinstance(warmup, (int, float)) or isinstance(warmup, bool) or not 0 <= warmup < math.inf:
        raise UserError(f"train.warmup={warmup!r}: give a number of steps, or a fraction of all steps below 1")
    if warmup < _FRACTION:
        return min(math.ceil(warmup * steps), steps)
    if warmup != int(warmup):
        raise UserError(f"train.warmup={warmup!r}: a number of steps must be whole; a fraction of all steps is below 1")
    if warmup >= steps:
        raise UserError(f"train.warmup={int(warmup)} steps, but the run has {steps}; give fewer, or a fraction below 1")
    return int(warmup)


def make_optimizer(
    learning_rate: float | Callable[[Any], Any],
    *,
    weight_decay: Any = 0.0,
    clip_norm: Any = None,
    lora_plus_ratio: Any = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """AdamW for the trainable part of a delta. Decay, norm and ratio may be arrays, which are never off.

    Args:
      learning_rate: a number, or a schedule.
      weight_decay: of the leaves that `decay_mask` names.
      clip_norm: gradients are scaled down to this global norm if theirs is larger; None or 0 is off.
      lora_plus_ratio: the learning rate of leaves called `b` is multiplied by it.
      b1, b2, eps: of Adam.

    Returns:
      An optax transformation. With `lora_plus_ratio` other than 1 its `init` raises UserError on a delta without a
      leaf `b`.
    """
    off = lambda value, *words: not isinstance(value, jax.Array) and value in words  # noqa: E731
    parts = [] if off(clip_norm, None, 0) else [optax.clip_by_global_norm(clip_norm)]
    parts.append(optax.scale_by_adam(b1=b1, b2=b2, eps=eps))
    if not off(weight_decay, 0):
        parts.append(optax.add_decayed_weights(weight_decay, mask=decay_mask))
    parts.append(optax.scale_by_learning_rate(learning_rate))
    if not off(lora_plus_ratio, 1):
        parts.append(optax.masked(optax.scale(lora_plus_ratio), b_mask))
    return optax.chain(*parts)


def leaf_name(keypath: tuple) -> str:
    """Name of the field (or key) that holds a leaf."""
    last = keypath[-1] if keypath else ""
    return str(getattr(last, "name", getattr(last, "key", last)))


def b_mask(delta: Any) -> Any:
    """True for the leaves called `b`.

    Raises:
      UserError: there is none, so that a LoRA+ ratio would do nothing.
    """
    mask = jax.tree_util.tree_map_with_path(lambda k, _: leaf_name(k) == "b", delta)
    if not any(jax.tree.leaves(mask)):
        names = sorted({leaf_name(k) for k, _ in jax.tree_util.tree_leaves_with_path(delta)})
        raise UserError(
            f"train.lora_plus_ratio needs trainable factors called 'b'; this adapter trains only {', '.join(names)}: "
            "set the ratio to 1 or choose a method with two factors, such as lora"
        )
    return mask


def decay_mask(delta: Any) -> Any:
    """True for the leaves that weight decay applies to: matrices and low-rank factors.

    Biases, norms, scales and other vectors do not decay. What counts is what the axes mean, not how many there are: the
    bias of a DenseGeneral has two axes, a stack of biases has one more, and neither is a matrix. A field in the entry's
    `layout` needs two kinds of axes (fan-in, fan-out, a rank) besides batch axes; a field outside it is a copy of the
    weight, which decays if it has both fan-in and fan-out. Anything that is no entry: two axes or more.

    Args:
      delta: {path: entry}; leaves may be missing (None).

    Returns:
      The tree of bool, structure of `delta`.
    """
    is_entry = lambda x: hasattr(type(x), "layout")  # noqa: E731

    def one(node):
        if not is_entry(node):
            return jnp.ndim(node) >= 2
        return jax.tree_util.tree_map_with_path(lambda k, leaf: _decays(node, k, leaf), node)

    return jax.tree.map(one, delta, is_leaf=is_entry)


def _decays(entry: Any, keypath: tuple, leaf: Any) -> bool:
    roles = entry.layout.get(str(getattr(keypath[0], "name", "")))
    axes = getattr(entry, "axes", None)
    if axes is None:
        return jnp.ndim(leaf) >= 2
    if roles is None:
        return bool(axes.fan_in and axes.fan_out)
    return sum(r != "batch" and (r not in ("fan_in", "fan_out") or bool(getattr(axes, r))) for r in roles) >= 2


def split(tree: Any, mask: Any) -> tuple[Any, Any]:
    """Returns (where the mask is True, where it is False), both of the tree's structure with None in the gaps."""
    chosen = jax.tree.map(lambda m, x: x if m else None, mask, tree)
    return chosen, jax.tree.map(lambda m, x: None if m else x, mask, tree)


def join(mask: Any, chosen: Any, rest: Any) -> Any:
    """Undoes `split`."""
    return jax.tree.map(lambda m, c, r: c if m else r, mask, chosen, rest)
