"""LoRA: `W + scale * A B`, with A and B the only trained arrays.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen (2021), "LoRA: Low-Rank Adaptation of Large Language Models",
arXiv:2106.09685, eq. 3. `scaling='alpha/sqrt(r)'` is rsLoRA: Kalajdzievski (2023), arXiv:2312.03732.

A is (*fan_in, rank), B is (rank, *fan_out), for weights of any number of axes. As in PEFT, A is drawn uniformly within
1/sqrt(fan_in) (the paper draws a Gaussian: `init='gaussian'`) and B is zero; for an embedding the roles are swapped, so
that a row that is looked up trains at once.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.base import Adapter, Entry, batch_dims, draw, entry, json_ready, per_batch, per_site
from lora_jax.errors import UserError, did_you_mean
from lora_jax.lift.nodes import LowRankWeight
from lora_jax.lift.weight import Axes, register
from lora_jax.sites import Site, Sites, in_layers, parse_rules, select

INITS = ("default", "gaussian", "a_zero")
SCALINGS = {
    "alpha/r": lambda alpha, r: alpha / r,
    "alpha/sqrt(r)": lambda alpha, r: alpha / math.sqrt(r),
    "alpha": lambda alpha, r: alpha,
}


@entry(meta=("ranks", "scales"))
class LoRA(Entry):
    """One site's factors.

    Attributes:
      a: (*batch, *fan_in, rank) float32.
      b: (*batch, rank, *fan_out) float32.
      ranks: rank of each batch index; columns beyond it are zero in both factors, a fixed point of the optimizers.
      scales: scale of each batch index.
    """

    a: Any
    b: Any
    axes: Axes
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    member: str = ""
    layout: ClassVar = {"a": ("batch", "fan_in", "rank"), "b": ("batch", "rank", "fan_out")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAWeight(LowRankWeight):
    """`base + scale * a b`."""

    a: Any
    b: Any
    scale: Any
    layout: ClassVar = {**LowRankWeight.layout, **LoRA.layout, "scale": ("batch",)}

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """The scale is applied to b, in float32."""
        return self.a, self.b * self.scale.reshape(self.scale.shape + (1,) * (self.b.ndim - self.scale.ndim))


register(LoRAWeight, meta=("dropout",))


def lora(
    rank: Any = 8,
    alpha: Any = 16,
    *,
    targets: Any = None,
    layers: Any = "all",
    dropout: float = 0.0,
    scaling: str = "alpha/r",
    init: str = "default",
) -> Adapter:
    """Low-rank adaptation.

    Args:
      rank: an integer, or ordered (pattern, rank) rules, first match wins; 0 leaves a site (or a layer of a stack) out.
      alpha: a number, or rules; not rescaled where a rule changes the rank (as PEFT's alpha_pattern).
      targets: patterns on whole paths, or roles; None: every linear, DenseGeneral and convolution, but neither
        embeddings nor a head that the family names.
      layers: 'all', 'last:k', 'first:k', or a list of layer indices.
      dropout: of the activation before A, in [0, 1]; on where `bind` is given a key.
      scaling: 'alpha/r', 'alpha/sqrt(r)' (rsLoRA) or 'alpha'.
      init: 'default' (A uniform, B zero), 'gaussian' (A ~ N(0, 1/rank**2), B zero) or 'a_zero' (A zero, B uniform).

    Returns:
      An Adapter. Its first output equals the base's exactly.

    Raises:
      UserError: a rule that matches nothing, rank 0 everywhere or above min(fan_in, fan_out), a bad option.
    """
    _check_options(dropout, scaling, init)
    spec = json_ready(
        method="lora", rank=rank, alpha=alpha, targets=targets, layers=layers,
        dropout=dropout, scaling=scaling, init=init,
    )  # fmt: skip

    def choose(sites: Sites):
        flags = in_layers(sites, select(sites, targets, default_targets(sites)), layers)
        return {p: v for p, v in _ranks_and_scales(sites, flags, rank, alpha, scaling).items() if any(v[0])}

    def make(key, leaf, site, option):
        del leaf
        ranks, scales = option
        return _make(key, site, ranks, scales, init)

    def weight(base, one, place):
        batch = one.a.shape[: len(one.axes.batch)]
        own = np.asarray(one.scales, np.float32).reshape(batch) if place.scale is None else place.scale
        own = jnp.broadcast_to(jnp.asarray(own, jnp.float32), batch)
        keys = None if place.key is None or dropout == 0.0 else jax.random.split(place.key, batch)
        return LoRAWeight(
            base=base, axes=one.axes, path=place.path, idle=_idle(one, batch),
            a=one.a, b=one.b, scale=own, key=keys, dropout=dropout,
        )  # fmt: skip

    return per_site(spec, choose=choose, make=make, weight=weight)


def default_targets(sites: Sites) -> list[str]:
    """Every matrix except embeddings and a task head."""
    return [p for p, s in sites.items() if s.is_matrix and "embedding" not in s.uses and s.role != "head"]


def _check_options(dropout: float, scaling: str, init: str) -> None:
    if not 0.0 <= dropout <= 1.0:
        raise UserError(f"dropout={dropout!r}: expected a number from 0 to 1")
    for name, value, known in (("scaling", scaling, SCALINGS), ("init", init, INITS)):
        if value not in known:
            raise UserError(f"lora: {name}={value!r} is unknown; {did_you_mean(str(value), known)}")


def _ranks_and_scales(sites: Sites, flags, rank, alpha, scaling):
    paths = list(flags)
    if not paths:
        raise UserError(
            f"lora finds nothing to adapt by itself: no product and no convolution uses any of the {len(sites)} "
            "weights "
            "(embeddings and a head do not count). Give targets"
        )
    not_matrix = [p for p in paths if not sites[p].is_matrix]
    if not_matrix:
        raise UserError(
            f"lora needs weights that a product uses; {not_matrix[0]!r} of shape {sites[not_matrix[0]].shape} is not "
            "one. "
            "Narrow the targets, for example to '.*/kernel'"
        )
    ranks, alphas = parse_rules(rank, "rank", sites, paths), parse_rules(alpha, "alpha", sites, paths)
    out = {}
    for p in paths:
        own = [
            _check_rank(r, sites[p]) if keep else 0
            for r, keep in zip(ranks[p], _spread(flags[p], ranks[p]), strict=True)
        ]
        scales = [SCALINGS[scaling](_number(a, "alpha"), r) if r else 0.0 for a, r in zip(alphas[p], own, strict=True)]
        out[p] = (own, scales)
    if not any(r for own, _ in out.values() for r in own):
        raise UserError(f"rank={rank!r} is 0 at every selected site, so nothing would train; give a rank of at least 1")
    return out


def _spread(flags, values):
    return flags if len(flags) == len(values) else flags * len(values)


def _check_rank(rank: Any, site: Site) -> int:
    if type(rank) is not int or rank < 0:
        raise UserError(
            f"rank must be an integer of at least 0 (a rule may give it by pattern), got {rank!r} for {site.path!r}"
        )
    if rank > site.max_rank:
        raise UserError(
            f"rank {rank} is above min(fan_in, fan_out) = {site.max_rank} of {site.path!r} with shape {site.shape}; "
            f"a rank of at most {site.max_rank} says everything there is to say"
        )
    return rank


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{name} must be a number or (pattern, number) rules, got {value!r}")
    return float(value)


def _make(key: jax.Array, site: Site, ranks: list[int], scales: list[float], init: str) -> LoRA:
    batch, fan_in, fan_out = batch_dims(site), site.dims(site.fan_in), site.dims(site.fan_out)
    own = per_batch(ranks, site)
    r = max(ranks)
    key_a, key_b = jax.random.split(key)
    a = jnp.zeros((*batch, r, *fan_in))
    b = jnp.zeros((*batch, r, *fan_out))
    if site.uses[:1] == ("embedding",) and init != "a_zero":
        b = draw(key_b, batch, r, jax.random.normal, fan_out)
    elif init == "a_zero":
        b = draw(key_b, batch, r, _uniform(math.prod(fan_out)), fan_out)
    elif init == "gaussian":
        a = draw(key_a, batch, r, jax.random.normal, fan_in)
        a = a / np.maximum(own, 1).astype(np.float32).reshape(own.shape + (1,) * (a.ndim - own.ndim))
    else:
        a = draw(key_a, batch, r, _uniform(math.prod(fan_in)), fan_in)
    live = np.arange(r) < own[..., None]  # (*batch, r): beyond a layer's own rank both factors are zero
    a, b = (jnp.where(live.reshape(live.shape + (1,) * (f.ndim - live.ndim)), f, 0) for f in (a, b))
    flat = tuple(int(n) for n in own.reshape(-1)), tuple(float(s) for s in per_batch(scales, site).reshape(-1))
    return LoRA(a=jnp.moveaxis(a, len(batch), -1), b=b, axes=Axes.of(site), ranks=flat[0], scales=flat[1])


def _idle(one: LoRA, batch: tuple[int, ...]) -> int:
    """Leading slices of a stack whose rank is zero throughout."""
    if not batch or 0 not in one.axes.batch[:1]:
        return 0
    live = np.asarray(one.ranks).reshape(batch[0], -1).any(axis=1)
    return int(np.argmax(live)) if live.any() else 0


def _uniform(fan: int):
    width = 2.0 / math.sqrt(fan)
    # u - 1/2 is exact and one product rounds once: the same bits jitted or not, whatever a compiler fuses.
    return lambda key, shape: (jax.random.uniform(key, shape) - 0.5) * width
