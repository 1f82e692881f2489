"""Attention: which way a call takes, and the plain one with a derivative rule of its own.

Plain autodiff reads and writes the scores of all heads about twice as often as need be: a softmax that is normalized
before the product with the values, its own derivative with a sum over every row, and in a step that keeps no scores the
whole softmax once more. Here the output is divided, not the scores; of a row are kept its largest logit and the
logarithm of its sum; and the sum in the softmax's derivative is that of output times cotangent (Dao et al. 2022,
FlashAttention, arXiv 2205.14135, section 3 and appendix B.2). What differs from there: the scores of all keys are there
at a time, since a CPU gains from large products, and those of all queries up to `LONG`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.dropout import Dropped, drop
from lora_jax.lift import keep
from lora_jax.models import kernels
from lora_jax.models.masks import Mask
from lora_jax.models.virtual_tokens import Beside

LONG = 512  # queries; beyond, attention goes over them in chunks
CHUNK = 256
LEAST = float(jnp.finfo(jnp.float32).min)

Array = jax.Array


def attend(
    q_BxTxHxD: Array,
    k_BxKxSxD: Array,
    v_BxKxSxD: Array,
    mask: Array | Mask | None,
    dropout: Dropped | None = None,
    beside: Beside | None = None,
    recomputed: bool = False,
) -> Array:
    """Scaled dot-product attention; H = K * G query heads share K key heads, G neighbours each.

    Reverse-mode only, as the kernels are: `jax.jvp` through it is not defined.

    Args:
      q_BxTxHxD: queries.
      k_BxKxSxD, v_BxKxSxD: keys and values, heads before time (the layout of the cache).
      mask: as of `masks`, dense (B or 1, T or 1, S) or for a kernel. A query that sees nothing gets a mean of all
        values (from a kernel any finite number), never NaN.
      dropout: applied to the probabilities (B, K, G, T, S), or (B, K, G, T, N + S) with `beside`. None drops nothing.
      beside: keys and values of N virtual tokens; they come first. The result is that of concatenated keys and values,
        but neither these nor a cache are copied.
      recomputed: whether the layer is one that the backward pass computes again whole (remat). Then plain autodiff does
        it, with no more than one layer's scores to hold: of the rule's products XLA on a CPU orders those of several
        layers side by side (30M Llama, 8 rows of 512 tokens, remat: 503 MB of temporaries, by the rule 776).

    Returns:
      (B, T, H * D), q's dtype. Logits and softmax are float32.
    """
    if isinstance(mask, Mask):
        if dropout is None and beside is None and q_BxTxHxD.shape[1] == k_BxKxSxD.shape[2] == mask.length:
            return _one_step(q_BxTxHxD, k_BxKxSxD, v_BxKxSxD, mask)
        mask = mask.dense()
    if beside is not None or (recomputed and not _by_chunks(q_BxTxHxD.shape[1], dropout)):
        return keep(_by_autodiff(q_BxTxHxD, k_BxKxSxD, v_BxKxSxD, mask, dropout, beside))
    b, t, h, d = q_BxTxHxD.shape
    kv = k_BxKxSxD.shape[1]
    key, rate = (None, 0.0) if dropout is None else dropout
    q_BxKxGxTxD = q_BxTxHxD.reshape(b, t, kv, h // kv, d).transpose(0, 2, 3, 1, 4)
    return _plain(q_BxKxGxTxD, k_BxKxSxD, v_BxKxSxD, mask, key, rate)


def _named(q_BxTxHxD: Array, k_BxKxTxD: Array, v_BxKxTxD: Array, mask: Mask) -> Array:
    """`attend` by the kernel that the mask names, or by none."""
    if mask.kernel == "plain":
        return attend(q_BxTxHxD, k_BxKxTxD, v_BxKxTxD, mask.dense())
    return kernels.attend(q_BxTxHxD, k_BxKxTxD, v_BxKxTxD, mask)


# A function with its own derivative, though it is the usual one: nobody opens it, so whatever the length chooses, a
# trace has the same steps, and who splits a model does it once for all lengths.
_one_step = jax.custom_vjp(_named)
_one_step.defvjp(
    lambda q, k, v, mask: jax.vjp(lambda q, k, v: _named(q, k, v, mask), q, k, v),
    lambda pull, cotangent: (*pull(cotangent), None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _plain(q_BxKxGxTxD: Array, k_BxKxSxD: Array, v_BxKxSxD: Array, mask_BxTxS, key, rate: float) -> Array:
    """(B, T, H * D), q's dtype; `key` and `rate` are of dropout, None and 0 without."""
    return _forward(q_BxKxGxTxD, k_BxKxSxD, v_BxKxSxD, mask_BxTxS, key, rate)[0]


