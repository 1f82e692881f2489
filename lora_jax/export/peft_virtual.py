"""What PEFT's formats of prompt and prefix tuning share.

Described from files written by PEFT 0.21.2. Both hold one tensor, `prompt_embeddings`. PEFT wraps no model around the
base for these two, so modules that are saved whole (a classifier) have the key `base_model.` + their name, not
`base_model.model.`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.errors import UserError
from lora_jax.export import peft_names as names

TENSOR = "prompt_embeddings"
MODULES = "base_model."  # prefix of modules that are saved whole


def fields(base: Any, length: int, width: int, heads: int) -> dict[str, Any]:
    """Fields of the config that both have."""
    return {
        "num_virtual_tokens": length,
        "token_dim": width,
        "num_attention_heads": heads,
        "num_layers": base.config.num_hidden_layers,
        "num_transformer_submodules": 1,
    }


def take(config: Mapping, tensors: dict[str, np.ndarray], expected: Mapping[str, Any], columns: int, file: Path):
    """The tensor of a file, out of `tensors`: (length, columns) float32.

    Args:
      config: PEFT's.
      tensors: of the file.
      expected: fields that must be so where the config names them.
      columns: of the tensor.
      file: for messages.

    Raises:
      UserError: a missing or misshapen tensor, or a config that contradicts the base.
    """
    names.need(config, ("num_virtual_tokens",), file)
    length = config["num_virtual_tokens"]
    if type(length) is not int or length < 1:
        raise UserError(f"{names.CONFIG}: num_virtual_tokens={length!r}, expected 1 or more")
    for name, value in expected.items():
        if config.get(name) not in (None, value):
            raise UserError(
                f"{names.CONFIG}: {name}={config[name]!r}, but this base has {value}; was the adapter made for another "
                "base?"
            )
    return np.asarray(names.take(tensors, TENSOR, (length, columns), file), np.float32)
