"""`save_peft`: writes an adapter so that PEFT's `PeftModel.from_pretrained` gives the same outputs."""

import collections
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax import trees
from lora_jax.adapters import Adapter
from lora_jax.adapters.full import Full
from lora_jax.adapters.lora import LoRA
from lora_jax.errors import UserError
from lora_jax.export import peft_names as names


def save_peft(directory: str | Path, adapter: Adapter, delta: Mapping[str, Any], base: Any) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`.

    Weights that were trained in place (a head) go to `modules_to_save`, whole modules as PEFT has it. A sequence
    classifier's head is always written, trained or not, since PEFT would otherwise draw another one.

    Args:
      directory: made if it is not there.
      adapter: of the method `lora`, or a chain of `lora` and parts trained in place.
      delta: its delta.
      base: the `Base` it belongs to; names the modules.

    Raises:
      UserError: a method that PEFT does not have.
    """
    from safetensors.numpy import save_file

    factors = {p: one for p, one in delta.items() if isinstance(one, LoRA)}
    in_place = {p: one for p, one in delta.items() if isinstance(one, Full)}
    _check(adapter, delta, factors, in_place)
    tensors = {**_factor_tensors(factors, base), **_module_tensors(in_place, base)}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # safetensors 0.8 writes wrong values for transposed arrays: make them contiguous.
    contiguous = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    part = directory / (names.TENSORS + ".part")
    save_file(contiguous, str(part), metadata={"format": "pt"})
    os.replace(part, directory / names.TENSORS)
    config = _config(adapter, factors, in_place, base)
    (directory / names.CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _check(adapter: Adapter, delta: Mapping, factors: Mapping, in_place: Mapping) -> None:
    other = [p for p in delta if p not in factors and p not in in_place]
    if other or not factors:
        name = adapter.spec.get("method")
        kind = type(delta[other[0]]).__name__.lower() if other else name
        raise UserError(f"PEFT has no format for {kind!r} (adapter {name!r}); save it with lora_jax.save instead")
    stacked = [p for p, one in delta.items() if one.axes.batch or getattr(one, "kept", None) is not None]
    if stacked:
        raise UserError(
            f"{stacked[0]!r} is a stack of layers, which PEFT's format cannot name; unroll the model to export it"
        )


def _factor_tensors(factors: Mapping[str, LoRA], base: Any) -> dict[str, np.ndarray]:
    ours, out = names.modules(base), {}
    for path, one in factors.items():
        rank = one.ranks[0]
        a = np.asarray(one.a, np.float32).reshape(-1, one.a.shape[-1])[:, :rank]
        b = np.asarray(one.b, np.float32).reshape(one.b.shape[0], -1)[:rank]
        module = names.PREFIX + names.module_of(ours[path])
        for suffix, value in zip(names.suffixes(base.sites[path]), (a.T, b.T), strict=True):
            out[module + suffix] = value
        if names.tied_head(base.sites[path]):  # the output matrix is (vocabulary, width): A is our b, B our a
            head = names.PREFIX + "lm_head"
            out[head + names.LINEAR[0]], out[head + names.LINEAR[1]] = b, a
    return out


def _saved_modules(in_place: Mapping[str, Full], base: Any) -> list[str]:
    """Modules to write whole: those with a trained weight, and a sequence classifier's head in any case."""
    ours = names.modules(base)
    paths = {*in_place}
    if base.num_labels is not None:
        paths |= {p for p, s in base.sites.items() if s.role == "head"}
    return sorted({names.module_of(ours[p]) for p in paths})


def _module_tensors(in_place: Mapping[str, Full], base: Any) -> dict[str, np.ndarray]:
    leaves, out = trees.flatten(base.variables), {}
    saved = set(_saved_modules(in_place, base))
    for path, tensor in base.family.tensors(base.config, base.num_labels).items():
        if names.module_of(tensor.name) in saved:
            value = in_place[path].value if path in in_place else leaves[path]
            array = np.asarray(value, np.float32)
            out[names.PREFIX + tensor.name] = array.T if tensor.transpose else array
    return out


def _specs(spec: Mapping) -> list[Mapping]:
    return [s for m in spec["adapters"] for s in _specs(m)] if spec["method"] == "chain" else [spec]


def _config(adapter: Adapter, factors: Mapping[str, LoRA], in_place: Mapping[str, Full], base: Any) -> dict[str, Any]:
    ours = names.modules(base)
    own = [s for s in _specs(adapter.spec) if s["method"] == "lora"]
    root = all(s["scaling"] == "alpha/sqrt(r)" for s in own)
    module = {p: names.module_of(ours[p]) for p in factors}
    rank = {p: one.ranks[0] for p, one in factors.items()}
    alpha = {p: _plain(one.scales[0] * (math.sqrt(rank[p]) if root else rank[p])) for p, one in factors.items()}
    r, lora_alpha = (collections.Counter(d.values()).most_common(1)[0][0] for d in (rank, alpha))
    exceptions = lambda d, usual: {_literal(module[p]): v for p, v in d.items() if v != usual}  # noqa: E731
    tied = any(names.tied_head(base.sites[p]) for p in factors)
    return {
        "peft_type": "LORA",
        "task_type": names.task_type(base),
        "base_model_name_or_path": None if base.path is None else str(base.path),
        "inference_mode": True,
        "r": r,
        "lora_alpha": lora_alpha,
        "rank_pattern": exceptions(rank, r),
        "alpha_pattern": exceptions(alpha, lora_alpha),
        "use_rslora": root,
        "lora_dropout": max(s["dropout"] for s in own),
        "target_modules": _targets([*module.values(), *(["lm_head"] if tied else [])], base),
        "modules_to_save": _saved_modules(in_place, base) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": False,
    }


def _plain(value: float) -> float | int:
    """An alpha as people write it: 16, not 16.0 or 15.999999."""
    near = round(value, 6)
    return int(near) if near == int(near) else near


def _literal(module: str) -> str:
    return module.replace(".", r"\.")


def _targets(selected: list[str], base: Any) -> list[str]:
    """The shortest honest list: last names where they select exactly these modules, else whole names."""
    everything = {names.module_of(name) for name in names.modules(base).values()} | {"lm_head"}
    short = {m.rpartition(".")[2] for m in selected}
    hit = {m for m in everything if m.rpartition(".")[2] in short}
    return sorted(short) if hit == set(selected) else sorted(selected)
