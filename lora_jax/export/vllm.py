"""What vLLM serves of a LoRA: one rank and one scale for the whole adapter, no modules saved whole, no DoRA.

vLLM reads PEFT's files but neither `rank_pattern` nor `alpha_pattern`. Padding with zeros and folding each site's scale
into its B changes no output.
"""

from typing import Any

import numpy as np

from lora_jax.errors import UserError
from lora_jax.export import peft_names as names

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what `max_lora_rank` may be


def served(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The same adapter as vLLM takes it.

    Args:
      config: of PEFT.
      tensors: by PEFT's names.

    Returns:
      (config, tensors) with one rank, alpha equal to it (so the scale is 1), and no patterns.

    Raises:
      UserError: vLLM cannot serve it.
    """
    _check(config, tensors)
    a_keys = [k for k in tensors if k.endswith(names.LINEAR[0])]
    largest = max(tensors[k].shape[0] for k in a_keys)
    rank = next((r for r in RANKS if r >= largest), None)
    if rank is None:
        raise UserError(f"vLLM serves ranks up to {RANKS[-1]}; this adapter has {largest}. Truncate it first")
    out = {}
    for a_key in a_keys:
        b_key = a_key.removesuffix(names.LINEAR[0]) + names.LINEAR[1]
        module = a_key.removeprefix(names.PREFIX).removesuffix(names.LINEAR[0])
        a, b = tensors[a_key], tensors[b_key]
        pad = rank - a.shape[0]
        out[a_key] = np.pad(a, ((0, pad), (0, 0)))
        out[b_key] = np.pad(b * _scale(config, module), ((0, 0), (0, pad)))
    plain = {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    return {**config, **plain}, out


def _scale(config: dict[str, Any], module: str) -> float:
    r = names.pattern_value(config["rank_pattern"], module, config["r"])
    alpha = names.pattern_value(config["alpha_pattern"], module, config["lora_alpha"])
    return alpha / (r**0.5 if config["use_rslora"] else r)


def _check(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    refused = {
        "a method other than lora": config["peft_type"] != "LORA",
        "DoRA's magnitudes": bool(config.get("use_dora")),
        f"modules saved whole ({', '.join(config['modules_to_save'] or [])})": bool(config["modules_to_save"]),
        "trained biases": config.get("bias", "none") != "none",
        "an adapted embedding": any(names.EMBEDDING[0] in key for key in tensors),
    }
    for what, is_there in refused.items():
        if is_there:
            raise UserError(
                f"vLLM does not serve {what}; export without vllm_compatible, or merge the adapter (--format=hf)"
            )
