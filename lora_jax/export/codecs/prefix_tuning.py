"""Prefix tuning: (N, layers * 2 * key width), where 2l are the keys of layer l and 2l + 1 its values.

A reparametrized prefix is written as the keys and values that its MLP makes, as PEFT does; it comes back without one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import Adapter, get
from lora_jax.adapters.prefix import KEY, Prefix
from lora_jax.errors import UserError
from lora_jax.export import peft_virtual

METHODS = ("prefix",)
PREFIX = peft_virtual.MODULES


def write(adapter: Adapter, delta: Mapping[str, Any], base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fields of the config and the keys and values.

    Raises:
      UserError: a prefix on some layers only.
    """
    one, count, (heads, width) = delta[KEY].collapsed(), base.config.num_hidden_layers, _heads(base)
    if one.layers != tuple(range(count)):
        raise UserError(
            f"this prefix is on the layers {list(one.layers)}; PEFT's format has prefixes on all {count} layers only. "
            "Save it with lora_jax.save instead, or train with layers='all'"
        )
    pairs_LxPxNxF = np.asarray(one.pairs, np.float32)
    flat = pairs_LxPxNxF.transpose(2, 0, 1, 3).reshape(pairs_LxPxNxF.shape[2], -1)
    init = "zero" if adapter.spec["init"] == "zero" else None
    own = {"encoder_hidden_size": width, "prefix_projection": False, "init_weights": init}
    return {**peft_virtual.fields(base, len(flat), width, heads), **own}, {peft_virtual.TENSOR: flat}


def read(config: Mapping, tensors: dict, base: Any, file: Path) -> tuple[Adapter, dict[str, Any]]:
    """The adapter and its delta.

    Raises:
      UserError: a tensor that does not fit the config or the base.
    """
    count, (heads, width) = base.config.num_hidden_layers, _heads(base)
    expected = peft_virtual.fields(base, 0, width, heads)
    del expected["num_virtual_tokens"]
    flat = peft_virtual.take(config, tensors, expected, width * 2 * count, file)
    pairs_LxPxNxF = np.ascontiguousarray(flat.reshape(len(flat), count, 2, width).transpose(1, 2, 0, 3))
    init = "zero" if config.get("init_weights") == "zero" else "random"
    one = Prefix(pairs=jnp.asarray(pairs_LxPxNxF), layers=tuple(range(count)))
    return get("prefix")(length=len(flat), hidden=0, init=init), {KEY: one}


def _heads(base: Any) -> tuple[int, int]:
    """Number of key heads and the width of all keys together."""
    c = base.config
    heads = getattr(c, "num_key_value_heads", c.num_attention_heads)
    return heads, heads * getattr(c, "head_dim", c.hidden_size // c.num_attention_heads)
