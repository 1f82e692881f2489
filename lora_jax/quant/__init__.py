"""Number formats of frozen weights, one file each, found by folder: `quant/x.py` with a function `x` is the format `x`.

small  = lj.quantize(variables, sites, "nf4")       4.13 bits for every linear weight; the rest as it was
logits = lj.lift(model.apply)(small, tokens)        one weight dense at a time
delta  = adapter.init(key, small, sites)            and everything else as before: QLoRA
"""

import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import trees
from lora_jax.adapters.parts.ranks import default_targets
from lora_jax.errors import UserError, did_you_mean
from lora_jax.lift.weight import is_adapted
from lora_jax.quant.base import Format, QuantizedWeight, encode
from lora_jax.quant.store import load, save
from lora_jax.sites import Sites, select

SHARED = ("base", "blocks", "product", "store", "table")  # files that are no format

__all__ = [
    "Format", "QuantizedWeight", "bits_per_weight", "dequantize", "formats", "get", "load", "options", "quantize",
    "residuals", "save", "summary",
]  # fmt: skip


def formats() -> list[str]:
    """Names of all formats."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in SHARED)


def residuals(variables: Any, quantized: Any) -> dict[str, Any]:
    """What quantization took away: `{path: weight - its quantized value}`, float32, for LoftQ's start.

    Args:
      variables: the dense weights.
      quantized: the same after `quantize`.
    """
    dense = trees.flatten(variables)
    return {
        path: jnp.asarray(dense[path], jnp.float32) - leaf.dense().astype(jnp.float32)
        for path, leaf in trees.flatten(quantized, is_leaf=is_adapted).items()
        if is_adapted(leaf)
    }


def get(name: str) -> Callable[..., Format]:
    """The function of a format by its name.

    Raises:
      UserError: no such format; the message has the nearest name.
    """
    if name not in formats():
        raise UserError(f"there is no number format {name!r}; {did_you_mean(str(name), formats())}")
    return getattr(importlib.import_module(f"{__name__}.{name}"), name)


def options(name: str) -> dict[str, Any]:
    """A format's own options and their defaults."""
    return {p.name: p.default for p in inspect.signature(get(name)).parameters.values()}


def quantize(variables: Any, sites: Sites, format: str, targets: Any = None, **given: Any) -> Any:
    """Puts weights into a number format. Runs on the host and gives the same bits on every machine.

    Args:
      variables: `{'params': ...}`, a plain tree of weights, or an NNX state; concrete arrays.
      sites: from `find_sites`; says along which axes blocks run. Sites found before and after are the same.
      format: 'nf4', 'fp4', 'int8' or 'int4'.
      targets: patterns on whole paths, or roles; None: every linear, DenseGeneral and convolution, but neither
        embeddings nor a head that the family names (a new head is trained itself, and QLoRA keeps the output layer
        too).
      **given: options of the format: `block`, the weights that share a constant; `double`, whether constants are
      quantized.

    Returns:
      The variables with a `QuantizedWeight` at every target. A lifted function takes them, adapters bind onto them.

    Raises:
      UserError: an unknown format or option, nothing to quantize, or a weight that cannot be.
    """
    form = _format(format, given)
    leaves = trees.flatten(variables, is_leaf=is_adapted)
    paths = select(sites, targets, default_targets(sites))
    if not paths:
        raise UserError(
            f"quantize finds nothing to put into {format} by itself: no product and no convolution uses any of the "
            f"{len(sites)} weights (embeddings and a head do not count). Give targets"
        )
    for path in paths:
        _check(path, leaves, sites, format)
    return trees.replace(
        variables, {path: encode(leaves[path], sites[path], form) for path in paths}, is_leaf=is_adapted
    )


def dequantize(variables: Any) -> Any:
    """Makes every quantized weight an array of the dtype it had; the other leaves are untouched.

    Args:
      variables: as `quantize` returns them, or as `adapter.merge` does.

    Raises:
      UserError: an adapter is bound; merge it first.
    """
    dense = {}
    for path, leaf in trees.flatten(variables, is_leaf=is_adapted).items():
        if isinstance(leaf, QuantizedWeight):
            dense[path] = leaf.dense()
        elif is_adapted(leaf):
            raise UserError(f"an adapter is bound at {path!r}: use `adapter.merge(variables, delta)`, then dequantize")
    return trees.replace(variables, dense, is_leaf=is_adapted)


def bits_per_weight(node: QuantizedWeight) -> float:
    """Bits that a quantized weight takes in memory, constants and padding included, over its number of entries."""
    stored = sum(x.size * x.dtype.itemsize for x in jax.tree_util.tree_leaves(node))
    return 8 * stored / _size(node)


def summary(variables: Any) -> tuple[str, ...]:
    """One line for each format in use: how many weights, how many bits each, how much memory in all."""
    nodes = [x for x in trees.flatten(variables, is_leaf=is_adapted).values() if isinstance(x, QuantizedWeight)]
    lines = []
    for name in sorted({n.format.name for n in nodes}):
        own = [n for n in nodes if n.format.name == name]
        total = sum(map(_size, own))
        stored = sum(bits_per_weight(n) * _size(n) for n in own)
        lines.append(
            f"base: {len(own)} weights of {total:,} parameters in {name}, {stored / total:.2f} bits a weight "
            f"({stored / 8e6:.1f} MB)"
        )
    return tuple(lines)


def _size(node: QuantizedWeight) -> int:
    batch, kept = node.base.shape[: node.lead], node.base.shape[node.lead + 2 :]
    return math.prod((*batch, *node.blocked, *kept))


def _format(name: str, given: dict[str, Any]) -> Format:
    known = options(name)
    for option in given:
        if option not in known:
            raise UserError(f"the format {name!r} has no option {option!r}; {did_you_mean(option, known)}")
    return get(name)(**given)


def _check(path: str, leaves: dict[str, Any], sites: Sites, format: str) -> None:
    if path not in leaves:
        raise UserError(f"the variables have no weight {path!r}; were the sites found for another model?")
    leaf, site = leaves[path], sites[path]
    if is_adapted(leaf):
        what = (
            f"is in {leaf.format.name} already" if isinstance(leaf, QuantizedWeight) else "has an adapter bound to it"
        )
        raise UserError(f"{path!r} {what}; quantize the dense weights")
    if not site.is_matrix:
        raise UserError(
            f"{format} is for weights that a product uses; {path!r} of shape {site.shape} is not one. "
            "Narrow the targets, for example to '.*/kernel'"
        )
    if isinstance(leaf, jax.core.Tracer):
        raise UserError(f"quantize needs the values of {path!r}, and inside jit there are none; call it outside")
    if tuple(leaf.shape) != site.shape:
        raise UserError(f"{path!r} has the shape {tuple(leaf.shape)}, its site {site.shape}: sites of another model?")
