"""Negative log likelihoods: of logits, and of the product that would be a language model's logits.

Logits are the largest arrays of a language model's step, one number for every token and every word of the vocabulary,
and their gradient is as large again. `of_product` holds them for a part of the tokens at a time. Since the likelihood
of a token is one number, its gradient in what the token's logits are made of is that number's cotangent times a vector
that the forward pass can make: it goes over the parts once, and neither stores logits nor computes them again (as the
fused losses of Hsu et al. 2024, Liger Kernel, arXiv 2410.10989, section 3.2, do for one mean over all tokens).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from lora_jax.lift import opened_as
from lora_jax.lift.later import after

FEW = 512  # tokens of a part at least, so that its products are large ones
PARTS = 8  # at most, since each is written out in the program

Array = jax.Array


@jax.custom_vjp
def cross_entropy(logits: Array, targets: Array) -> Array:
    """Negative log likelihood of each target.

    With a derivative rule of its own: of the softmax only each row's normalizer is kept, and the gradient is written in
    one pass from it, where plain autodiff keeps the exponentials too. Reverse-mode only.

    Args:
      logits: (..., V), any float; computed in float32.
      targets: (...), int32.

    Returns:
      (...), float32.
    """
    return _nll(logits, targets)[0]


def _nll(logits: Array, targets: Array) -> tuple[Array, Any]:
    z = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(z, axis=-1)
    nll = total - jnp.sum(jnp.where(_hit(z, targets), z, 0.0), axis=-1)
    # After the loss: nothing else waits for that, so a compiler may put it last and hold the logits all the while.
    return nll, (logits, targets, after(total, nll))


def _nll_pulled(kept: Any, cotangent: Array) -> tuple[Array, None]:
    logits, targets, total = kept
    probs = jnp.exp(logits.astype(jnp.float32) - total[..., None])
    return (cotangent[..., None] * (probs - _hit(probs, targets))).astype(logits.dtype), None


cross_entropy.defvjp(_nll, _nll_pulled)


def _hit(z: Array, targets: Array) -> Array:
    """Where the target is: by comparison, not gathered, so that a vocabulary split over devices stays where it is."""
    return targets[..., None] == lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def of_product(x_BxTxD: Array, weight: Array, targets_BxT: Array, axis: int = 0) -> Array:
    """`cross_entropy(x weight, targets)`, with the logits of a part of the tokens at a time.

    A weight that is itself trained has the logits of all tokens there, as under `lift` has one that is adapted or
    quantized. Reverse-mode only.

    Args:
      x_BxTxD: any float.
      weight: (D, V), or (V, D) with `axis` 1.
      targets_BxT: int32.
      axis: of the weight, that is contracted.

    Returns:
      (B, T) float32.
    """
    return _PARTED[axis](x_BxTxD, weight, targets_BxT)


def _whole(axis: int, x: Array, weight: Array, targets: Array) -> Array:
    return cross_entropy(product(x, weight, axis), targets)


def _parted(axis: int) -> Any:
    """`_whole`, part by part. A method's dropout must see all tokens at once, or each part would lose the same ones."""

    @opened_as(functools.partial(_whole, axis), f"likelihood_of_product_{axis}")
    def parted(x_BxTxD: Array, weight: Array, targets_BxT: Array) -> Array:
        return _by_parts(lambda x, targets: (_whole(axis, x, weight, targets),), x_BxTxD, targets_BxT)[0]

    return parted


_PARTED = tuple(map(_parted, (0, 1)))


def product(x: Array, weight: Array, axis: int = 0) -> Array:
    """x weight over the last axis of x and an axis of the weight, in the wider of both dtypes."""
    dtype = jnp.result_type(x, weight)
    return lax.dot_general(x.astype(dtype), weight.astype(dtype), (((x.ndim - 1,), (axis,)), ((), ())))


def _by_parts(function: Any, x_BxTxD: Array, targets_BxT: Array) -> list[Array]:
    """The results of a function of a part of the columns, joined again. A part waits for the last result of the one
    before it: else a compiler may have the logits of all parts there at a time."""
    b, t = targets_BxT.shape
    count = max(1, min(PARTS, b * t // FEW, t))
    size = -(-t // count)
    found: list[tuple[Array, ...]] = []
    for start in range(0, max(t, 1), max(size, 1)):
        x, targets = x_BxTxD[:, start : start + size], targets_BxT[:, start : start + size]
        found.append(function(after(x, found[-1][-1]) if found else x, targets))
    return [jnp.concatenate(parts, axis=1) for parts in zip(*found, strict=True)]


def _forward(x, weight, targets, axis: int) -> tuple[Array, Any]:
    wanted = weight.perturbed
    x, weight, targets = (argument.value for argument in (x, weight, targets))
    if wanted:
        return jax.vjp(lambda x, weight: _whole(axis, x, weight, targets), x, weight)

    def one(x: Array, targets: Array) -> tuple[Array, Array]:
        nll, kept = _nll(product(x, weight, axis), targets)
        d_logits = _nll_pulled(kept, jnp.ones_like(nll))[0]
        return nll, product(d_logits, weight, 1 - axis).astype(x.dtype)

    nll, dx = _by_parts(one, x, targets)
    return nll, dx


def _backward(axis: int, kept: Any, cotangent: Any) -> tuple:
    if isinstance(cotangent, SymbolicZero):
        return None, None, None
    if callable(kept):
        return *kept(cotangent), None
    return (cotangent[..., None] * kept).astype(kept.dtype), None, None


of_product.defvjp(_forward, _backward, symbolic_zeros=True)
