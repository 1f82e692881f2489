"""VeRA: one pair of frozen random projections for the whole model, and two trained vectors a site.

Kopiczko, Blankevoort, Asano (2023), "VeRA: Vector-based Random Matrix Adaptation", arXiv:2310.11454, eq. 2: the update
is `diag(lambda_b) B diag(lambda_d) A`. A and B are drawn once (Kaiming uniform, section 3.3), as wide as the widest
site; a narrower one uses their first rows and columns, as in PEFT. They are kept in the delta, and so in the file:
nobody has to draw them again with our random numbers.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax.adapters.base import Adapter, Entry, batch_dims, entry, json_ready, only, per_site
from lora_jax.adapters.parts.ranks import check_dropout, check_matrices, check_number, default_targets
from lora_jax.errors import UserError
from lora_jax.lift.nodes import LowRankWeight
from lora_jax.lift.weight import Axes, register
from lora_jax.sites import in_layers, select

PROJECTIONS = "vera"


@entry()
class Projections(Entry):
    """What all sites share, never trained.

    Attributes:
      a: (widest fan_in, rank) float32.
      b: (rank, widest fan_out) float32.
    """

    a: Any
    b: Any
    axes: Axes = Axes()
    member: str = ""
    layout: ClassVar = {"a": ("width", "rank"), "b": ("rank", "width")}


@entry(meta=("layers",))
class VeRA(Entry):
    """One site's vectors.

    Attributes:
      lambda_d: (*batch, rank) float32.
      lambda_b: (*batch, *fan_out) float32.
      layers: which layers of a stack are adapted; () for all.
    """

    lambda_d: Any
    lambda_b: Any
    axes: Axes
    layers: tuple[bool, ...] = ()
    member: str = ""
    layout: ClassVar = {"lambda_d": ("batch", "rank"), "lambda_b": ("batch", "fan_out")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeRAWeight(LowRankWeight):
    """`base + (A lambda_d) (B lambda_b)`, A and B cut to the site's size."""

    a: Any
    b: Any
    lambda_d: Any
    lambda_b: Any
    layout: ClassVar = {
        **LowRankWeight.layout, **VeRA.layout, "a": ("fan_in", "rank"), "b": ("rank", "fan_out"),
    }  # fmt: skip

    def factors(self) -> tuple[jax.Array, jax.Array]:
        n = len(self.axes.batch)
        a, b = self.a.reshape((1,) * n + self.a.shape), self.b.reshape((1,) * n + self.b.shape)
        d, o = self.lambda_d, self.lambda_b
        a = a * d.reshape(*d.shape[:n], *(1,) * (self.a.ndim - 1), d.shape[-1])
        return a, b * o.reshape(*o.shape[:n], 1, *o.shape[n:])


register(VeRAWeight, meta=("dropout",))


def vera(
    rank: int = 256,
    *,
    targets: Any = None,
    layers: Any = "all",
    dropout: float = 0.0,
    d_initial: float = 0.1,
) -> Adapter:
    """Shared random projections with trained scales.

    Args:
      rank: of the projections, the same everywhere; it may exceed a site's size.
      targets: patterns on whole paths, or roles; None: every linear, DenseGeneral and convolution, but neither
        embeddings nor a head that the family names.
      layers: 'all', 'last:k', 'first:k', or a list of layer indices.
      dropout: of the activation before A, in [0, 1).
      d_initial: initial value of lambda_d; lambda_b starts at zero.

    Returns:
      An Adapter. Its first output equals the base's exactly.

    Raises:
      UserError: nothing to adapt, a target that is no matrix, a bad option.
    """
    check_dropout(dropout)
    check_number("vera", "d_initial", d_initial)
    if type(rank) is not int or rank < 1:
        raise UserError(f"vera: rank={rank!r}: expected one whole number, 1 or more, for all sites")
    spec = json_ready(method="vera", rank=rank, targets=targets, layers=layers, dropout=dropout, d_initial=d_initial)

    def choose(sites):
        flags = in_layers(sites, select(sites, targets, default_targets(sites)), layers)
        check_matrices(sites, list(flags), "vera")
        return flags

    def share(key, sites, chosen):
        n_in, n_out = (
            max(math.prod(sites[p].dims(getattr(sites[p], a))) for p in chosen) for a in ("fan_in", "fan_out")
        )
        key_a, key_b = jax.random.split(key)
        # Kaiming: the bound is sqrt(6 / fan), of A over its input, of B over the rank.
        a = jax.random.uniform(key_a, (n_in, rank), minval=-1.0) * math.sqrt(6.0 / n_in)
        b = jax.random.uniform(key_b, (rank, n_out), minval=-1.0) * math.sqrt(6.0 / rank)
        return {PROJECTIONS: Projections(a=a, b=b)}

    def make(key, leaf, site, flags):
        del key, leaf
        batch = batch_dims(site)
        return VeRA(
            lambda_d=jnp.full((*batch, rank), d_initial, jnp.float32),
            lambda_b=jnp.zeros((*batch, *site.dims(site.fan_out)), jnp.float32),
            axes=Axes.of(site), layers=() if all(flags) else tuple(flags),
        )  # fmt: skip

    def weight(base, one, place):
        dims = lambda axes: tuple(base.shape[i] for i in axes)  # noqa: E731
        fan_in, fan_out = dims(one.axes.fan_in), dims(one.axes.fan_out)
        shared = place.shared[PROJECTIONS]
        batch, lambda_b = dims(one.axes.batch), one.lambda_b
        if one.layers:
            live = jnp.asarray(one.layers).reshape((-1,) + (1,) * (lambda_b.ndim - 1))
            lambda_b = jnp.where(live, lambda_b, 0)
        off = place.key is None or dropout == 0.0
        return VeRAWeight(
            base=base, axes=one.axes, path=place.path, dropout=dropout,
            a=shared.a[: math.prod(fan_in)].reshape(*fan_in, rank),
            b=shared.b[:, : math.prod(fan_out)].reshape(rank, *fan_out),
            lambda_d=one.lambda_d, lambda_b=lambda_b, key=None if off else jax.random.split(place.key, batch),
        )  # fmt: skip

    return per_site(spec, choose=choose, make=make, weight=weight, trainable=only("lambda_d", "lambda_b"), share=share)
