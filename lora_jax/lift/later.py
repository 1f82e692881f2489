"""`after`: an array that is not read before another one is known.

What depends on no activation (a frozen weight made dense, or merged with its update) a compiler computes at the start
of the program for all layers, and keeps for the backward pass where the same is computed again. Tied to the activation
(forward) or to its cotangent (backward) it is made where it is used, and lasts as long as one product.
"""

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_batching.custom_vmap
def after(array: jax.Array, value: jax.Array) -> jax.Array:
    """The array itself, with a dependency on `value` that no compiler pass removes.

    Args:
      array: any integers or floats.
      value: any floats. Batched by `vmap` alone, the array stays one array.
    """
    return _after(array, value)


@after.def_vmap
def _batched(size, batched, array, value):
    del size
    if batched[0]:
        return jax.vmap(_after, in_axes=(0, 0 if batched[1] else None))(array, value), True
    return after(array, value[0] if batched[1] else value), False


def _after(array, value):
    if value.size == 0:
        return array
    return lax.platform_dependent(array, value, cpu=_impossible, default=_barrier)


def _barrier(array, value):
    return lax.optimization_barrier((array, value))[0]


def _impossible(array, value):
    """XLA drops barriers on CPU. A number that is both below and above zero, which there is none of, does the same.

    Under a mesh nothing does: the first entry lies on one device, and all would have to be told of it.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        return array
    one = value[(0,) * value.ndim]
    never = (one < 0) & (one > 0)
    if jnp.issubdtype(array.dtype, jnp.integer):
        return array ^ never.astype(array.dtype)
    return jnp.where(never, jnp.zeros_like(array), array)
