"""Which query may look at which key: as a dense mask, or as the few arrays that a kernel makes it from.

The plain attention reads a dense mask, which a call makes once for all its layers. A kernel makes its own, block by
block, from what it is told (causal, a window, the segment of each token), so a `Mask` carries that and no (T, S) array.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

HIDDEN = -1  # the segment of a key that nobody sees; segments of tokens are 0 and above


def visible(
    query_slots_T: jax.Array,
    key_slots_S: jax.Array,
    *,
    key_mask_BxS: jax.Array | None = None,
    segments_BxT: jax.Array | None = None,
    causal: bool = False,
    window: int | None = None,
) -> jax.Array | None:
    """Which query may look at which key.

    Args:
      query_slots_T: int32, the place of each query among the keys.
      key_slots_S: int32, 0 to S-1.
      key_mask_BxS: True or 1 where a key is a real token.
      segments_BxT: segment of every token when queries and keys are the same tokens; others are invisible.
      causal: no query sees a later key.
      window: with `causal`, a query sees the last `window` keys, itself included.

    Returns:
      (B or 1, T or 1, S) bool, or None if everything is visible.
    """
    parts = []
    ahead_TxS = query_slots_T[:, None] - key_slots_S[None, :]
    if causal:
        parts.append(ahead_TxS[None] >= 0)
    if window is not None:
        parts.append(ahead_TxS[None] < window)
    if key_mask_BxS is not None:
        parts.append(key_mask_BxS.astype(bool)[:, None, :])
    if segments_BxT is not None:
        parts.append(segments_BxT[:, :, None] == segments_BxT[:, None, :])
    if not parts:
        return None
    mask = parts[0]
    for part in parts[1:]:
        mask = mask & part
    return mask


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["key_mask_BxT", "segments_BxT"],
    meta_fields=["kernel", "length", "causal", "window"],
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """What the tokens of a text see of each other, told to a kernel; the meaning is that of `visible`.

    Attributes:
      kernel: which one reads it, a name of `kernels.kernel_for`; 'plain' is none.
      length: T, of queries and keys, which are the same tokens.
      causal, window: as of `visible`.
      key_mask_BxT, segments_BxT: as of `visible`, None where the caller gave none.
    """

    kernel: str
    length: int
    causal: bool
    window: int | None
    key_mask_BxT: jax.Array | None
    segments_BxT: jax.Array | None

    def dense(self) -> jax.Array | None:
        """The same as `visible` returns, for who cannot use the kernel."""
        slots = jnp.arange(self.length, dtype=jnp.int32)
        arrays = {"key_mask_BxS": self.key_mask_BxT, "segments_BxT": self.segments_BxT}
        return visible(slots, slots, **arrays, causal=self.causal, window=self.window)

    def segments(self) -> tuple[jax.Array, jax.Array] | None:
        """Padding and packing as segments: a query sees the keys of its own. Queries, keys: int32, (B, T) each.

        A query of padding sees what it sees in the dense mask; None if there is neither padding nor packing.
        """
        own = self.segments_BxT
        if self.key_mask_BxT is None:
            return None if own is None else (own, own)
        real = self.key_mask_BxT.astype(bool)
        own = jnp.zeros(real.shape, jnp.int32) if own is None else own
        return own, jnp.where(real, own, HIDDEN)


def among(
    length: int,
    kernel: str | None,
    *,
    key_mask_BxT: jax.Array | None = None,
    segments_BxT: jax.Array | None = None,
    causal: bool = False,
    window: int | None = None,
) -> jax.Array | Mask | None:
    """What the tokens of a text see of each other.

    Args:
      length: of the text, T.
      kernel: as `kernels.kernel_for` chose.
      key_mask_BxT, segments_BxT, causal, window: as of `visible`.

    Returns:
      A `Mask`, or without a kernel what `visible` does.
    """
    mask = Mask(kernel or "plain", length, causal, window, key_mask_BxT, segments_BxT)
    return mask.dense() if kernel is None else mask


def take_queries(mask: jax.Array | Mask | None, at_BxQ: jax.Array) -> jax.Array | None:
    """What the queries at chosen slots see: (B, Q, S) bool, or as of `visible` where all queries see the same."""
    mask_BxTxS = mask.dense() if isinstance(mask, Mask) else mask
    if mask_BxTxS is None or mask_BxTxS.shape[1] == 1:
        return mask_BxTxS
    rows = jnp.broadcast_to(mask_BxTxS, (at_BxQ.shape[0], *mask_BxTxS.shape[1:]))
    return jnp.take_along_axis(rows, at_BxQ[:, :, None], axis=1)
