"""Writing checkpoints in Hugging Face layout, as transformers reads them."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax import trees
from lora_jax.errors import UserError
from lora_jax.models import base as bases
from lora_jax.models import files
from lora_jax.models.base import Base
from lora_jax.models.hf import SINGLE, Checkpoint


def save_pretrained(folder: str | os.PathLike, base: Base, variables: Mapping[str, Any]) -> None:
    """Writes dense variables back in Hugging Face layout, with config.json and the tokenizer's files.

    Args:
      folder: made if need be; files of these names are replaced.
      base: whose layout and config it is.
      variables: `{"params": ...}` with the base's paths and shapes; written in their own dtype.

    Raises:
      UserError: adapted weights among the variables, or other paths or shapes than the base's.
    """
    folder = Path(folder)
    out = {}
    tensors = base.family.tensors(base.config, base.num_labels)
    for path, leaf in _checked(base, variables).items():
        array = np.asarray(leaf)
        # safetensors writes a transposed view in the wrong order (and says nothing).
        out[tensors[path].name] = np.ascontiguousarray(array.T if tensors[path].transpose else array)
    folder.mkdir(parents=True, exist_ok=True)
    out |= _carried(base, {a.dtype for a in out.values()})
    _write(folder / SINGLE, out)
    dtype = next(iter(out.values())).dtype.name
    text = json.dumps(_config(base, dtype), indent=2, sort_keys=True) + "\n"
    (folder / files.CONFIG).write_text(text, encoding="utf-8")
    if base.path is not None:
        files.copy_extras(base.path, folder)


def _checked(base: Base, variables: Mapping[str, Any]) -> dict[str, Any]:
    flat = trees.flatten(variables)
    shapes = bases.shapes(base.family, base.config)
    if set(flat) != set(shapes):
        other = sorted(set(flat) ^ set(shapes))
        raise UserError(
            "these variables are not dense weights of this base; merge the adapter first, then dequantize a quantized "
            f"base. They differ at {other[:3]}"
        )
    for path, leaf in flat.items():
        if np.shape(leaf) != shapes[path]:
            raise UserError(f"{path} has the shape {np.shape(leaf)}, the base's is {shapes[path]}")
    return flat


def _carried(base: Base, dtypes: set) -> dict[str, np.ndarray]:
    """What the checkpoint has and our model does not use, but a reader of the file may want (an encoder's pooler)."""
    if base.path is None or base.num_labels is not None or not base.family.carried:
        return {}
    checkpoint = Checkpoint(base.path, base.family)
    names = [n for n in checkpoint.where if any(re.fullmatch(p, n) for p in base.family.carried)]
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else None
    return {n: np.ascontiguousarray(a if dtype is None else a.astype(dtype)) for n, a in checkpoint.arrays(names)}


def _write(file: Path, arrays: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    part = file.with_name(file.name + ".part")  # a kill while writing leaves no half file under the real name
    save_file(arrays, str(part), metadata={"format": "pt"})
    os.replace(part, file)


def _config(base: Base, dtype: str) -> dict[str, Any]:
    raw = dict(base.hf_config)
    raw["architectures"] = [base.family.architecture(base.config, base.num_labels)]
    raw["torch_dtype" if "torch_dtype" in raw else "dtype"] = dtype
    if base.num_labels is not None and len(raw.get("id2label") or ()) != base.num_labels:
        names = [f"LABEL_{i}" for i in range(base.num_labels)]
        raw["id2label"] = {str(i): name for i, name in enumerate(names)}
        raw["label2id"] = {name: i for i, name in enumerate(names)}
    return raw
