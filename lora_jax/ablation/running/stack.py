"""Deltas of several arms as one delta, every array with a leading axis over the arms, and back.

Ranks are filled up with zeros in all factors, which training leaves at zero (`Entry.widens`); scales, which depend on
the rank, become data. A site that an arm does not adapt gets another arm's start, which leaves the output as it is,
and is kept there (`Stacked.present`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import Adapter
from lora_jax.adapters.base import SHARED

Delta = Mapping[str, Any]


class Stacked(NamedTuple):
    """Several deltas.

    Attributes:
      delta: {path: entry}, arrays (arms, ...).
      scales: {path: (arms, *batch) float32} of the entries that have scales; goes to `adapter.bind(scale=)`.
      present: {path: (arms,) bool}, False where an arm does not adapt the site.
    """

    delta: dict[str, Any]
    scales: dict[str, jax.Array]
    present: dict[str, np.ndarray]


def fills(adapter: Adapter) -> bool:
    """Whether arms with different sites stack: a start elsewhere must do nothing, alone and to the others' sites."""
    return adapter.starts_as_base and adapter.penalty is None and adapter.wrap is None and not adapter.needs


def alike(first: Delta, second: Delta, fill: bool) -> bool:
    """Whether two deltas (or their shapes) stack.

    Args:
      first, second: of one method.
      fill: of `fills`.
    """
    shared = {p for p in {*first, *second} if p.startswith(SHARED)}
    if first.keys() != second.keys() and (not fill or shared):
        return False
    return all(_same_kind(first[path], second[path]) for path in first.keys() & second.keys())


def stack(deltas: Sequence[Delta]) -> Stacked:
    """Stacks deltas of which each two are `alike`, in the order of their sites in the longest one."""
    order = dict.fromkeys(path for delta in sorted(deltas, key=len, reverse=True) for path in delta)
    out = Stacked({}, {}, {})
    for path in order:
        own = [delta.get(path) for delta in deltas]
        first = next(one for one in own if one is not None)
        out.delta[path] = _stacked([first if one is None else one for one in own])
        out.present[path] = np.asarray([one is not None for one in own])
        if hasattr(first, "scales"):
            out.scales[path] = _scales(own, first)
    return out


def unstack(delta: Delta, index: int, like: Delta) -> dict[str, Any]:
    """One arm's delta out of a stacked one.

    Args:
      delta: arrays (arms, ...), as `Stacked.delta`.
      index: of the arm.
      like: what the arm put in; its sites, ranks, scales and shapes.
    """
    return {path: _cut(delta[path], index, one) for path, one in like.items()}


def _same_kind(first: Any, second: Any) -> bool:
    kinds: list[Any] = [jax.tree.structure(_bare(one)) for one in (first, second)]
    if type(first) is not type(second) or kinds[0] != kinds[1]:
        return False
    shapes = [[tuple(leaf.shape) for leaf in jax.tree.leaves(one)] for one in (first, second)]
    return first.widens or shapes[0] == shapes[1]


def _bare(one: Any) -> Any:
    """An entry without the static fields in which arms may differ."""
    free = {name: () for name in ("ranks", "scales") if one.widens}
    return dataclasses.replace(one, **free)


def _stacked(entries: Sequence[Any]) -> Any:
    leaves = [jax.tree.leaves(one) for one in entries]
    wide = [tuple(np.max([leaf.shape for leaf in column], axis=0)) for column in zip(*leaves, strict=True)]
    columns = [
        jnp.stack([jnp.pad(leaf, [(0, n - m) for n, m in zip(shape, leaf.shape, strict=True)]) for leaf in column])
        for shape, column in zip(wide, zip(*leaves, strict=True), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(_common(entries)), columns)


def _common(entries: Sequence[Any]) -> Any:
    """An entry with the static fields that hold for all arms."""
    first = entries[0]
    if not first.widens:
        return first
    ranks = tuple(int(n) for n in np.max([one.ranks for one in entries], axis=0))
    return dataclasses.replace(first, ranks=ranks, scales=(1.0,) * len(ranks))


def _scales(entries: Sequence[Any], first: Any) -> jax.Array:
    name = next(n for n in first.layout if getattr(first, n) is not None)
    batch = getattr(first, name).shape[: len(first.axes.batch)]
    rows = [np.asarray((one or first).scales, np.float32).reshape(batch) for one in entries]
    return jnp.asarray(np.stack(rows))


def _cut(stacked: Any, index: int, like: Any) -> Any:
    leaves, structure = jax.tree.flatten(like)
    cut = [
        whole[index][tuple(slice(0, n) for n in leaf.shape)]
        for whole, leaf in zip(jax.tree.leaves(stacked), leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, cut)
