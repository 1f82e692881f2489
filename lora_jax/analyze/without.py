"""`without`: an adapter with some of its layers or sites switched off, to see what they are worth."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import trees
from lora_jax.adapters.base import per_batch
from lora_jax.adapters.full import Full
from lora_jax.analyze.updates import dense_float32, factored
from lora_jax.errors import UserError
from lora_jax.lift.weight import is_adapted
from lora_jax.sites import Site, Sites, in_layers, select


def without(
    delta: Mapping[str, Any], sites: Sites, *, layers: Any = "all", targets: Any = None, variables: Any = None
) -> dict[str, Any]:
    """Switches an adapter off in some layers or at some sites; the delta given is not changed.

    * LoRA: B becomes zero there, so the update is zero. Every array keeps its shape: a function that was compiled for
      the delta is not compiled again.
    * Weights trained in place: the copy becomes the base's weight, likewise without a recompilation; needs `variables`.
    * Any other method: the entry is removed, so the weight is the base's own, and a compiled function compiles once
      more. Layers of a stack cannot be removed one by one.

    Args:
      delta: of any adapter.
      sites: from `find_sites`; they tell which layers there are.
      layers: those to switch off, of the model's: 'all', 'last:k', 'first:k', or a list of layer indices.
      targets: patterns or roles of the sites to switch off; None: all that the delta has.
      variables: the base.

    Returns:
      A delta for the same adapter.

    Raises:
      UserError: neither layers nor targets, a choice that hits no adapted site, or a method that cannot do it.
    """
    if targets is None and (isinstance(layers, str) and layers.strip() == "all"):
        raise UserError(
            "without() needs layers= or targets=: what shall be switched off? (all of it is the base alone)"
        )
    own = {path: sites[path] for path in delta if path in sites}
    flags = in_layers(sites, select(own, targets, list(own)), layers)
    out = dict(delta)
    for path, off in flags.items():
        changed = _off(delta[path], sites[path], off, variables)
        if changed is None:
            del out[path]
        else:
            out[path] = changed
    return out


def _off(one: Any, site: Site, flags: tuple[bool, ...], variables: Any) -> Any:
    """The entry switched off in the flagged layers; None: to be removed."""
    if factored(one):
        off = per_batch(flags, site)
        off = off.reshape(off.shape + (1,) * (one.b.ndim - off.ndim))
        b0 = None if one.b0 is None else jnp.where(off, 0, one.b0)
        return dataclasses.replace(one, b=jnp.where(off, 0, one.b), b0=b0)
    if type(one) is Full:
        return _restored(one, site, flags, variables)
    if not all(flags):
        raise UserError(
            f"{site.path!r} is a stack of layers, and an entry of the kind {type(one).__name__.lower()!r} cannot be "
            "switched off in some of them; switch off the whole site by targets, or unroll the model"
        )
    return None


def _restored(one: Full, site: Site, flags: tuple[bool, ...], variables: Any) -> Full:
    """The trained copy with the base's values in the flagged layers."""
    if variables is None:
        raise UserError(
            f"{site.path!r} was trained in place: switching it off takes the base's weight, give variables="
        )
    base = dense_float32(trees.flatten(variables, is_leaf=is_adapted)[site.path])
    if site.layer_axis is None:
        return dataclasses.replace(one, value=base)
    kept = range(site.shape[site.layer_axis]) if one.kept is None else one.kept
    base = jnp.take(base, jnp.asarray(list(kept)), axis=site.layer_axis)
    off = np.asarray([flags[i] for i in kept])
    along = [1] * base.ndim
    along[site.layer_axis] = len(kept)
    return dataclasses.replace(one, value=jnp.where(off.reshape(along), base, one.value))
