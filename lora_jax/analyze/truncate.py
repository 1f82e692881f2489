"""`truncate`: a trained adapter at a smaller rank, by the singular value decomposition of its updates."""

from collections.abc import Mapping
from typing import Any

from lora_jax.adapters import Adapter
from lora_jax.analyze import parts
from lora_jax.errors import UserError


def truncate(adapter: Adapter, delta: Mapping[str, Any], rank: int) -> parts.Pair:
    """The best approximation of every low-rank update by one of a smaller rank.

    Best in the Frobenius norm (Eckart and Young 1936): the error is the root of the sum of the squared singular values
    left out. The singular values, scale included, are split evenly between A and B, so training can go on from the
    result. Members of a chain other than `lora` stay as they are.

    Args:
      adapter: of the method `lora`, or a chain with it.
      delta: its delta.
      rank: the new rank, at least 1; a site or layer of a stack with a smaller one keeps its own.

    Returns:
      (adapter, delta) of a plain lora of that rank, with scale 1.

    Raises:
      UserError: no low-rank factors, or a rank below 1 or above all that the adapter has.
    """
    low_rank, rest = parts.split(adapter, delta)
    if not low_rank:
        raise UserError(
            f"truncate needs LoRA factors, and the adapter {adapter.spec.get('method')!r} has none at its "
            f"{len(delta)} sites"
        )
    check_rank(rank)
    largest = max(r for one in low_rank.values() for r in one.ranks)
    if rank > largest:
        raise UserError(f"rank={rank} is above the adapter's own, {largest}; truncation only makes it smaller")
    short = {path: parts.shorten(one, rank) for path, one in low_rank.items()}
    return parts.join(short, rest, parts.dropout_of([adapter]))


def check_rank(rank: Any) -> None:
    """Raises UserError unless the rank is an integer of at least 1."""
    if type(rank) is not int or rank < 1:
        raise UserError(f"rank must be an integer of at least 1, got {rank!r}")
