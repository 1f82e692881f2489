"""Attention that stores no scores: which kernel a program gets, and the two kernels of JAX that it may be.

`splash` is JAX's Pallas kernel for TPUs, `cudnn` NVIDIA's for GPUs of compute capability 8 and above, both of them
blockwise with a running softmax (Dao et al. 2022, FlashAttention, arXiv 2205.14135; Dao 2023, arXiv 2307.08691). Away
from its own platform a kernel computes the same numbers slowly, which is how it is tested without one: splash is
interpreted, and in place of cuDNN stands JAX's own implementation of the same call.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.lift import KEPT, keep
from lora_jax.models.masks import HIDDEN, Mask

BLOCK = 128  # a TPU's lanes; a text that is shorter has few scores
BLOCKS = (512, 256, BLOCK)  # of splash, the largest that divides the length


def device() -> jax.Device | None:
    """The device that a program traced now is for; None if it is for several, over which no kernel is split.

    A trace does not see where its arrays lie, so what decides is the mesh in use, then `jax.default_device`, then JAX's
    first device. `with jax.default_device(...)` of a CPU is also how one gets the plain attention elsewhere.
    (`jax.lax.platform_dependent` would see it, but keeps the residuals of all its branches, the plain one's scores
    among them, and traces cuDNN's branch where there is no cuDNN.)
    """
    if jax.sharding.get_abstract_mesh().size > 1:
        return None
    config: Any = jax.config
    chosen = config.jax_default_device
    if chosen is None or isinstance(chosen, str):
        return jax.devices(chosen)[0]
    return chosen


def kernel_for(device: jax.Device | None, dtype: Any, length: int, head_dim: int) -> str | None:
    """Chooses how the tokens of a text attend to each other. This is the only place that does.

    Args:
      device: as of `device`.
      dtype: of queries, keys and values.
      length: of the text.
      head_dim: of each head.

    Returns:
      'splash' or 'cudnn'; 'plain' where the device has a kernel, but not for this: a text shorter than a block, float32
      on a GPU. None where there is no kernel at all, on a CPU and on several devices.
    """
    if device is None or device.platform not in ("gpu", "tpu"):
        return None
    if length < BLOCK:
        return "plain"
    if device.platform == "tpu":
        return "splash" if dtype in (jnp.bfloat16, jnp.float32) else "plain"
    half = dtype in (jnp.bfloat16, jnp.float16)
    fits = length % 2 == 0 and head_dim % 8 == 0 and head_dim <= _largest_head(device)
    return "cudnn" if half and fits else "plain"


def _largest_head(device: jax.Device) -> int:
    """The head that cuDNN's kernel takes on a GPU; 0 where there is no such kernel (AMD's are 'gfx942')."""
    major = str(getattr(device, "compute_capability", "")).split(".")[0]
    return 0 if not major.isdecimal() or int(major) < 8 else 128 if int(major) == 8 else 256


def _on(platform: str) -> bool:
    here = device()
    return here is not None and here.platform == platform


def attend(q_BxTxHxD: jax.Array, k_BxKxTxD: jax.Array, v_BxKxTxD: jax.Array, mask: Mask) -> jax.Array:
    """Scaled dot-product attention by the mask's kernel; arguments as of `attention.attend`.

    Returns:
      (B, T, H * D), q's dtype. What a query that sees nothing gets is any finite number.
    """
    b, t, h, d = q_BxTxHxD.shape
    return {"cudnn": _cudnn, "splash": _splash}[mask.kernel](q_BxTxHxD, k_BxKxTxD, v_BxKxTxD, mask).reshape(b, t, h * d)


def _splash(q_BxTxHxD: jax.Array, k_BxKxTxD: jax.Array, v_BxKxTxD: jax.Array, mask: Mask) -> jax.Array:
    """With length and head padded to whole blocks: zeros add nothing to a product, and nobody sees the keys added."""
    b, t, h, d = q_BxTxHxD.shape
    groups = h // k_BxKxTxD.shape[1]
    more, lanes = -t % BLOCK, -d % BLOCK
    # The kernel does not scale. Rounded once more in bfloat16, and not at all where d is a power of 4.
    q = (q_BxTxHxD.astype(jnp.float32) * d**-0.5).astype(q_BxTxHxD.dtype)
    q = q.reshape(b, t, -1, groups, d).transpose(0, 2, 3, 1, 4)
    q, k, v = (_filled(x, ((more, -2), (lanes, -1))) for x in (q, k_BxKxTxD, v_BxKxTxD))
    segments = mask.segments()
    if segments is None and more and not mask.causal:
        segments = jnp.zeros((b, t), jnp.int32), jnp.zeros((b, t), jnp.int32)
    if segments is not None:
        ids = [_filled(jnp.broadcast_to(x, (b, t)), ((more, -1),), HIDDEN) for x in segments]
    kernel, paired = _splash_kernel(t + more, groups, mask.causal, mask.window, not _on("tpu"))
    over_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    out = jax.vmap(over_heads)(q, k, v, None if segments is None else paired(*ids))
    return out[..., :t, :d].transpose(0, 3, 1, 2, 4)


def _filled(x: jax.Array, fill: tuple[tuple[int, int], ...], value: int = 0) -> jax.Array:
    """`x` with so many more entries at the end of some axes."""
    widths = [(0, 0)] * x.ndim
    for count, axis in fill:
        widths[axis] = (0, count)
    return jnp.pad(x, widths, constant_values=value)


@functools.lru_cache(maxsize=16)
def _splash_kernel(length: int, groups: int, causal: bool, window: int | None, interpret: bool) -> tuple[Any, Any]:
    """The kernel for one key head and its `groups` query heads, and its tuple of segments.

    Kept, since laying out a mask takes a tenth of a second at 4,096 tokens and every layer has the same.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # half a second, which a CPU is spared

    shape, block = (length, length), next(size for size in BLOCKS if length % size == 0)
    seen: Any = splash.CausalMask(shape) if causal else splash.FullMask(shape)
    if window is not None:
        seen = splash.LocalMask(shape, (window - 1, 0 if causal else None), 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    sizes: dict[str, Any] = dict.fromkeys(names, block)
    with jax.ensure_compile_time_eval():  # arrays, not tracers of the program that asked first
        kernel = splash.make_splash_mqa_single_device(
            splash.MultiHeadMask([seen] * groups),
            block_sizes=splash.BlockSizes(**sizes),
            residual_checkpoint_name=KEPT,
            interpret=interpret,
        )
    return kernel, splash.SegmentIds


def _cudnn(q_BxTxHxD: jax.Array, k_BxKxTxD: jax.Array, v_BxKxTxD: jax.Array, mask: Mask) -> jax.Array:
    """Packing and padding as a dense mask, one for all heads: JAX's function takes no segments."""
    b, t = q_BxTxHxD.shape[:2]
    alone = mask.key_mask_BxT is None and mask.segments_BxT is None and mask.window is None
    seen = None if alone else mask.dense()
    if seen is not None:
        seen = jnp.broadcast_to(seen, (b, t, t))[:, None]
    out = _fused(q_BxTxHxD, k_BxKxTxD.swapaxes(1, 2), v_BxKxTxD.swapaxes(1, 2), seen, mask.causal)
    return keep(out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _fused(q_BxTxHxD: jax.Array, k_BxTxKxD, v_BxTxKxD, seen_Bx1xTxT, causal: bool) -> jax.Array:
    """The call with a rule of its own for `vmap`: JAX's (0.10 to 0.12) handle no mask that all heads share.

    So nobody hands the softmax's sums to the backward pass, which runs the forward kernel again: 9 products in place
    of 7.
    """
    return _folded(functools.partial(_call, causal))(q_BxTxHxD, k_BxTxKxD, v_BxTxKxD, seen_Bx1xTxT)


def _call(causal: bool, q, k, v, seen) -> jax.Array:
    own: Any = "cudnn" if _on("gpu") else "xla"
    return jax.nn.dot_product_attention(q, k, v, mask=seen, is_causal=causal, implementation=own)


def _pull(causal: bool, q, k, v, seen, cotangent) -> tuple[jax.Array, ...]:
    return jax.vjp(lambda q, k, v: _call(causal, q, k, v, seen), q, k, v)[1](cotangent)


def _forward(q, k, v, seen, causal: bool) -> tuple[jax.Array, tuple]:
    return _fused(q, k, v, seen, causal), (q, k, v, seen)


def _backward(causal: bool, kept: tuple, cotangent: jax.Array) -> tuple:
    return *_folded(functools.partial(_pull, causal))(*kept, cotangent), None


_fused.defvjp(_forward, _backward)


def _folded(function: Callable) -> Callable:
    """A function of arrays (batch, ...), or None, for which `vmap` makes the batch longer and nothing else."""
    folding = jax.custom_batching.custom_vmap(function)

    @folding.def_vmap
    def rule(size: int, mapped: list, *args: Any) -> tuple[Any, Any]:
        def fold(x: jax.Array, own: bool) -> jax.Array:
            x = x if own else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        pairs = zip(args, mapped, strict=True)
        out = folding(*(None if x is None else fold(x, own) for x, own in pairs))
        return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out), jax.tree.map(lambda _: True, out)

    return folding
