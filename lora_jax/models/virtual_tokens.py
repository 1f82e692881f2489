"""Virtual tokens as the families read them: the optional collection `virtual` (`lora_jax.virtual` says what it holds).

They take the positions 0 to N-1, the text those after. Every token of the text sees them all, in every packed segment;
in a layer with a sliding window, those whose position lies inside it. This is what PEFT 0.21.2 computes with
transformers 5.23, which it hands the prefix as a filled cache. Read when a call is traced: without the collection the
program is the one without virtual tokens, bit for bit.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_jax.errors import UserError
from lora_jax.virtual import COLLECTION


class Beside(NamedTuple):
    """What the tokens of a text attend to in one layer besides each other.

    Attributes:
      keys_KxNxD, values_KxNxD: the same for all rows.
      mask_BxTxN: bool, (B or 1, T, N), True = visible; None = all.
    """

    keys_KxNxD: jax.Array
    values_KxNxD: jax.Array
    mask_BxTxN: jax.Array | None = None


class Virtual(NamedTuple):
    """Virtual tokens of one call.

    Attributes:
      length: how many.
      prompt_NxD: their embeddings, or None.
      prefix: `{layer: Beside}` of a prefix, or of a prompt that a cache has read.
    """

    length: int
    prompt_NxD: jax.Array | None
    prefix: Mapping[int, Beside]


def read(module: nn.Module, *, layers: int, width: int, kv_heads: int, head_dim: int) -> Virtual | None:
    """The virtual tokens that a model was given.

    Args:
      module: the outermost module.
      layers, width, kv_heads, head_dim: the model's sizes.

    Returns:
      A Virtual, or None.

    Raises:
      UserError: they were made for another model.
    """
    if module.has_variable(COLLECTION, "prompt"):
        prompt: Any = module.get_variable(COLLECTION, "prompt")
        _check(prompt.shape[1:] == (width,), "prompt", f"width {prompt.shape[1:]}", f"({width},)")
        return Virtual(prompt.shape[0], prompt, {})
    if not module.has_variable(COLLECTION, "prefix"):
        return None
    given: Mapping[str, Any] = module.get_variable(COLLECTION, "prefix")
    found = {int(layer): pair for layer, pair in given.items()}
    _check(max(found) < layers, "prefix", f"layer {max(found)}", f"layers 0 to {layers - 1}")

    def heads(x_NxF: Any) -> jax.Array:
        fits = x_NxF.shape[-1] == kv_heads * head_dim
        _check(fits, "prefix", f"keys of width {x_NxF.shape[-1]}", f"{kv_heads} key heads of {head_dim}")
        return x_NxF.reshape(-1, kv_heads, head_dim).transpose(1, 0, 2)

    prefix = {layer: Beside(heads(pair["keys"]), heads(pair["values"])) for layer, pair in found.items()}
    return Virtual(next(iter(prefix.values())).keys_KxNxD.shape[1], None, prefix)


def _check(fits: bool, name: str, given: str, expected: str) -> None:
    if not fits:
        raise UserError(f"the {name} has {given}, this model {expected}: was the delta made for another base?")


def in_window(positions_BxT: jax.Array, length: int, window: int | None) -> jax.Array | None:
    """Which virtual tokens lie inside a sliding window: (B or 1, T, N) bool, None for all.

    Positions decide, not slots: packed segments and padding on the left must not push them out.
    """
    if window is None:
        return None
    return positions_BxT[:, :, None] - jnp.arange(length, dtype=jnp.int32)[None, None] < window
