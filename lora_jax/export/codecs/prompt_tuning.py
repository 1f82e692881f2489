"""Prompt tuning: the embeddings of the virtual tokens, (N, width)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import Adapter, get
from lora_jax.adapters.prompt import KEY, Prompt
from lora_jax.export import peft_virtual

METHODS = ("prompt",)
PREFIX = peft_virtual.MODULES
_INITS = {"RANDOM": "random", "SAMPLE_VOCAB": "vocab"}


def write(adapter: Adapter, delta: Mapping[str, Any], base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fields of the config and the embeddings; a text to start from is no part of the file."""
    embedding_NxD = np.asarray(delta[KEY].embedding, np.float32)
    words = {ours: theirs for theirs, ours in _INITS.items()}
    length, width = embedding_NxD.shape
    config = peft_virtual.fields(base, length, width, base.config.num_attention_heads)
    init = words.get(adapter.spec["init"], "RANDOM")
    return {**config, "prompt_tuning_init": init}, {peft_virtual.TENSOR: embedding_NxD}


def read(config: Mapping, tensors: dict, base: Any, file: Path) -> tuple[Adapter, dict[str, Any]]:
    """The adapter and its delta; an init from a text becomes our default one.

    Raises:
      UserError: a tensor that does not fit the config or the base.
    """
    width = base.config.hidden_size
    expected = peft_virtual.fields(base, 0, width, base.config.num_attention_heads)
    del expected["num_virtual_tokens"]
    embedding_NxD = peft_virtual.take(config, tensors, expected, width, file)
    init = _INITS.get(str(config.get("prompt_tuning_init")))
    return get("prompt")(length=len(embedding_NxD), init=init), {KEY: Prompt(embedding=jnp.asarray(embedding_NxD))}
