"""Taking an adapter apart into its LoRA factors and the rest, and putting such parts together as a new adapter.

The new adapter is a plain `lora` with one exact target and rank for each site, its scale (1) folded into B; where there
is a rest, a chain of that and the rest. It binds, merges, saves and exports as any other.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import Adapter, from_spec, get
from lora_jax.adapters.base import SHARED, is_shared
from lora_jax.adapters.lora import LoRA
from lora_jax.analyze.updates import factored, factors, thin_svd, update_ranks, widest
from lora_jax.errors import UserError

Pair = tuple[Adapter, dict[str, Any]]


def split(adapter: Adapter, delta: Mapping[str, Any]) -> tuple[dict[str, LoRA], list[Pair]]:
    """Separates plain low-rank factors from everything else.

    Returns:
      `{path: entry}` of the method lora, and an (adapter, delta) pair for every other member of a chain. A start that
      LoRA subtracts (PiSSA, OLoRA) becomes part of the factors, at up to twice their rank.
    """
    low_rank: dict[str, LoRA] = {}
    rest: list[Pair] = []
    for member, spec in _members(adapter.spec):
        own = {
            _inner(path, member): dataclasses.replace(one, member="")
            for path, one in delta.items()
            if one.member == member
        }
        if spec["method"] == "lora" and all(factored(one) for one in own.values()):
            low_rank |= {p: one if one.a0 is None else shorten(one, widest(one)) for p, one in own.items()}
        elif own:
            rest.append((from_spec(spec), own))
    return low_rank, rest


def join(low_rank: Mapping[str, LoRA], rest: Sequence[Pair], dropout: float = 0.0) -> Pair:
    """Builds the adapter that has these factors, and its delta.

    Args:
      low_rank: entries with scale 1 (0 where the rank is 0).
      rest: further members.
      dropout: of the new lora.
    """
    members = list(rest)
    if low_rank:
        ranks = [rule for path, one in low_rank.items() for rule in _rank_rules(path, one)]
        values = {rank for _, rank in ranks}
        rule = values.pop() if len(values) == 1 else ranks
        targets = [exact(path) for path in low_rank]
        own = get("lora")(rank=rule, alpha=1.0, scaling="alpha", targets=targets, dropout=dropout)
        members.insert(0, (own, dict(low_rank)))
    if len(members) == 1:
        return members[0]
    delta = {
        f"{SHARED}{i}:{p.removeprefix(SHARED)}" if is_shared(p) else p: dataclasses.replace(one, member=str(i))
        for i, (_, own_delta) in enumerate(members)
        for p, one in own_delta.items()
    }
    return get("chain")(*(adapter for adapter, _ in members)), delta


def entry(a: Sequence[np.ndarray], b: Sequence[np.ndarray], like: LoRA) -> LoRA:
    """One site's factors from those of its N matrices.

    Args:
      a: N arrays (fan_in, rank), each with its own rank.
      b: N arrays (rank, fan_out), the scale folded in.
      like: an entry of the same site; gives the axes and shapes.
    """
    ranks = tuple(x.shape[1] for x in a)
    width, depth = max(ranks), len(like.axes.batch)
    padded_a = np.stack([np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in a])
    padded_b = np.stack([np.pad(x, ((0, width - x.shape[0]), (0, 0))) for x in b])
    batch, fan_in, fan_out = like.a.shape[:depth], like.a.shape[depth:-1], like.b.shape[depth + 1 :]
    return LoRA(
        a=jnp.asarray(padded_a.reshape(*batch, *fan_in, width), jnp.float32),
        b=jnp.asarray(padded_b.reshape(*batch, width, *fan_out), jnp.float32),
        axes=like.axes, ranks=ranks, scales=tuple(1.0 if r else 0.0 for r in ranks),
    )  # fmt: skip


def shorten(one: LoRA, rank: int) -> LoRA:
    """The best approximation of one entry at a rank of at most `rank`, the singular values evenly on both factors."""
    u, s, v = thin_svd(*factors(one))
    root = np.sqrt(s)
    keep = [min(rank, r) for r in update_ranks(one)]
    left = [u[n][:, :k] * root[n][:k] for n, k in enumerate(keep)]
    right = [(v[n][:, :k] * root[n][:k]).T for n, k in enumerate(keep)]
    return entry(left, right, one)


def dropout_of(adapters: Sequence[Adapter]) -> float:
    """The dropout that all their LoRA members share; 0 where they differ."""
    rates = {s["dropout"] for a in adapters for _, s in _members(a.spec) if s["method"] == "lora"}
    return rates.pop() if len(rates) == 1 else 0.0


def exact(path: str) -> str:
    """A pattern that matches this path alone."""
    return re.escape(path)


def _members(spec: Mapping[str, Any], member: str = "") -> list[tuple[str, Mapping[str, Any]]]:
    """`(member, spec)` of each method of a chain, chains inside chains taken apart."""
    if spec["method"] != "chain":
        return [(member, spec)]
    inside = [(f"{member}.{i}" if member else str(i), own) for i, own in enumerate(spec["adapters"])]
    return [leaf for name, own in inside for leaf in _members(own, name)]


def _inner(path: str, member: str) -> str:
    """A shared entry's key without the numbers that the chains around its method put before it."""
    if not (is_shared(path) and member):
        return path
    return SHARED + path.removeprefix(SHARED + member.replace(".", ":") + ":")


def _rank_rules(path: str, one: LoRA) -> list[tuple[str, int]]:
    """Rules that give this entry's ranks: one for the site, or one for each layer of a stack."""
    if len(set(one.ranks)) == 1:
        return [(exact(path), one.ranks[0])]
    batch = one.a.shape[: len(one.axes.batch)]
    ranks = np.asarray(one.ranks).reshape(batch)
    for axis in range(len(batch)):
        by_layer = np.moveaxis(ranks, axis, 0).reshape(batch[axis], -1)
        if (by_layer == by_layer[:, :1]).all():
            return [(f"{exact(path)}#{i}", int(r)) for i, r in enumerate(by_layer[:, 0])]
    raise UserError(f"the ranks of {path!r} differ within a layer, which no rule can say: {ranks.tolist()}")
