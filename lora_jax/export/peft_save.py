"""`save_peft`: writes an adapter so that PEFT's `PeftModel.from_pretrained` gives the same outputs."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax import trees
from lora_jax.adapters import Adapter
from lora_jax.adapters.chain import members
from lora_jax.adapters.full import Full
from lora_jax.errors import UserError
from lora_jax.export import codecs, peft_biases, vllm
from lora_jax.export import peft_names as names
from lora_jax.lift.weight import is_adapted


def save_peft(
    directory: str | Path, adapter: Adapter, delta: Mapping[str, Any], base: Any, *, vllm_compatible: bool = False
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`.

    Weights that were trained in place (a head) go to `modules_to_save`, whole modules as PEFT has it. A sequence
    classifier's head is always written, trained or not, since PEFT would otherwise draw another one.

    Args:
      directory: made if it is not there.
      adapter: of a method that PEFT has, or a chain of one and parts trained in place.
      delta: its delta.
      base: the `Base` it belongs to; names the modules.
      vllm_compatible: only what vLLM serves: one rank (others are padded with zeros), the scales folded into B; an
        error where that cannot be.

    Raises:
      UserError: a method that PEFT does not have.
    """
    config, tensors = render(adapter, delta, base)
    if vllm_compatible:
        config, tensors = vllm.served(config, tensors)
    _write(Path(directory), config, tensors)


def render(adapter: Adapter, delta: Mapping[str, Any], base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `save_peft` writes: (adapter_config.json, tensors).

    Raises:
      UserError: as `save_peft`.
    """
    _check_unstacked(delta)
    main, in_place = _split(adapter, delta)
    codec = codecs.by_method(main[0].spec["method"])
    assert codec is not None
    config, tensors = codec.write(*main, base)
    ours = names.modules(base)
    saved = _saved_modules([p for p in in_place if not ours[p].endswith(".bias")], base)
    biases = {p: one for p, one in in_place.items() if p in peft_biases.paths(base, saved)}
    mode = peft_biases.mode(set(biases), main[1], base, saved) if getattr(codec, "BIASES", False) else None
    if mode is None:  # no word for these biases: their modules are saved whole
        saved = _saved_modules(list(in_place), base)
    else:
        config["bias"] = mode
        tensors |= peft_biases.tensors(biases, main[1], base)
    _check_apart(main[1], saved, base)
    tensors |= _module_tensors(in_place, saved, base, getattr(codec, "PREFIX", names.PREFIX))
    common = {
        "peft_type": codec.__name__.rpartition(".")[2].upper(),
        "task_type": names.task_type(base),
        "base_model_name_or_path": None if base.path is None else str(base.path),
        "inference_mode": True,
        "peft_version": names.VERSION,
        "modules_to_save": saved or None,
    }
    return {**common, **config}, tensors


def has_format(adapter: Adapter, delta: Mapping[str, Any], base: Any) -> bool:
    """Whether PEFT has a place for all of an adapter, so that `save_peft` can write it."""
    try:
        render(adapter, delta, base)
    except UserError:
        return False
    return True


def _split(adapter: Adapter, delta: Mapping[str, Any]) -> tuple[tuple[Adapter, dict], dict[str, Full]]:
    """The one member that PEFT has a format for, and all that is trained in place beside it."""
    known, other = [], []
    in_place: dict[str, Full] = {}
    for member, own in members(adapter, delta):
        if codecs.by_method(member.spec["method"]) is not None:
            known.append((member, own))
        elif all(isinstance(one, Full) for one in own.values()):
            in_place |= own
        else:
            other.append(member.spec["method"])
    if other or not known:
        name = other[0] if other else members(adapter, delta)[0][0].spec["method"]
        raise UserError(
            f"PEFT has no format for {name!r} (adapter {adapter.spec['method']!r}); save it with lora_jax.save instead"
        )
    if len(known) > 1:
        both = " and ".join(repr(a.spec["method"]) for a, _ in known)
        raise UserError(f"PEFT's format holds one method, not {both}; save them with lora_jax.save instead")
    return known[0], in_place


def _check_unstacked(delta: Mapping[str, Any]) -> None:
    stacked = [p for p, one in delta.items() if one.axes.batch or getattr(one, "kept", None) is not None]
    if stacked:
        raise UserError(
            f"{stacked[0]!r} is a stack of layers, which PEFT's format cannot name; unroll the model to export it"
        )


def _saved_modules(trained: Sequence[str], base: Any) -> list[str]:
    """Modules to write whole: those with a trained weight, and a sequence classifier's head in any case."""
    ours = names.modules(base)
    paths = {*trained}
    if base.num_labels is not None:
        paths |= {p for p, s in base.sites.items() if s.role == "head"}
    tied = any(names.tied_head(base.sites[p]) for p in paths)  # PEFT unties what it saves
    return sorted({names.module_of(ours[p]) for p in paths} | ({names.HEAD} if tied else set()))


def _check_apart(adapted: Mapping[str, Any], saved: Sequence[str], base: Any) -> None:
    """Raises if a module would be saved whole and adapted too: PEFT then leaves the adapter out, in silence."""
    ours = names.modules(base)
    for path in adapted:
        if path in ours and names.module_of(ours[path]) in saved:
            raise UserError(
                f"PEFT cannot hold {path!r} adapted beside a bias of the same module trained in place (of a lora it "
                "can if these are all biases, or those of all adapted modules); save it with lora_jax.save instead"
            )


def _module_tensors(in_place: Mapping[str, Full], saved: list[str], base: Any, prefix: str) -> dict[str, np.ndarray]:
    leaves, out = trees.flatten(base.variables, is_adapted), {}
    for path, tensor in base.family.tensors(base.config, base.num_labels).items():
        if names.module_of(tensor.name) in saved:
            value = in_place[path].value if path in in_place else leaves[path]
            array = np.asarray(value, np.float32)
            out[prefix + tensor.name] = array.T if tensor.transpose else array
            if names.tied_head(base.sites[path]):
                out[f"{prefix}{names.HEAD}.weight"] = array
    return out


def _write(directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    # safetensors 0.8 writes wrong values for transposed arrays: make them contiguous.
    contiguous = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    part = directory / (names.TENSORS + ".part")
    save_file(contiguous, str(part), metadata={"format": "pt"})
    os.replace(part, directory / names.TENSORS)
    (directory / names.CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
