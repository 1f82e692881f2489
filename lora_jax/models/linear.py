"""Weights as a module reads them, and the two layers that are hardly more: a product and a table.

What they compute is Linen's `Dense` and `Embed`. The difference is `weight`: `Module.param` traces the initializer at
every call, only to compare shapes, and that is more than half of the time in which a model is traced. A run of
sst2_minilm traces its model five times before the first step.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import UserError
from lora_jax.likelihood import of_product, product

OTHER = "are they those of another config?"


def weight(module: nn.Module, name: str, initializer: Callable, shape: tuple[int, ...]) -> jax.Array:
    """A weight of a module: the caller's, or where the module is initialized, what the initializer draws.

    Args:
      module: bound to a scope.
      name: of the weight.
      initializer: (key, shape) -> array.
      shape: that it must have.

    Raises:
      UserError: there is none, it is no array, or it has another shape.
    """
    if module.is_initializing():
        return module.param(name, initializer, shape)
    path = "/".join((*module.path, name))
    if not module.has_variable("params", name):
        raise UserError(f"the variables have no weight {path!r}; {OTHER}")
    value = nn.meta.unbox(module.get_variable("params", name))
    if not isinstance(value, (jax.Array, np.ndarray)):
        raise UserError(
            f"the weight {path!r} is a {type(value).__name__}, which this function does not know: call it as "
            "lj.lift(apply), which takes adapted and quantized weights"
        )
    if value.shape != shape:
        raise UserError(f"the weight {path!r} has the shape {value.shape}, but this model needs {shape}; {OTHER}")
    return value  # type: ignore[return-value]


class Dense(nn.Module):
    """x W + b over the last axis, in the wider of both dtypes."""

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel_DxF = weight(self, "kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        bias_F = weight(self, "bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        dtype = jnp.result_type(x, kernel_DxF) if bias_F is None else jnp.result_type(x, kernel_DxF, bias_F)
        contract = (((x.ndim - 1,), (0,)), ((), ()))
        y = jax.lax.dot_general(x.astype(dtype), kernel_DxF.astype(dtype), contract)
        return y if bias_F is None else y + bias_F.astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))


class Head(nn.Module):
    """A language model's last product, x W: logits, or with targets the negative log likelihood of each."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, targets: jax.Array | None = None) -> jax.Array:
        kernel_DxV = weight(self, "kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        if targets is not None:
            return of_product(x, kernel_DxV, targets)
        return product(x, kernel_DxV)


class Embed(nn.Module):
    """A table of one row per id; `attend` gives the products with all rows, for a model that ties its head to it."""

    num_embeddings: int
    features: int

    def setup(self):
        shape = (self.num_embeddings, self.features)
        self.embedding = weight(self, "embedding", nn.initializers.normal(), shape)

    def __call__(self, ids: jax.Array) -> jax.Array:
        if self.num_embeddings == 1:  # as in Linen: whatever the ids
            return jnp.broadcast_to(self.embedding, (*ids.shape, self.features))
        return jnp.take(self.embedding, ids, axis=0)

    def attend(self, x: jax.Array, targets: jax.Array | None = None) -> jax.Array:
        """(..., features) -> (..., num_embeddings); with targets the negative log likelihood of each."""
        if targets is not None:
            return of_product(x, self.embedding, targets, 1)
        dtype = jnp.result_type(x, self.embedding)
        return jnp.dot(x.astype(dtype), self.embedding.astype(dtype).T)