def _forward(q, k, v, mask, key, rate: float) -> tuple[Array, Any]:
    if _by_chunks(q.shape[3], key):
        one = lambda xs: _attended(xs["q"], k, v, xs.get("mask", mask), None, 0.0)  # noqa: E731
        out, top, log_sum = (_whole(x, q.shape[3]) for x in jax.lax.map(one, _cut(q.shape[3], mask, q=q)))
    else:
        out, top, log_sum = _attended(q, k, v, mask, key, rate)
    # In the layout that goes out, which the factors' gradients of the product that follows read too.
    out, top, log_sum = (keep(x) for x in (_joined(out), top, log_sum))
    return out, (q, k, v, mask, key, out, top, log_sum)


def _joined(x_BxKxGxTxD: Array) -> Array:
    """(B, T, H * D)."""
    b, k, g, t, d = x_BxKxGxTxD.shape
    return x_BxKxGxTxD.transpose(0, 3, 1, 2, 4).reshape(b, t, k * g * d)


def _parted(x_BxTxF: Array, like_BxKxGxTxD: Array) -> Array:
    """Undoes `_joined`."""
    b, k, g, t, d = like_BxKxGxTxD.shape
    return x_BxTxF.reshape(b, t, k, g, d).transpose(0, 2, 3, 1, 4)


def _attended(q_BxKxGxTxD, k_BxKxSxD, v_BxKxSxD, mask_BxTxS, key, rate) -> tuple[Array, Array, Array]:
    """The output (B, K, G, T, D); of every query the largest logit and the logarithm of its sum (B, K, G, T, 1)."""
    logits = _logits(q_BxKxGxTxD, k_BxKxSxD, mask_BxTxS)
    top = jnp.max(logits, axis=-1, keepdims=True)
    parts = jnp.exp(logits - top)
    total = jnp.sum(parts, axis=-1, keepdims=True)
    parts = parts if key is None else drop(key, rate, parts)
    out = _dot("bkgts,bksd->bkgtd", parts.astype(v_BxKxSxD.dtype), v_BxKxSxD)
    return (out / total).astype(q_BxKxGxTxD.dtype), top, jnp.log(total)


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _logits(q_BxKxGxTxD: Array, k_BxKxSxD: Array, mask_BxTxS: Array | None) -> Array:
    """(B, K, G, T, S) float32; the least number where a key is not seen."""
    return masked(_dot("bkgtd,bksd->bkgts", q_BxKxGxTxD, k_BxKxSxD) * q_BxKxGxTxD.shape[-1] ** -0.5, mask_BxTxS)


def masked(logits_BxKxGxTxS: Array, mask_BxTxS: Array | None) -> Array:
    """The logits, and the least number where a key is not seen."""
    return logits_BxKxGxTxS if mask_BxTxS is None else jnp.where(mask_BxTxS[:, None, None], logits_BxKxGxTxS, LEAST)


def _backward(rate: float, kept: Any, cotangent: Array) -> tuple:
    q, k, v, mask, key, out, top, log_sum = kept
    out, cotangent = _parted(out, q), _parted(cotangent, q)
    if not _by_chunks(q.shape[3], key):
        dq, dk, dv = _pulled(q, k, v, mask, key, rate, out, top, log_sum, cotangent)
        return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None

    def body(sums, xs):
        dq, dk, dv = _pulled(**{"k": k, "v": v, "mask": mask, "key": None, "rate": 0.0, **xs})
        return (sums[0] + dk, sums[1] + dv), dq

    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    chunks = _cut(q.shape[3], mask, q=q, out=out, top=top, log_sum=log_sum, cotangent=cotangent)
    (dk, dv), dq = jax.lax.scan(body, zeros, chunks)
    return _whole(dq, q.shape[3]), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_plain.defvjp(_forward, _backward)


