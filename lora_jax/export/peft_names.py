"""PEFT's file format: names of files and tensors, and which module of transformers each of our weights is.

Described from files written by PEFT 0.21.2. A key is `base_model.model.` + the module's name in transformers + a
suffix;
factors are stored as A (rank, in) and B (out, rank), the transposes of ours.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.errors import UserError
from lora_jax.sites import Site

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
VERSION = "0.21.2"  # of PEFT, whose format this is
LINEAR = (".lora_A.weight", ".lora_B.weight")
EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
BASE_LAYER = ".base_layer.weight"
HEAD = "lm_head"  # the module that a tied embedding is a second time


def modules(base: Any) -> dict[str, str]:
    """`{path of ours: tensor name in transformers}` of a base."""
    return {path: tensor.name for path, tensor in base.family.tensors(base.config, base.num_labels).items()}


def module_of(tensor_name: str) -> str:
    """The module that holds a tensor: its name without `.weight` or `.bias`."""
    return tensor_name.rpartition(".")[0]


def module_keys(delta: Mapping[str, Any], base: Any) -> dict[str, str]:
    """`{path: module}` of a delta's sites."""
    ours = modules(base)
    return {path: module_of(ours[path]) for path in delta}


def task_type(base: Any) -> str:
    """PEFT's word for what the base computes."""
    if base.num_labels is not None:
        return "SEQ_CLS"
    return "CAUSAL_LM" if base.family.HAS_CACHE else "FEATURE_EXTRACTION"


def suffixes(site: Site) -> tuple[str, str]:
    """Suffixes of A's and B's keys."""
    return EMBEDDING if site.uses[0] == "embedding" else LINEAR


def tied_head(site: Site) -> bool:
    """True for an embedding that is also the output matrix: in transformers that is a second module, `HEAD`."""
    return site.uses[:1] == ("embedding",) and "linear" in site.uses


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's lookup in `rank_pattern` and `alpha_pattern`: the first key that matches the end of the module's name."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def targeted(config: Mapping[str, Any], module: str) -> bool:
    """PEFT's choice of modules: `target_modules` by suffix or regex, `layers_to_transform`, `exclude_modules`.

    A module that is saved whole is never adapted, and one that is named in full is, whatever its layer.
    """
    if matches(config.get("exclude_modules"), module) or not matches(config.get("target_modules"), module):
        return False
    if any(re.match(rf"(.*\.)?{saved}($|\.)", module) for saved in config.get("modules_to_save") or []):
        return False
    layers = config.get("layers_to_transform")
    in_full = not isinstance(config["target_modules"], str) and module in config["target_modules"]
    if layers is None or layers == [] or in_full:
        return True
    layers = [layers] if isinstance(layers, int) else layers
    patterns = config.get("layers_pattern") or [None]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        regex = r".*?\.[^.]*\.(\d+)\." if pattern is None else rf"(?:^|.*?\.){pattern}\.(\d+)\."
        if found := re.match(regex, module):
            return int(found.group(1)) in layers
    return False


def matches(targets: Any, module: str) -> bool:
    """PEFT's rule: a list of names or ends of names, or one regular expression for the whole name."""
    if not targets:
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == t or module.endswith("." + t) for t in targets)


def targeted_modules(config: Mapping[str, Any], base: Any) -> dict[str, str]:
    """`{path: module}` of the matrices that a config selects.

    Raises:
      UserError: there are none.
    """
    found = {
        path: module_of(name)
        for path, name in modules(base).items()
        if name.endswith(".weight") and base.sites[path].is_matrix and targeted(config, module_of(name))
    }
    if not found:
        raise UserError(f"{CONFIG}: target_modules={config['target_modules']!r} selects no module of this base")
    return found


def targets(selected: list[str], base: Any) -> list[str]:
    """The shortest honest list: last names where they select exactly these modules, else whole names."""
    everything = {module_of(name) for name in modules(base).values()} | {HEAD}
    short = {m.rpartition(".")[2] for m in selected}
    hit = {m for m in everything if m.rpartition(".")[2] in short}
    return sorted(short) if hit == set(selected) else sorted(selected)


def take(tensors: dict[str, np.ndarray], key: str, shape: tuple[int | None, ...], file: Path) -> np.ndarray:
    """Removes one tensor and returns it in float32, checked; None in the shape leaves a size open.

    Raises:
      UserError: it is not there, or has another shape.
    """
    if key not in tensors:
        raise UserError(f"{file} lacks the tensor {key!r}, which its config and this base call for")
    value = tensors.pop(key)
    if len(value.shape) != len(shape) or any(e is not None and g != e for g, e in zip(value.shape, shape, strict=True)):
        raise UserError(f"{file}: {key!r} has the shape {list(value.shape)}, expected {list(shape)}")
    return value.astype(np.float32)


def need(config: Mapping[str, Any], fields: tuple[str, ...], file: Path) -> None:
    """Raises if a field of the config is missing or null."""
    for field in fields:
        if config.get(field) is None:
            raise UserError(f"{file.with_name(CONFIG)} lacks {field!r}")


def flat_sizes(site: Site) -> tuple[int, int]:
    """fan_in and fan_out of a site as single numbers."""
    return math.prod(site.dims(site.fan_in)), math.prod(site.dims(site.fan_out))


def uniform(values: Mapping[str, Any]) -> Any:
    """One number where all are equal, else rules by path."""
    distinct = set(values.values())
    return distinct.pop() if len(distinct) == 1 else [(exact(p), v) for p, v in values.items()]


def exact(path: str) -> str:
    """A pattern that matches this path alone."""
    return path.replace(".", r"\.")


def literal(module: str) -> str:
    """A pattern of PEFT's that matches this module."""
    return module.replace(".", r"\.")
