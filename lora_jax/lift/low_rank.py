"""The low-rank product `(x a) b` with a derivative rule of its own.

The rule matters more than the form of the product: under plain autodiff XLA makes transposed copies of the operands, or
forms the gradient of the whole weight. Here the gradients of both factors come from matrices contracted over all
leading axes at once.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def low_rank(x: Array, a: Array, b: Array, precision: Any = None) -> Array:
    """Computes `(x a) b` without the transposed copies and the dense product that plain autodiff would make.

    Args:
      x: (*lead, *fan_in), the activation.
      a: (*fan_in, rank), float32; cast to x's dtype in the product.
      b: (rank, *fan_out), float32; likewise.
      precision: of the products, as in `jax.lax.dot_general`.

    Returns:
      (*lead, *fan_out) in x's dtype. The gradients of a and b come out in float32, contracted over all leading
      dimensions at once.
    """
    return _forward(x, a, b, precision)[0]


def _contract(
    x: Array, y: Array, x_axes: Sequence[int], y_axes: Sequence[int], precision: Any, dtype: Any = None
) -> Array:
    numbers = ((tuple(x_axes), tuple(y_axes)), ((), ()))
    return lax.dot_general(x, y, numbers, precision=precision, preferred_element_type=dtype)


def _forward(x, a, b, precision):
    n_in = a.ndim - 1
    z = _contract(x, a.astype(x.dtype), range(x.ndim - n_in, x.ndim), range(n_in), precision)
    return _contract(z, b.astype(x.dtype), (z.ndim - 1,), (0,), precision), (x, z, a, b)


def _backward(precision, residuals, dy):
    x, z, a, b = residuals
    n_out = b.ndim - 1
    dy = dy.astype(x.dtype)
    dz = _contract(dy, b.astype(x.dtype), range(dy.ndim - n_out, dy.ndim), range(1, b.ndim), precision)
    da, db = factor_gradients(x, z, dz, dy, precision)
    dx = _contract(dz, a.astype(x.dtype), (dz.ndim - 1,), (a.ndim - 1,), precision)
    return dx, da.astype(a.dtype), db.astype(b.dtype)


def factor_gradients(x: Array, z: Array, dz: Array, dy: Array, precision: Any) -> tuple[Array, Array]:
    """The gradients of both factors, never that of their product.

    Args:
      x: (*lead, *fan_in), the activation.
      z: (*lead, rank), `x a`.
      dz: (*lead, rank), its cotangent `dy b^T`.
      dy: (*lead, *fan_out), the cotangent of the output.
      precision: of the products.

    Returns:
      (*fan_in, rank) and (rank, *fan_out), float32.
    """
    lead = range(z.ndim - 1)
    # As (rank, *fan_in), turned afterwards: with the thin operand on the left XLA on a CPU is 5 to 9 times as fast, and
    # without the barrier it would swap the operands back.
    da = lax.optimization_barrier(_contract(dz, x, lead, lead, precision, jnp.float32))
    return jnp.moveaxis(da, 0, -1), _contract(z, dy, lead, lead, precision, jnp.float32)


low_rank.defvjp(_forward, _backward)


def flat_low_rank(x: Array, a: Array, b: Array, precision: Any = None) -> Array:
    """`low_rank` on operands flattened to matrices, which is faster on one device.

    Under a mesh the operands keep their dimensions: merging a sharded with an unsharded one would cost all-gathers.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        return low_rank(*varying_alike(x, a, b), precision)
    lead = x.shape[: x.ndim - (a.ndim - 1)]
    rank, out = b.shape[0], b.shape[1:]
    # No -1 in the shapes: it cannot be told for an empty batch.
    n_in, n_out = math.prod(a.shape[:-1]), math.prod(out)
    y = low_rank(x.reshape(math.prod(lead), n_in), a.reshape(n_in, rank), b.reshape(rank, n_out), precision)
    return y.reshape(*lead, *out)


def varying_alike(*arrays: Array) -> list[Array]:
    """Marks all as varying over the manual axes that any of them varies over, which is nothing outside `shard_map`.

    A derivative rule of one's own must return what varies as its input does; the sum over the other axes is the
    transpose of the mark.
    """
    axes = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    whole = frozenset().union(*axes)
    return [x if own == whole else lax.pcast(x, tuple(whole - own), to="varying") for x, own in zip(arrays, axes)]
