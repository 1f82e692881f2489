"""The product of an activation and a frozen weight in few bits: dense for as long as it lasts, forward and backward.

The packed arrays are tied to the activation (forward) or to its cotangent (backward) before they are read: see
`lift.later`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.lift.later import after
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
    return use.apply(x, _tied(weight, x).dense()), (weight, _Like(x.shape, x.dtype))


def _backward(use, residuals, dy):
    weight, like = residuals
    dense = _tied(weight, dy).dense()
    # Linear in x, so where it is taken does not matter, and the product at zero is never computed.
    zero = varying_alike(jnp.zeros(like.shape, like.dtype), dy)[0]
    return jax.vjp(lambda x: use.apply(x, dense), zero)[1](dy)[0], None


product.defvjp(_forward, _backward)


def _tied(weight: Any, value: jax.Array) -> Any:
    """The weight, to be read after `value` is known."""
    return dataclasses.replace(weight, base=after(weight.base, value))
