"""Quantized weights on disk: one safetensors file, as many bits a weight as in memory and a header.

A dense weight is a tensor named by its path; a quantized one is a tensor `path:field` for each of its arrays, and a
line of metadata that says how to read them.
"""

import importlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax import trees
from lora_jax.errors import UserError
from lora_jax.lift.weight import Axes, is_adapted
from lora_jax.quant.base import Format, QuantizedWeight
from lora_jax.quant.blocks import GROUP

FORMAT = "lora_jax.quant/1"
SHORT = {"base": "q", "constants": "c", "levels": "l"}  # names in the file
PACKAGE = __package__


def save(file: str | os.PathLike, variables: Any) -> None:
    """Writes variables of which some are quantized.

    Args:
      file: ends in .safetensors by custom; its directory is made if need be.
      variables: `{'params': nested dictionaries}` or nested dictionaries of weights.

    Raises:
      UserError: an adapter is bound, or the tree is not made of dictionaries.
    """
    from safetensors.numpy import save_file

    wrapped = isinstance(variables, Mapping) and trees.COLLECTION in variables
    _check_tree(variables[trees.COLLECTION] if wrapped else variables, "")
    if wrapped and len(variables) > 1:
        raise UserError(f"only the collection 'params' can be saved, got {', '.join(map(repr, variables))}")
    tensors: dict[str, Any] = {}
    described: dict[str, Any] = {}
    for path, leaf in trees.flatten(variables, is_leaf=is_adapted).items():
        if isinstance(leaf, QuantizedWeight):
            described[path] = _describe(leaf)
            tensors |= {f"{path}:{SHORT[name]}": value for name, value in leaf.arrays().items()}
        else:
            tensors[path] = leaf
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")  # a kill while writing leaves no half file under the real name
    metadata = {
        "format": FORMAT,
        "tree": "params" if wrapped else "",
        "quant": json.dumps(described, separators=(",", ":")),
    }
    # safetensors writes wrong values for arrays that are not C-contiguous.
    save_file({k: np.ascontiguousarray(np.asarray(v)) for k, v in tensors.items()}, str(part), metadata=metadata)
    os.replace(part, file)


def load(file: str | os.PathLike) -> Any:
    """Reads what `save` wrote, quantized weights as they were.

    Raises:
      UserError: no such file, another format, or missing, unexpected or misshapen tensors.
    """
    metadata, tensors = _read(Path(file))
    flat: dict[str, Any] = {}
    try:
        described = {path: _Described(*one) for path, one in json.loads(metadata["quant"]).items()}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{file}: its metadata of quantized weights cannot be read ({error})") from None
    for path, one in described.items():
        flat[path] = _node(path, one, tensors, file)
    if lost := [name for name in tensors if ":" in name]:
        raise UserError(f"{file} holds unexpected tensors: {', '.join(sorted(lost)[:5])}")
    flat |= {path: jnp.asarray(value) for path, value in tensors.items()}
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return {trees.COLLECTION: tree} if metadata["tree"] else tree


def _check_tree(tree: Any, path: str) -> None:
    if is_adapted(tree):
        if not isinstance(tree, QuantizedWeight):
            raise UserError(
                f"an adapter is bound at {path!r}: save it with lora_jax.save, and here the variables without it"
            )
        return
    if isinstance(tree, Mapping):
        for key, child in tree.items():
            if not isinstance(key, str) or "/" in key or ":" in key:
                raise UserError(
                    f"the key {key!r} at {path!r} is no name; only nested dictionaries of names can be saved"
                )
            _check_tree(child, f"{path}/{key}".lstrip("/"))
    elif not hasattr(tree, "dtype"):
        raise UserError(f"{path!r} is a {type(tree).__name__}; only nested dictionaries of arrays can be saved")


class _Described(NamedTuple):
    """How to read a weight's tensors, in the order of its line of metadata."""

    name: str
    block: int | None
    double: bool
    blocked: Sequence[int]
    kept: int
    kind: str
    views: Sequence[Sequence[int]]
    order: Sequence[int] | None


def _describe(node: QuantizedWeight) -> _Described:
    if any(view[0] != "transpose" for view in node.views):
        raise UserError(
            f"{node.path!r} was reshaped or cast since it was quantized; save the variables that quantize gave"
        )
    form = node.format
    views = [view[1] for view in node.views]
    return _Described(form.name, form.block, form.double, node.blocked, node.kept, node.kind, views, node.order)


def _read(file: Path) -> tuple[dict[str, str], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise UserError(f"there is no file {str(file)!r}; expected what quant.save wrote")
    try:
        with safe_open(str(file), "numpy") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except SafetensorError as error:
        raise UserError(f"{file} cannot be read ({error}); the file is truncated or not safetensors") from None
    if metadata.get("format") != FORMAT:
        raise UserError(f"{file} has the format {metadata.get('format')!r}; this version reads {FORMAT!r}")
    return metadata, tensors


def _node(path: str, one: _Described, tensors: dict[str, Any], file: Any) -> QuantizedWeight:
    try:
        form: Format = getattr(importlib.import_module(f"{PACKAGE}.{one.name}"), one.name)(
            block=one.block, double=one.double
        )
    except (ImportError, AttributeError):
        raise UserError(f"{file}: {path!r} is in the format {one.name!r}, which this version does not have") from None
    arrays: dict[str, Any] = {"levels": None}
    for field in SHORT if one.double else ("base", "constants"):
        if (key := f"{path}:{SHORT[field]}") not in tensors:
            raise UserError(f"{file} lacks the tensor {key!r}")
        arrays[field] = jnp.asarray(tensors.pop(key))
    node = QuantizedWeight(
        **arrays, axes=Axes(), path=path, format=form, blocked=tuple(one.blocked), kept=one.kept, kind=one.kind,
        views=tuple(("transpose", tuple(p)) for p in one.views), order=None if one.order is None else tuple(one.order),
    )  # fmt: skip
    _check_node(node, file)
    return node


def _check_node(node: QuantizedWeight, file: Any) -> None:
    """Shapes and dtypes that do not go together would be read as other numbers."""
    codes, constants, lead = node.base, node.constants, node.lead
    fits = codes.dtype == jnp.uint8 and constants.dtype == (jnp.uint8 if node.format.double else jnp.float32)
    fits = fits and lead >= 0 and constants.shape == (*codes.shape[: lead + 1], *codes.shape[lead + 2 :])
    if fits:
        room = codes.shape[lead] * codes.shape[lead + 1] * (8 // node.format.bits)
        rows = math.prod(node.blocked)
        fits = 0 <= room - rows < 2 * codes.shape[lead] + node.format.bits and node.format.bits in (4, 8)
    if fits and node.levels is not None:
        groups = -(-math.prod(constants.shape[lead:]) // GROUP)
        fits = node.levels.dtype == jnp.float32 and node.levels.shape == (*codes.shape[:lead], groups + 1)
    if not fits:
        shapes = {name: f"{x.dtype}{list(x.shape)}" for name, x in node.arrays().items()}
        raise UserError(f"{file}: the tensors of {node.path!r} do not fit together ({shapes}); the file is damaged")
