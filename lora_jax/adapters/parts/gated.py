"""Sums of rank-one parts with a gate each, `W + scale * sum_i e_i a_i b_i`: what methods that prune ranks share.

A gate of zero switches its part off. The number of parts at the start and at the end of training are static; which
parts live in between is `parts.budget`'s business.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.base import Entry, Place, batch_dims, entry, per_batch
from lora_jax.adapters.parts.ranks import check_rank, choose_ranks, idle, keys_at, scale_at, times
from lora_jax.errors import UserError
from lora_jax.lift.nodes import LowRankWeight
from lora_jax.lift.weight import Axes, register
from lora_jax.sites import Site, Sites, parse_rules


@entry(meta=("ranks", "budget", "scales"))
class Gated(Entry):
    """One site's parts; a method has a subclass of its own.

    Attributes:
      a: (*batch, *fan_in, rank) float32.
      e: (*batch, rank) float32, the gates; exactly zero where a part is pruned.
      b: (*batch, rank, *fan_out) float32.
      ranks: parts of each batch index at the start; beyond them all three are zero, a fixed point of the optimizers.
      budget: parts of each batch index at the end, on average: the run's budget is the sum over all sites.
      scales: scale of each batch index.
    """

    a: Any
    e: Any
    b: Any
    axes: Axes
    ranks: tuple[int, ...]
    budget: tuple[int, ...]
    scales: tuple[float, ...]
    member: str = ""
    layout: ClassVar = {"a": ("batch", "fan_in", "rank"), "e": ("batch", "rank"), "b": ("batch", "rank", "fan_out")}

    @classmethod
    def of(cls, a: jax.Array, b: jax.Array, site: Site, plan: "Plan") -> Self:
        """The first entry, all gates shut.

        Args:
          a: (*batch, rank, *fan_in), drawn.
          b: (*batch, rank, *fan_out), drawn.
          site: to put it on.
          plan: of the site.
        """
        batch = batch_dims(site)
        live = live_at_first(plan.ranks, a.shape[: len(batch) + 1])
        a, b = (jnp.where(live.reshape(live.shape + (1,) * (f.ndim - live.ndim)), f, 0) for f in (a, b))
        e = jnp.zeros(live.shape, jnp.float32)
        return cls(a=jnp.moveaxis(a, len(batch), -1), e=e, b=b, axes=Axes.of(site), **plan._asdict())


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedWeight(LowRankWeight):
    """`base + scale * sum_i e_i a_i b_i`."""

    a: Any
    e: Any
    b: Any
    scale: Any
    layout: ClassVar = {**LowRankWeight.layout, **Gated.layout, "scale": ("batch",)}

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """Gates and scale are applied to b, in float32."""
        return self.a, times(self.b, times(self.e, self.scale))


register(GatedWeight, meta=("dropout",))


def gated_weight(base: Any, one: Gated, place: Place, dropout: float) -> GatedWeight:
    """What stands at a site."""
    return GatedWeight(
        base=base, axes=one.axes, path=place.path, idle=idle(one), a=one.a, e=one.e, b=one.b,
        scale=scale_at(one, place.scale), key=keys_at(one, place.key, dropout), dropout=dropout,
    )  # fmt: skip


class Plan(NamedTuple):
    """What a method gives every batch index of a site, flat.

    Attributes:
      ranks: parts at the start.
      budget: parts at the end, on average: the run's budget is the sum over all sites.
      scales: of the update.
    """

    ranks: tuple[int, ...]
    budget: tuple[int, ...]
    scales: tuple[float, ...]


def choose_parts(
    sites: Sites, *, method: str, rank: Any, init_rank: Any, alpha: Any, targets: Any, layers: Any
) -> dict[str, Plan]:
    """Chooses sites, start ranks and final budget.

    Args:
      sites: from `find_sites`.
      method: its name, for messages.
      rank: final rank of a weight on average, an integer or rules.
      init_rank: rank at the start, likewise; None: 1.5 times `rank`, rounded up, as far as the weight's size allows.
      alpha: the scale is alpha over the rank at the start.
      targets, layers: as in `lora`.

    Raises:
      UserError: as `lora` does, or a start below the end.
    """
    chosen = choose_ranks(sites, method=method, targets=targets, layers=layers, rank=rank, alpha=alpha, scaling="alpha")
    given = None if init_rank is None else parse_rules(init_rank, "init_rank", sites, list(chosen))
    out = {}
    for path, (final, alphas) in chosen.items():
        site = sites[path]
        first = [_first_rank(f, site, None if given is None else given[path][i]) for i, f in enumerate(final)]
        scales = [a / r if r else 0.0 for a, r in zip(alphas, first, strict=True)]
        flat = lambda values: per_batch(values, site).reshape(-1).tolist()  # noqa: B023, E731
        out[path] = Plan(tuple(flat(first)), tuple(flat(final)), tuple(flat(scales)))
    return out


def _first_rank(final: int, site: Site, given: Any) -> int:
    if final == 0:
        return 0
    first = min(math.ceil(1.5 * final), site.max_rank) if given is None else check_rank(given, site)
    if first < final:
        raise UserError(f"init_rank {first} is below rank {final} at {site.path!r}: a budget falls, it does not grow")
    return first


def live_at_first(ranks: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """(*batch, rank) bool: False where a batch index of a smaller rank is padded."""
    return (np.arange(shape[-1]) < np.asarray(ranks)[:, None]).reshape(shape)


def rank_pattern(delta: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Which parts of a trained delta live.

    Args:
      delta: of a method with a budget, or of a chain with one.

    Returns:
      `{path: (*batch, rank) bool}` of the sites with gates; before training no part lives.
    """
    return {path: np.asarray(one.e) != 0 for path, one in delta.items() if isinstance(one, Gated)}
