"""PEFT's file format: names of files and tensors, and which module of transformers each of our weights is.

Described from files written by PEFT 0.21.2. A key is `base_model.model.` + the module's name in transformers + a
suffix;
factors are stored as A (rank, in) and B (out, rank), the transposes of ours.
"""

import re
from collections.abc import Mapping
from typing import Any

from lora_jax.sites import Site

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
LINEAR = (".lora_A.weight", ".lora_B.weight")
EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
BASE_LAYER = ".base_layer.weight"


def modules(base: Any) -> dict[str, str]:
    """`{path of ours: tensor name in transformers}` of a base."""
    return {path: tensor.name for path, tensor in base.family.tensors(base.config, base.num_labels).items()}


def module_of(tensor_name: str) -> str:
    """The module that holds a tensor: its name without `.weight` or `.bias`."""
    return tensor_name.rpartition(".")[0]


def task_type(base: Any) -> str:
    """PEFT's word for what the base computes."""
    if base.num_labels is not None:
        return "SEQ_CLS"
    return "CAUSAL_LM" if base.family.HAS_CACHE else "FEATURE_EXTRACTION"


def suffixes(site: Site) -> tuple[str, str]:
    """Suffixes of A's and B's keys."""
    return EMBEDDING if site.uses[0] == "embedding" else LINEAR


def tied_head(site: Site) -> bool:
    """True for an embedding that is also the output matrix: in transformers that is a second module, `lm_head`."""
    return site.uses[0] == "embedding" and "linear" in site.uses


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's lookup in `rank_pattern` and `alpha_pattern`: the first key that matches the end of the module's name."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def targeted(config: Mapping[str, Any], module: str) -> bool:
    """PEFT's choice of modules: `target_modules` by suffix or regex, `layers_to_transform`, `exclude_modules`."""
    if _matches(config.get("exclude_modules"), module) or not _matches(config.get("target_modules"), module):
        return False
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    layers = [layers] if isinstance(layers, int) else layers
    patterns = config.get("layers_pattern") or [None]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        regex = r".*?\.[^.]*\.(\d+)\." if pattern is None else rf"(?:^|.*?\.){pattern}\.(\d+)\."
        if found := re.match(regex, module):
            return int(found.group(1)) in layers
    return False


def _matches(targets: Any, module: str) -> bool:
    if not targets:
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == t or module.endswith("." + t) for t in targets)
