"""The product of an activation and a frozen weight in few bits: dense for as long as it lasts, forward and backward.

Left to itself a compiler makes every layer dense at the start of the program, since that depends on no activation, and
keeps it for the backward pass, since there the same is computed again. So the packed arrays are tied to the activation
(forward) or to its cotangent (backward) before they are read.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.lift.low_rank import varying_alike


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Like:
    shape: tuple[int, ...]
    dtype: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, weight: Any, use: Any) -> jax.Array:
    """`use.apply(x, weight.dense())` whose derivative keeps nothing but the packed weight, and is none of the weight's.

    Args:
      x: the activation.
      weight: a `QuantizedWeight`.
      use: a `Dot` or `Conv`, linear in x.
    """
    return use.apply(x, _tied(weight, x).dense())


def _forward(x, weight, use):
    return product(x, weight, use), (weight, _Like(x.shape, x.dtype))


def _backward(use, residuals, dy):
    weight, like = residuals
    dense = _tied(weight, dy).dense()
    # Linear in x, so where it is taken does not matter, and the product at zero is never computed.
    zero = varying_alike(jnp.zeros(like.shape, like.dtype), dy)[0]
    return jax.vjp(lambda x: use.apply(x, dense), zero)[1](dy)[0], None


product.defvjp(_forward, _backward)


def _tied(weight: Any, value: jax.Array) -> Any:
    """The weight, to be read after `value` is known."""
    return dataclasses.replace(weight, base=_after(weight.base, value))


@jax.custom_batching.custom_vmap
def _after(codes: jax.Array, value: jax.Array) -> jax.Array:
    """The codes themselves, with a dependency on `value` that no compiler pass removes."""
    return _after_each(codes, value)


@_after.def_vmap
def _after_batched(size, batched, codes, value):
    """One weight for all of a batch of activations stays one weight."""
    del size
    if batched[0]:
        return jax.vmap(_after_each, in_axes=(0, 0 if batched[1] else None))(codes, value), True
    return _after(codes, value[0] if batched[1] else value), False


def _after_each(codes, value):
    if value.size == 0:
        return codes
    return lax.platform_dependent(codes, value, cpu=_impossible_bit, default=_barrier)


def _barrier(codes, value):
    return lax.optimization_barrier((codes, value))[0]


def _impossible_bit(codes, value):
    """XLA drops barriers on CPU. A number that is both below and above zero, which there is none of, does the same."""
    one = value[(0,) * value.ndim]
    return codes ^ ((one < 0) & (one > 0)).astype(codes.dtype)
