"""Several adapters on one model, each on sites of its own: lora on attention + a trained head, for example."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from lora_jax import trees
from lora_jax.adapters.base import Adapter
from lora_jax.errors import UserError


def chain(*adapters: Adapter) -> Adapter:
    """Combines adapters that act on different sites.

    Args:
      *adapters: at least one.

    Returns:
      An Adapter whose delta is the union of theirs; each entry remembers in `member` whose it is.

    Raises:
      UserError: at `init`, when two of them select the same site.
    """
    if not adapters:
        raise UserError("chain() needs at least one adapter")
    names = {str(i) for i in range(len(adapters))}
    spec = {"method": "chain", "adapters": [a.spec for a in adapters]}

    def init(key, variables, sites, *, batch=None):
        delta: dict[str, Any] = {}
        for i, adapter in enumerate(adapters):
            for path, one in adapter.init(key, variables, sites, batch=batch).items():
                if path in delta:
                    raise UserError(f"two adapters of a chain select {path!r}; narrow the targets of one of them")
                delta[path] = dataclasses.replace(one, member=f"{i}.{one.member}" if one.member else str(i))
        return {path: delta[path] for path in trees.flatten(variables) if path in delta}

    def part(delta, i):
        own = {}
        for path, one in delta.items():
            head, _, rest = one.member.partition(".")
            if head not in names:  # it would be left out in silence
                raise UserError(
                    f"the delta at {path!r} (member {one.member!r}) is not of this chain of {len(adapters)}"
                )
            if head == str(i):
                own[path] = dataclasses.replace(one, member=rest)
        return own

    def bind(variables, delta, *, key=None, scale=None):
        for i, adapter in enumerate(adapters):
            variables = adapter.bind(variables, part(delta, i), key=key, scale=scale)
        return variables

    def merge(variables, delta):
        for i, adapter in enumerate(adapters):
            variables = adapter.merge(variables, part(delta, i))
        return variables

    def trainable(delta):
        masks = {}
        for i, adapter in enumerate(adapters):
            masks.update(adapter.trainable(part(delta, i)))
        return {p: dataclasses.replace(masks[p], member=delta[p].member) for p in delta}

    penalties = [(i, a.penalty) for i, a in enumerate(adapters) if a.penalty]
    wraps = [a.wrap for a in adapters if a.wrap]
    if wraps:
        raise UserError("chain() cannot hold an adapter that edits its own updates; use it alone")

    def penalty(delta):
        return jnp.sum(jnp.stack([p(part(delta, i)) for i, p in penalties]))

    return Adapter(init, bind, merge, trainable, spec, penalty if penalties else None)
