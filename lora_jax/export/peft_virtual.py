"""Prompt and prefix tuning in PEFT's format (PROMPT_TUNING, PREFIX_TUNING), both ways.

Described from files written by PEFT 0.21.2. Both hold one tensor, `prompt_embeddings`: a prompt's (N, width), a
prefix's (N, layers * 2 * key width), where 2l are the keys of layer l and 2l + 1 its values. PEFT wraps no model
around the base for these two, so modules that are saved whole (a classifier) have the key `base_model.` + their name,
not `base_model.model.`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import Adapter, get
from lora_jax.adapters import prefix as prefixes
from lora_jax.adapters import prompt as prompts
from lora_jax.errors import UserError
from lora_jax.export import peft_names as names

TYPES = ("PROMPT_TUNING", "PREFIX_TUNING")
TENSOR = "prompt_embeddings"
MODULE_PREFIX = "base_model."
_INITS = {"RANDOM": "random", "SAMPLE_VOCAB": "vocab"}


def write(adapter: Adapter, delta: Mapping[str, Any], base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The config and tensors of a prompt or prefix; modules that are saved whole are the caller's.

    A reparametrized prefix is written as the keys and values that its MLP makes, as PEFT does.

    Args:
      adapter: of the method `prompt` or `prefix`, alone or in a chain with parts trained in place.
      delta: its delta.
      base: the `Base` it belongs to.

    Returns:
      (config, tensors).

    Raises:
      UserError: a prefix on some layers only, or no prompt and no prefix.
    """
    del adapter
    for one in delta.values():
        if isinstance(one, prompts.Prompt):
            embedding_NxD = np.asarray(one.embedding, np.float32)
            config = _common(base, "PROMPT_TUNING", len(embedding_NxD), base.config.hidden_size)
            own = {"prompt_tuning_init": "RANDOM", "num_attention_heads": base.config.num_attention_heads}
            return config | own, {TENSOR: embedding_NxD}
        if isinstance(one, (prefixes.Prefix, prefixes.Reparametrized)):
            return _write_prefix(one.collapsed(), base)
    raise UserError(f"expected a delta of the method prompt or prefix, got entries at {sorted(delta)[:3]}")


def _write_prefix(one: prefixes.Prefix, base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    count, (heads, width) = base.config.num_hidden_layers, _heads(base)
    if one.layers != tuple(range(count)):
        raise UserError(
            f"this prefix is on the layers {list(one.layers)}; PEFT's format has prefixes on all {count} layers only. "
            "Save it with lora_jax.save instead, or train with layers='all'"
        )
    pairs_LxPxNxF = np.asarray(one.pairs, np.float32)
    flat_NxF = pairs_LxPxNxF.transpose(2, 0, 1, 3).reshape(pairs_LxPxNxF.shape[2], -1)
    config = _common(base, "PREFIX_TUNING", len(flat_NxF), width)
    own = {"num_attention_heads": heads, "encoder_hidden_size": width, "prefix_projection": False, "init_weights": None}
    return config | own, {TENSOR: flat_NxF}


def _common(base: Any, kind: str, length: int, width: int) -> dict[str, Any]:
    return {
        "peft_type": kind,
        "task_type": names.task_type(base),
        "base_model_name_or_path": None if base.path is None else str(base.path),
        "inference_mode": True,
        "num_virtual_tokens": length,
        "token_dim": width,
        "num_layers": base.config.num_hidden_layers,
        "num_transformer_submodules": 1,
    }


def _heads(base: Any) -> tuple[int, int]:
    """Number of key heads and the width of all keys together."""
    c = base.config
    heads = getattr(c, "num_key_value_heads", c.num_attention_heads)
    return heads, heads * getattr(c, "head_dim", c.hidden_size // c.num_attention_heads)


def read(
    config: Mapping[str, Any], tensors: dict[str, np.ndarray], base: Any, file: Path
) -> tuple[Adapter, dict[str, Any]]:
    """The adapter and delta of a prompt or prefix.

    Args:
      config: PEFT's, of one of `TYPES`.
      tensors: of the file; what is consumed is taken out.
      base: the `Base` it belongs to.
      file: for messages.

    Returns:
      (adapter, delta). What a file cannot tell (how it was initialized from a text, an MLP) is left at our default.

    Raises:
      UserError: a missing or misshapen tensor, or a config that contradicts the base.
    """
    length, count = _length(config), base.config.num_hidden_layers
    prefix = config["peft_type"] == "PREFIX_TUNING"
    heads, width = _heads(base) if prefix else (None, base.config.hidden_size)
    expected = {"token_dim": width, "num_layers": count, "num_transformer_submodules": 1}
    if prefix:
        expected["num_attention_heads"] = heads
    for name, value in expected.items():
        if config.get(name) not in (None, value):
            raise UserError(
                f"{names.CONFIG}: {name}={config[name]!r}, but this base has {value}; was the adapter made for another "
                "base?"
            )
    flat = _take(tensors, (length, width * 2 * count if prefix else width), file)
    if not prefix:
        init = _INITS.get(str(config.get("prompt_tuning_init")))
        return get("prompt")(length=length, init=init), {prompts.KEY: prompts.Prompt(embedding=jnp.asarray(flat))}
    pairs_LxPxNxF = flat.reshape(length, count, 2, width).transpose(1, 2, 0, 3)
    init = "zero" if config.get("init_weights") == "zero" else "random"
    one = prefixes.Prefix(pairs=jnp.asarray(np.ascontiguousarray(pairs_LxPxNxF)), layers=tuple(range(count)))
    return get("prefix")(length=length, hidden=0, init=init), {prefixes.KEY: one}


def _length(config: Mapping[str, Any]) -> int:
    length = config.get("num_virtual_tokens")
    if type(length) is not int or length < 1:
        raise UserError(f"{names.CONFIG}: num_virtual_tokens={length!r}, expected 1 or more")
    return length


def _take(tensors: dict[str, np.ndarray], shape: tuple, file: Path) -> np.ndarray:
    if TENSOR not in tensors:
        raise UserError(f"{file} lacks the tensor {TENSOR!r}; it holds {sorted(tensors)[:5]}")
    value = tensors.pop(TENSOR)
    if value.shape != shape:
        raise UserError(f"{file}: {TENSOR!r} has the shape {list(value.shape)}, expected {list(shape)}")
    return np.asarray(value, np.float32)