def _pulled(q, k, v, mask, key, rate, out, top, log_sum, cotangent) -> tuple[Array, Array, Array]:
    """Cotangents of q (its dtype), k and v (float32). The probabilities are made again from what was kept."""
    # Not by the sum of both: where a query sees nothing, the least number swallows the logarithm.
    probs = jnp.exp((_logits(q, k, mask) - top) - log_sum)
    left = (lambda x: x) if key is None else (lambda x: drop(key, rate, x))
    dv = _dot("bkgts,bkgtd->bksd", left(probs).astype(v.dtype), cotangent)
    d_probs = left(_dot("bkgtd,bksd->bkgts", cotangent, v))
    # As products of vectors: a sum is a reduction, with which XLA on a CPU fuses what follows into a slow loop.
    rows = _dot("bkgtd,bkgtd->bkgt", cotangent, out)[..., None]
    # Of a query that sees nothing the probabilities are not 0, but no logit of it counts.
    scale = jnp.where(top > LEAST, q.shape[-1] ** -0.5, 0.0)
    d_logits = (probs * (d_probs - rows) * scale).astype(q.dtype)
    dq = _dot("bkgts,bksd->bkgtd", d_logits, k).astype(q.dtype)
    return dq, _dot("bkgts,bkgtd->bksd", d_logits, q), dv


def _by_chunks(queries: int, dropout: Any) -> bool:
    """Whether queries come chunk by chunk, so that memory for scores is that of one chunk.

    All of them take T * S for every head and layer (Rabe and Staats 2021, arXiv 2112.05682, who cut up keys as well).
    """
    return queries > LONG and dropout is None


def _cut(t: int, mask_BxTxS: Array | None, **arrays: Array) -> dict[str, Array]:
    """Arrays (B, K, G, T, ...) as (chunks, B, K, G, CHUNK, ...), the last one filled up with zeros.

    The mask is among them as (chunks, B, CHUNK, S), unless it is the same for all queries.
    """
    count = -(-t // CHUNK)

    def cut(x: Array, axis: int = 3) -> Array:
        x = jnp.pad(x, [(0, count * CHUNK - t if i == axis else 0) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, CHUNK, *x.shape[axis + 1 :]), axis, 0)

    own = {name: cut(x) for name, x in arrays.items()}
    return own if mask_BxTxS is None or mask_BxTxS.shape[1] != t else own | {"mask": cut(mask_BxTxS, 1)}


def _whole(x: Array, t: int) -> Array:
    """Undoes `_cut` for one array."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, x.shape[-1])[:, :, :, :t]


def _by_autodiff(q_BxTxHxD, k_BxKxSxD, v_BxKxSxD, mask_BxTxS, dropout: Dropped | None, beside: Beside | None) -> Array:
    """`attend` by the textbook."""
    b, t, h, d = q_BxTxHxD.shape
    kv, n = k_BxKxSxD.shape[1], 0 if beside is None else beside.values_KxNxD.shape[1]
    q = q_BxTxHxD.reshape(b, t, kv, h // kv, d)
    logits = masked(_dot("btkgd,bksd->bkgts", q, k_BxKxSxD) * d**-0.5, mask_BxTxS)
    if beside is not None:
        own = _dot("btkgd,knd->bkgtn", q, beside.keys_KxNxD.astype(q.dtype)) * d**-0.5
        logits = jnp.concatenate([masked(own, beside.mask_BxTxN), logits], axis=-1)
    probs = jax.nn.softmax(logits, axis=-1).astype(v_BxKxSxD.dtype)
    probs = probs if dropout is None else dropout(probs)
    out = jnp.einsum("bkgts,bksd->btkgd", probs[..., n:], v_BxKxSxD)
    if beside is not None:
        out = jnp.einsum("bkgtn,knd->btkgd", probs[..., :n], beside.values_KxNxD.astype(probs.dtype)) + out
    return out.reshape(b, t, h * d)
