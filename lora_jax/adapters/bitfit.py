"""BitFit: nothing but the biases.

Ben Zaken, Goldberg, Ravfogel (2022), "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models", arXiv:2106.10199, section 3: all bias terms train, those of layer norms included. A model without any
bias (Llama) gets one, from zero, at every matrix, as LLaMA-Adapter V2 has it (Gao et al. 2023, arXiv:2304.15010,
section 3.1); such new biases cannot be merged, since the model has no place for them.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax.adapters.base import Adapter, Entry, batch_dims, entry, json_ready, per_site
from lora_jax.adapters.full import start_in_place, written
from lora_jax.adapters.parts.ranks import default_targets
from lora_jax.errors import UserError
from lora_jax.lift.nodes import OutputWeight
from lora_jax.lift.products import along
from lora_jax.lift.weight import Axes, register
from lora_jax.sites import Site, Sites, in_layers, select


@entry(meta=("layers",))
class NewBias(Entry):
    """A bias where the model has none.

    Attributes:
      value: (*batch, *fan_out) float32.
      layers: which layers of a stack have it; () for all.
    """

    value: Any
    axes: Axes
    layers: tuple[bool, ...] = ()
    member: str = ""
    layout: ClassVar = {"value": ("batch", "fan_out")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewBiasWeight(OutputWeight):
    """Adds a vector to what the layer puts out."""

    value: Any
    layout: ClassVar = NewBias.layout

    def finish(self, y: jax.Array, axes: Axes) -> jax.Array:
        return y + along(self.value, (*axes.batch, *axes.fan_out), y.ndim).astype(y.dtype)


register(NewBiasWeight, meta=("spread",))


def bitfit(*, targets: Any = None, layers: Any = "all") -> Adapter:
    """Trains biases.

    Args:
      targets: patterns on whole paths, or roles, of biases or of weights whose bias is meant (a weight without one gets
        a new bias); None: every bias, or in a model without any a new one at every matrix but embeddings and a head.
      layers: 'all', 'last:k', 'first:k', or a list of layer indices; anything but 'all' leaves out biases outside
        layers.

    Returns:
      An Adapter. Its first output equals the base's exactly.

    Raises:
      UserError: a target that is neither a bias nor a linear layer or a convolution.
    """
    spec = json_ready(method="bitfit", targets=targets, layers=layers)

    def choose(sites: Sites):
        biases = [p for p, s in sites.items() if is_bias(s)]
        chosen = select(sites, targets, biases or default_targets(sites))
        paths = dict.fromkeys(_place(sites, p) for p in chosen)
        if not paths:
            raise UserError("bitfit finds no bias and no linear layer in this model; give targets")
        return in_layers(sites, list(paths), layers)

    def make(key, leaf, site, flags):
        del key
        if not site.is_matrix:
            return start_in_place(leaf, site, flags)
        zeros = jnp.zeros((*batch_dims(site), *site.dims(site.fan_out)), jnp.float32)
        return NewBias(value=zeros, axes=Axes.of(site), layers=() if all(flags) else tuple(flags))

    def weight(base, one, place):
        if not isinstance(one, NewBias):
            return written(base, one, place.path)
        value = one.value
        if one.layers:
            live = jnp.asarray(one.layers).reshape((-1,) + (1,) * (value.ndim - 1))
            value = jnp.where(live, value, 0)
        return NewBiasWeight(base=base, axes=one.axes, path=place.path, value=value)

    return per_site(spec, choose=choose, make=make, weight=weight)


def is_bias(site: Site) -> bool:
    """True for what a layer adds: a weight called bias that no product uses."""
    return not site.is_matrix and ("bias" in site.uses or site.path.rpartition("/")[2] == "bias") and bool(site.uses)


def _place(sites: Sites, path: str) -> str:
    """The bias that a target means, or the weight itself where a new one is needed."""
    site = sites[path]
    if is_bias(site):
        return path
    if site.is_matrix and not {"linear", "conv"}.isdisjoint(site.uses) and "embedding" not in site.uses:
        return site.bias or path
    raise UserError(
        f"bitfit: {path!r} (used as {', '.join(site.uses) or 'nothing'}) is neither a bias nor a linear layer; narrow "
        "the targets"
    )
