"""The merged product `x (W + a b)` with a derivative rule of its own, and when it is the better form.

Under plain autodiff a merged weight costs its own gradient, the dense `x^T dy`. Here the gradients of both factors come
from thin matrices, as in `low_rank`, and the weight's is formed only where someone asked for it. The merged weight is
made twice, for the product and for the gradient of the input: it lasts no longer than either.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from lora_jax.lift.later import after
from lora_jax.lift.low_rank import factor_gradients

Array = jax.Array

FORMS = ("auto", "factored", "merged")


class Options(NamedTuple):
    """Of a product.

    Attributes:
      precision, preferred: as in `jax.lax.dot_general`.
      again: whether the backward pass computes it again (remat). A merged weight depends on no activation, so XLA on a
        CPU, which drops the barriers around what is computed again, would keep those of all layers from one pass to the
        other; tied to the activation it cannot. Elsewhere the tie would have it keep the activation.
    """

    precision: Any = None
    preferred: Any = None
    again: bool = False


def pays(tokens: int, n_in: int, n_out: int) -> bool:
    """Whether merging costs less than the two thin products and their sums.

    Factored, every token costs `rank` products more for each of n_in + n_out numbers, and as many numbers are written,
    read and added once more; merged, each weight does, twice. Both counts say: from the harmonic mean of n_in and
    n_out on, whatever the rank.
    """
    return tokens * (n_in + n_out) > 2 * n_in * n_out


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def merged(x: Array, weight: Array, a: Array, b: Array, options: Options) -> Array:
    """Computes `x (W + a b)` from matrices.

    Args:
      x: (tokens, n_in), the activation.
      weight: (n_in, n_out). Its gradient is computed only if it is asked for.
      a: (n_in, rank) float32.
      b: (rank, n_out) float32.
      options: of the product.

    Returns:
      (tokens, n_out). The update is added in float32 and rounded to the weight's dtype; the factors' gradients come out
      in float32.
    """
    return _dot(x, _merge(weight, a, b), 0, options.precision, options.preferred)


def _merge(weight: Array, a: Array, b: Array) -> Array:
    return (weight.astype(jnp.float32) + a.astype(jnp.float32) @ b.astype(jnp.float32)).astype(weight.dtype)


def _dot(x: Array, weight: Array, axis: int, precision: Any, preferred: Any = None) -> Array:
    """Contracts the last axis of x with an axis of the weight."""
    numbers = (((1,), (axis,)), ((), ()))
    return lax.dot_general(x, weight, numbers, precision=precision, preferred_element_type=preferred)


def _forward(x, weight, a, b, options):
    # A structure says statically whether the weight's own gradient is wanted: () is, None is not.
    wanted = () if weight.perturbed else None
    x, weight, a, b = (argument.value for argument in (x, weight, a, b))
    whole = _merge(weight, a, after(b, x) if options.again else b)
    return _dot(x, whole, 0, options.precision, options.preferred), (x, weight, a, b, wanted)


def _backward(options, residuals, dy):
    x, weight, a, b, wanted = residuals
    if isinstance(dy, SymbolicZero):
        return None, None, None, None
    precision = options.precision
    dy = dy.astype(x.dtype)
    dx = _dot(dy, _merge(weight, a, after(b, dy)), 1, precision).astype(x.dtype)
    z = _dot(x, a.astype(x.dtype), 0, precision)
    dz = _dot(dy, b.astype(x.dtype), 1, precision)
    da, db = factor_gradients(x, z, dz, dy, precision)
    if wanted is None:
        return dx, None, da.astype(a.dtype), db.astype(b.dtype)
    numbers = (((0,), (0,)), ((), ()))
    dw = lax.dot_general(x, dy, numbers, precision=precision, preferred_element_type=jnp.float32)
    return dx, dw.astype(weight.dtype), da.astype(a.dtype), db.astype(b.dtype)


merged.defvjp(_forward, _backward, symbolic_zeros=True)


def flat_merged(x: Array, weight: Array, a: Array, b: Array, options: Options) -> Array:
    """`merged` on (*lead, *fan_in), a weight (*fan_in, *fan_out) and its factors, flattened to matrices."""
    fan_in, fan_out = a.shape[:-1], b.shape[1:]
    lead = x.shape[: x.ndim - len(fan_in)]
    # No -1 in the shapes: it cannot be told for an empty batch.
    n_in, n_out, rank = math.prod(fan_in), math.prod(fan_out), b.shape[0]
    y = merged(
        x.reshape(math.prod(lead), n_in), weight.reshape(n_in, n_out),
        a.reshape(n_in, rank), b.reshape(rank, n_out), options,
    )  # fmt: skip
    return y.reshape(*lead, *fan_out)
