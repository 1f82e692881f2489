"""LoHa: `W + scale * (A1 B1) * (A2 B2)`, an elementwise product of two low-rank matrices: rank r * r from 2 r columns.

Hyeon-Woo, Ye-Bin, Oh (2021), "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
arXiv:2108.06098, eq. 1 and proposition 1; as an update of a frozen weight it is LoHa of LyCORIS: Yeh et al. (2023),
arXiv:2309.14859, eq. 6.

The elementwise product is itself a product of r * r columns (the row-wise Khatri-Rao products of the factors), so in an
equation it is applied as a low-rank update, exactly, and the dense update is never formed. At a site where r * r
reaches min(fan_in, fan_out) that would cost more than the dense update, which is used there instead.

The initial values are PEFT's: uniform within 1/sqrt(fan_in) and 1/sqrt(rank), the second factor along fan_in zero. The
paper draws all four by He's rule, since it trains from scratch. Not built: the Tucker form for convolutions
(proposition 3); a kernel's fan_in is flattened.
"""

import dataclasses
import math
import string
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.base import Adapter, Entry, draw, entry, json_ready, per_site
from lora_jax.adapters.parts import inits
from lora_jax.adapters.parts.ranks import choose_ranks, idle, scale_at, times
from lora_jax.lift.nodes import LowRankWeight
from lora_jax.lift.products import Conv, Dot, Take
from lora_jax.lift.weight import Axes, register


@entry(meta=("ranks", "scales"))
class LoHa(Entry):
    """One site's factors.

    Attributes:
      a, a2: (*batch, *fan_in, rank) float32; in PEFT the transposes of `hada_w1_b` and `hada_w2_b`.
      b, b2: (*batch, rank, *fan_out) float32; in PEFT the transposes of `hada_w1_a` and `hada_w2_a`.
      ranks: rank of each batch index; columns beyond it are zero in all four, a fixed point of the optimizers.
      scales: scale of each batch index.
    """

    a: Any
    b: Any
    a2: Any
    b2: Any
    axes: Axes
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    member: str = ""
    widens: ClassVar = True
    layout: ClassVar = {
        "a": ("batch", "fan_in", "rank"), "b": ("batch", "rank", "fan_out"),
        "a2": ("batch", "fan_in", "rank"), "b2": ("batch", "rank", "fan_out"),
    }  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoHaWeight(LowRankWeight):
    """`base + scale * (a b) * (a2 b2)`."""

    a: Any
    b: Any
    a2: Any
    b2: Any
    scale: Any
    layout: ClassVar = {**LowRankWeight.layout, **LoHa.layout, "scale": ("batch",)}

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """All pairs of columns of the two factors along fan_in, all pairs of rows of those along fan_out."""
        n = len(self.axes.batch)
        a = self.a[..., :, None] * self.a2[..., None, :]
        b = jnp.expand_dims(self.b, n + 1) * jnp.expand_dims(times(self.b2, self.scale), n)
        r = self.b.shape[n]
        return a.reshape(*a.shape[:-2], r * r), b.reshape(*b.shape[:n], r * r, *b.shape[n + 2 :])

    def update(self) -> jax.Array:
        letters = string.ascii_letters
        batch, fan_in, fan_out = ("".join(letters[i] for i in axes) for axes in self._roles())
        rule = f"{batch}{fan_in}Z,{batch}Z{fan_out}->{letters[: len(self.shape)]}"
        return jnp.einsum(rule, self.a, self.b) * jnp.einsum(rule, self.a2, times(self.b2, self.scale))

    @property
    def wide(self) -> bool:
        """Whether r * r columns are no fewer than the weight's own."""
        sizes = [math.prod(self.shape[i] for i in axes) for axes in self._roles()[1:]]
        return self.a.shape[-1] ** 2 >= min(sizes)

    def dot_general(self, x: jax.Array, use: Dot) -> jax.Array:
        return self._beside(x, use) if self.wide else super().dot_general(x, use)

    def take(self, indices: jax.Array, use: Take) -> jax.Array:
        return self._beside(indices, use) if self.wide else super().take(indices, use)

    def conv(self, x: jax.Array, use: Conv) -> jax.Array:
        return self._beside(x, use) if self.wide else super().conv(x, use)

    def _beside(self, x: jax.Array, use: Any) -> jax.Array:
        """The dense update beside the base: added to a bfloat16 weight a small one would be rounded away."""
        y = use.apply(x, self.base)
        return y + use.apply(x, self.update().astype(self.dtype)).astype(y.dtype)


register(LoHaWeight, meta=("dropout",))


def loha(rank: Any = 8, alpha: Any = 8, *, targets: Any = None, layers: Any = "all") -> Adapter:
    """Low-rank Hadamard adaptation.

    Args:
      rank: of each of the two matrices, an integer or ordered (pattern, rank) rules, first match wins; 0 leaves a site
        (or a layer of a stack) out. The update's rank is up to rank * rank.
      alpha: a number, or rules; the scale is alpha / rank, as in PEFT.
      targets: patterns on whole paths, or roles; None: every linear, DenseGeneral and convolution, but neither
        embeddings nor a head that the family names.
      layers: 'all', 'last:k', 'first:k', or a list of layer indices.

    Returns:
      An Adapter. Its first output equals the base's exactly.

    Raises:
      UserError: a rule that matches nothing, rank 0 everywhere or above min(fan_in, fan_out).
    """
    spec = json_ready(method="loha", rank=rank, alpha=alpha, targets=targets, layers=layers)

    def choose(sites):
        return choose_ranks(sites, method="loha", targets=targets, layers=layers, rank=rank, alpha=alpha)

    def weight(base, one, place):
        return LoHaWeight(
            base=base, axes=one.axes, path=place.path, idle=idle(one), a=one.a, b=one.b, a2=one.a2, b2=one.b2,
            scale=scale_at(one, place.scale),
        )  # fmt: skip

    return per_site(spec, choose=choose, make=_start, weight=weight)


def _start(key: jax.Array, leaf: Any, site: Any, option: Any) -> LoHa:
    at = inits.start_of(key, leaf, site, option)
    keys, n = jax.random.split(key, 3), len(at.batch)
    a = jnp.moveaxis(draw(keys[0], at.batch, at.r, inits.uniform(math.prod(at.fan_in)), at.fan_in), n, -1)
    # PEFT's bound for its (fan_out, rank) arrays is 1/sqrt(rank).
    bound = 1 / np.sqrt(np.maximum(at.ranks, 1), dtype=np.float32)
    b, b2 = (times(draw(k, at.batch, at.r, inits.uniform(1), at.fan_out), bound) for k in keys[1:])
    a, b, b2 = at.alive(a, -1), at.alive(b, n), at.alive(b2, n)
    ranks, scales = at.static()
    return LoHa(a=a, b=b, a2=jnp.zeros_like(a), b2=b2, axes=Axes.of(site), ranks=ranks, scales=scales)
