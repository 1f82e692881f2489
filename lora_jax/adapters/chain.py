"""Several adapters on one model, each on sites of its own: lora on attention + a trained head, for example."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import optax

from lora_jax import trees
from lora_jax.adapters.base import SHARED, Adapter, is_shared
from lora_jax.errors import UserError
from lora_jax.lift.weight import is_adapted

# What a config has that chooses `chain` and names no members: low-rank attention, and a small network after the
# feed-forward one.
USUAL: tuple[dict[str, Any], ...] = (
    {"method": "lora", "targets": "q,k,v,o"},
    {"method": "bottleneck", "targets": "down"},
)


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
                path = _outer(path, i)
                if path in delta:
                    raise UserError(f"two adapters of a chain select {path!r}; narrow the targets of one of them")
                delta[path] = dataclasses.replace(one, member=f"{i}.{one.member}" if one.member else str(i))
        order = [*filter(is_shared, delta), *trees.flatten(variables, is_leaf=is_adapted)]
        return {path: delta[path] for path in order if path in delta}

    def part(delta, i):
        own = {}
        for path, one in delta.items():
            head, _, rest = one.member.partition(".")
            if head not in names:  # it would be left out in silence
                raise UserError(
                    f"the delta at {path!r} (member {one.member!r}) is not of this chain of {len(adapters)}"
                )
            if head == str(i):
                own[_inner(path, i)] = dataclasses.replace(one, member=rest)
        return own

    def whole(delta, parts):
        """Puts the parts' values back under the keys and members of the whole delta."""
        out = {}
        for path, one in delta.items():
            i = int(one.member.partition(".")[0])
            out[path] = dataclasses.replace(parts[i][_inner(path, i)], member=one.member)
        return out

    def bind(variables, delta, *, key=None, scale=None):
        for i, adapter in enumerate(adapters):
            variables = adapter.bind(variables, part(delta, i), key=key, scale=scale)
        return variables

    def merge(variables, delta):
        for i, adapter in enumerate(adapters):
            variables = adapter.merge(variables, part(delta, i))
        return variables

    def trainable(delta):
        return whole(delta, [a.trainable(part(delta, i)) for i, a in enumerate(adapters)])

    penalties = [(i, a.penalty) for i, a in enumerate(adapters) if a.penalty]

    def penalty(delta):
        return jnp.sum(jnp.stack([p(part(delta, i)) for i, p in penalties]))

    def wrap(tx):
        """The members edit the updates of the one optimizer, each those of its own part."""

        def init(params):
            return tx.init(params), [w(_replay(None)).init(part(params, i)) for i, w in edited]

        def update(grads, state, params=None, **extra):
            updates, inner = tx.update(grads, state[0], params, **extra)
            parts, states = [part(updates, i) for i in range(len(adapters))], []
            for (i, member), own in zip(edited, state[1], strict=True):
                edit = member(_replay(parts[i]))
                parts[i], own = edit.update(part(grads, i), own, part(params, i))
                states.append(own)
            return whole(updates, parts), (inner, states)

        return optax.GradientTransformationExtraArgs(init, update)

    edited = [(i, a.wrap) for i, a in enumerate(adapters) if a.wrap]
    return Adapter(
        init, bind, merge, trainable, spec,
        penalty=penalty if penalties else None,
        wrap=wrap if edited else None,
        starts_as_base=all(a.starts_as_base for a in adapters),
        own_rows=any(a.own_rows for a in adapters),
        needs=_needs(adapters),
    )  # fmt: skip


def _needs(adapters: Sequence[Adapter]) -> str:
    found = {a.needs for a in adapters} - {""}
    if len(found) > 1:
        raise UserError(f"a chain can start from one kind of data, not from {' and '.join(sorted(found))}")
    return found.pop() if found else ""


def members(adapter: Adapter, delta: Mapping[str, Any]) -> list[tuple[Adapter, dict[str, Any]]]:
    """Takes a chain apart: each member with its own part of the delta. Any other adapter is its own only member."""
    from lora_jax.adapters import from_spec

    if adapter.spec["method"] != "chain":
        return [(adapter, dict(delta))]
    out = []
    for i, spec in enumerate(adapter.spec["adapters"]):
        own = {
            _inner(path, i): dataclasses.replace(one, member=one.member.partition(".")[2])
            for path, one in delta.items()
            if one.member.partition(".")[0] == str(i)
        }
        out += members(from_spec(spec), own)
    return out


def together(parts: Sequence[tuple[Adapter, Mapping[str, Any]]]) -> tuple[Adapter, dict[str, Any]]:
    """The inverse of `members`: one adapter and one delta, shared entries first, then in the order of the parts."""
    if len(parts) == 1:
        return parts[0][0], dict(parts[0][1])
    named = [
        (_outer(path, i), dataclasses.replace(one, member=f"{i}.{one.member}" if one.member else str(i)))
        for i, (_, delta) in enumerate(parts)
        for path, one in delta.items()
    ]
    return chain(*(adapter for adapter, _ in parts)), dict(sorted(named, key=lambda pair: not is_shared(pair[0])))


def _outer(path: str, i: int) -> str:
    """Two members may share arrays under one name."""
    return f"{SHARED}{i}:{path.removeprefix(SHARED)}" if is_shared(path) else path


def _inner(path: str, i: int) -> str:
    return SHARED + path.removeprefix(f"{SHARED}{i}:") if is_shared(path) else path


def _replay(updates: Any) -> optax.GradientTransformation:
    """A transformation whose updates are there already."""
    return optax.GradientTransformation(lambda params: (), lambda grads, state, params=None: (updates, state))
