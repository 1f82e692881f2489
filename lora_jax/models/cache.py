"""The key-value cache of a decoder: fixed size, written in place, so that one compiled step serves every token."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class ReadPrompt(NamedTuple):
    """A prompt of virtual tokens as the layers have seen it, the same for all rows.

    Attributes:
      embeddings_NxD: what it was computed from.
      layers: per layer keys and values (K, N, D).
    """

    embeddings_NxD: jax.Array
    layers: tuple[tuple[jax.Array, jax.Array], ...]


class Cache(NamedTuple):
    """Keys and values of the tokens so far.

    Attributes:
      keys, values: per layer (B, K, S, D).
      valid: (B, S) bool, the slots that hold real tokens.
      filled: int32 scalar, slots written so far: the next one to write.
      seen: (B,) int32, real tokens so far: the position of the next one (after those of virtual tokens).
      prompt: a prompt of virtual tokens, once a call has read it; it takes no slots.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    valid: jax.Array
    filled: jax.Array
    seen: jax.Array
    prompt: ReadPrompt | None = None


def empty(layers: int, batch: int, heads: int, length: int, head_dim: int, dtype: Any) -> Cache:
    """Returns a cache with room for `length` tokens a row."""
    zeros = tuple(jnp.zeros((batch, heads, length, head_dim), dtype) for _ in range(layers))
    return Cache(
        keys=zeros,
        values=zeros,
        valid=jnp.zeros((batch, length), bool),
        filled=jnp.zeros((), jnp.int32),
        seen=jnp.zeros((batch,), jnp.int32),
    )


def admit(cache: Cache, mask_BxT: jax.Array) -> tuple[Cache, jax.Array]:
    """Makes room for T new tokens: marks their slots, advances `filled`, returns their positions (B, T).

    `filled` of the result counts the new tokens too; their keys are written from `filled - T` on.
    """
    real = mask_BxT.astype(jnp.int32)
    positions = jnp.maximum(cache.seen[:, None] + jnp.cumsum(real, axis=1) - 1, 0)
    valid = jax.lax.dynamic_update_slice(cache.valid, real.astype(bool), (0, cache.filled))
    seen = cache.seen + jnp.sum(real, axis=1)
    return cache._replace(valid=valid, filled=cache.filled + mask_BxT.shape[1], seen=seen), positions


def write(store_BxKxSxD: jax.Array, new_BxKxTxD: jax.Array, start: jax.Array) -> jax.Array:
    """Writes new keys or values from slot `start` on."""
    return jax.lax.dynamic_update_slice(store_BxKxSxD, new_BxKxTxD.astype(store_BxKxSxD.dtype), (0, 0, start, 0))
