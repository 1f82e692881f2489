"""Full fine-tuning of the selected weights: the upper baseline of every comparison.

Each selected weight is trained in place as a float32 copy, so updates far below a bfloat16 weight's spacing add up; the
function sees it in the base's dtype. Of a stacked weight only the selected layers are copied and trained.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp

from lora_jax.adapters.base import Adapter, Entry, entry, json_ready, per_site
from lora_jax.errors import UserError
from lora_jax.lift.weight import AdaptedWeight, Axes
from lora_jax.sites import Site, in_layers, select

LEARNING_RATE = 1e-4  # at 1e-3 a pretrained encoder forgets more than it learns (MiniLM on sst2: 0.51 dev accuracy)


@entry(meta=("kept", "layer_axis"))
class Full(Entry):
    """One weight's trained copy.

    Attributes:
      value: float32, of the weight's shape; along `layer_axis` only the layers `kept`.
      kept: indices along `layer_axis`, or None for the whole weight.
      layer_axis: the axis that counts layers, or None.
    """

    value: Any
    axes: Axes
    kept: tuple[int, ...] | None = None
    layer_axis: int | None = None
    member: str = ""
    layout: ClassVar = {}


def full(*, targets: Any = None, layers: Any = "all") -> Adapter:
    """Trains the selected weights themselves.

    Args:
      targets: patterns on whole paths, or roles; None: every weight.
      layers: 'all', 'last:k', 'first:k', or a list of layer indices; anything but 'all' leaves out weights outside
        layers.

    Returns:
      An Adapter. Its first output equals the base's exactly.
    """
    spec = json_ready(method="full", targets=targets, layers=layers)
    return in_place(spec, lambda sites: in_layers(sites, select(sites, targets, list(sites)), layers))


def in_place(spec: dict, choose: Any) -> Adapter:
    """An adapter that trains weights in place; `choose` maps sites to `{path: one flag per layer}`."""

    def make(key, leaf, site, flags):
        del key
        return start_in_place(leaf, site, flags)

    def weight(base, one, place):
        return written(base, one, place.path)

    return per_site(spec, choose=choose, make=make, weight=weight)


def start_in_place(leaf: Any, site: Site, flags: Sequence[bool]) -> Full:
    """The trained copy of a weight, of the layers whose flag is set."""
    _check_not_quantized(leaf, site.path)
    axis, kept = site.layer_axis, tuple(i for i, f in enumerate(flags) if f)
    if axis is None or all(flags):
        return Full(value=jnp.asarray(leaf, jnp.float32), axes=Axes.of(site))
    value = jnp.take(leaf, jnp.asarray(kept), axis=axis).astype(jnp.float32)
    return Full(value=value, axes=Axes.of(site), kept=kept, layer_axis=axis)


def written(base: Any, one: Full, path: str) -> Any:
    """The weight with the trained copy in place of the frozen array, below whatever another adapter has put there.

    Raises:
      UserError: the copy is of another shape, or the weight is quantized.
    """
    _check_not_quantized(base, path)
    expected = list(base.shape)
    if one.kept is not None:
        expected[one.layer_axis or 0] = len(one.kept)
    if list(one.value.shape) != expected:
        raise UserError(
            f"the trained copy of shape {tuple(one.value.shape)} does not fit the weight {path!r} of shape "
            f"{tuple(base.shape)}: was it made for another base?"
        )
    if isinstance(base, AdaptedWeight):
        return dataclasses.replace(base, base=written(base.base, one, path))
    if one.kept is None:
        return one.value.astype(base.dtype)
    where = (slice(None),) * (one.layer_axis or 0) + (jnp.asarray(one.kept),)
    return base.at[where].set(one.value.astype(base.dtype))


def _check_not_quantized(base: Any, path: str) -> None:
    if isinstance(base, AdaptedWeight) and base.frozen:
        raise UserError(
            f"{path!r} is quantized, and this method trains the weight itself, which few bits cannot hold. Leave it "
            "out of the targets or of `quantize`, or choose a method that adds to the weight, such as lora"
        )
