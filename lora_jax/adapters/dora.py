"""DoRA: the weight taken apart into magnitude and direction, `m * (W + s A B) / ||W + s A B||`, column by column.

Liu, Wang, Yin, Molchanov, Wang, Cheng, Chen (2024), "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353,
eq. 5; the norm is treated as a constant in the backward pass (section 4.3, eq. 11) unless `norm_gradient` says
otherwise. One magnitude per output feature (the paper's columns).

The norm is never taken of a formed matrix: with W a = sum over fan_in,
||W + s a b||**2 = ||W||**2 + 2 s <W a, b> + s**2 <(a a) b, b> per output, where ||W||**2 is kept in the delta. PEFT
pushes an identity matrix through both factors instead. With dropout, PEFT's base term sees the dropped activation too;
here, as in LoRA, only the low-rank branch does.
"""

import dataclasses
import string
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.base import Adapter, entry, json_ready, only, per_site
from lora_jax.adapters.lora import LoRA, LoRAWeight, start
from lora_jax.adapters.parts import inits
from lora_jax.adapters.parts.ranks import (
    SCALINGS,
    batch_of,
    check_dropout,
    check_word,
    choose_ranks,
    idle,
    keys_at,
    scale_at,
)  # fmt: skip
from lora_jax.lift.nodes import LowRankWeight, dense
from lora_jax.lift.products import Conv, Dot, Take, along
from lora_jax.lift.weight import NotStructural, register

INITS = tuple(name for name in inits.INITS if name not in (*inits.RESIDUAL, *inits.DATA, "orthogonal"))


@entry(meta=("ranks", "scales"))
class DoRA(LoRA):
    """One site's factors and magnitude.

    Attributes:
      magnitude: (*batch, *fan_out) float32, trained.
      norm2: (*batch, *fan_out) float32, ||W||**2 per output; frozen.
    """

    magnitude: Any
    norm2: Any
    layout: ClassVar = {**LoRA.layout, "magnitude": ("batch", "fan_out"), "norm2": ("batch", "fan_out")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRAWeight(LoRAWeight):
    """`magnitude * (base + scale * a b) / norm`."""

    magnitude: Any
    norm2: Any
    live: Any
    norm_gradient: bool = False
    layout: ClassVar = {
        **LoRAWeight.layout, "magnitude": ("batch", "fan_out"), "norm2": ("batch", "fan_out"), "live": ("batch",),
    }  # fmt: skip

    def ratio(self) -> jax.Array:
        """magnitude / norm, (*batch, *fan_out) float32; 1 in the layers of a stack that were left out."""
        a, b = self.factors()
        if not self.norm_gradient:
            a, b = jax.lax.stop_gradient((a, b))
        batch, fan_in, fan_out = ("".join(string.ascii_letters[i] for i in axes) for axes in self._roles())
        weight = string.ascii_letters[: len(self.shape)]
        base = dense(self.base).astype(jnp.float32)
        wa = jnp.einsum(f"{weight},{batch}{fan_in}Z->{batch}Z{fan_out}", base, a)
        aa = jnp.einsum(f"{batch}{fan_in}Y,{batch}{fan_in}Z->{batch}YZ", a, a)
        aab = jnp.einsum(f"{batch}YZ,{batch}Z{fan_out}->{batch}Y{fan_out}", aa, b)
        inner = jnp.sum((2.0 * wa + aab) * b, axis=len(self.axes.batch))
        # The barrier keeps the division: as a product with rsqrt it would not be exactly 1 at the start.
        norm = jax.lax.optimization_barrier(jnp.sqrt(self.norm2 + inner))
        ratio = self.magnitude / norm
        return jnp.where(self.live.reshape(self.live.shape + (1,) * (ratio.ndim - self.live.ndim)), ratio, 1.0)

    @property
    def outputs(self) -> tuple[int, ...]:
        """Axes of the weight that the magnitude runs along."""
        return (*self.axes.batch, *self.axes.fan_out)

    def dense(self) -> jax.Array:
        base = dense(self.base)
        whole = base.astype(jnp.float32) + self.update()
        return (whole * along(self.ratio(), self.outputs, whole.ndim)).astype(base.dtype)

    def dot_general(self, x: jax.Array, use: Dot) -> jax.Array:
        product = lambda x: LowRankWeight.dot_general(self, x, use)  # noqa: E731
        return use.scaled(x, self.ratio(), self.outputs, product, len(self.shape))

    def take(self, indices: jax.Array, use: Take) -> jax.Array:
        rows = LowRankWeight.take(self, indices, use)
        return use.scaled(rows, indices, self.ratio(), self.outputs, len(self.shape))

    def conv(self, x: jax.Array, use: Conv) -> jax.Array:
        if self.outputs != (use.out_axis,):
            raise NotStructural
        return use.scaled(LowRankWeight.conv(self, x, use), self.ratio(), self.outputs)


register(DoRAWeight, meta=("dropout", "norm_gradient"))


def squared_norms(leaf: Any, site: Any) -> jax.Array:
    """||W||**2 of every output, (*batch, *fan_out) float32; of a quantized weight, those of what it stands for."""
    w = jnp.asarray(dense(leaf), jnp.float32)
    outputs = (*site.batch, *site.fan_out)
    return jnp.sum(w.transpose(*outputs, *site.fan_in) ** 2, axis=tuple(range(len(outputs), w.ndim)))


def dora(
    rank: Any = 8,
    alpha: Any = 16,
    *,
    targets: Any = None,
    layers: Any = "all",
    dropout: float = 0.0,
    scaling: str = "alpha/r",
    init: str = "default",
    norm_gradient: bool = False,
) -> Adapter:
    """Weight-decomposed low-rank adaptation.

    Args:
      rank, alpha, targets, layers, dropout, scaling: as in `lora`.
      init: 'default', 'gaussian' or 'a_zero', as in `lora`.
      norm_gradient: differentiate through the norm as well.

    Returns:
      An Adapter. Its first output equals the base's exactly.

    Raises:
      UserError: as `lora`.
    """
    check_dropout(dropout)
    check_word("dora", "scaling", scaling, SCALINGS)
    check_word("dora", "init", init, INITS)
    check_word("dora", "norm_gradient", norm_gradient, (True, False))
    spec = json_ready(
        method="dora", rank=rank, alpha=alpha, targets=targets, layers=layers, dropout=dropout, scaling=scaling,
        init=init, norm_gradient=norm_gradient,
    )  # fmt: skip

    def choose(sites):
        return choose_ranks(
            sites, method="dora", targets=targets, layers=layers, rank=rank, alpha=alpha, scaling=scaling
        )

    def make(key, leaf, site, option):
        one = start(key, leaf, site, option, init)
        norm2 = squared_norms(leaf, site)
        fields = {f.name: getattr(one, f.name) for f in dataclasses.fields(one)}
        return DoRA(**fields, magnitude=jnp.sqrt(norm2), norm2=norm2)

    def weight(base, one, place):
        return DoRAWeight(
            base=base, axes=one.axes, path=place.path, idle=idle(one), a=one.a, b=one.b,
            scale=scale_at(one, place.scale), key=keys_at(one, place.key, dropout), dropout=dropout,
            magnitude=one.magnitude, norm2=one.norm2, norm_gradient=norm_gradient,
            live=np.asarray(one.ranks).reshape(batch_of(one)) > 0,
        )  # fmt: skip

    return per_site(spec, choose=choose, make=make, weight=weight, trainable=only("a", "b", "magnitude"))
