"""Bottleneck adapters: a small two-layer network at a layer's output, `y + up(f(down(y)))`, `y = W x + b`.

Houlsby, Giurgiu, Jastrzebski, Morrone, de Laroussilhe, Gesmundo, Attariyan, Gelly (2019), "Parameter-Efficient
Transfer Learning for NLP", arXiv:1902.00751, section 2: two a layer, after the attention's and the feed-forward
network's output projection, before the residual sum; the layer norms that train beside them there are `layernorm` in a
chain. `placement='pfeiffer'`: one, after the feed-forward network (Pfeiffer, Kamath, Ruckle, Cho, Gurevych 2021,
arXiv:2005.00247). `placement='parallel'` feeds the network with the layer's input instead, `y + s up(f(down(x)))` (He,
Zhou, Ma, Berg-Kirkpatrick, Neubig 2022, arXiv:2110.04366, section 4.2; there around the whole feed-forward network,
here around its last matrix, since what stands at a site sees that layer alone).

`down` is drawn from N(0, 0.01**2) cut at two standard deviations, as the paper does; `up` starts at zero and not near
zero, so that the first output is the base's exactly.
"""

import dataclasses
import string
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax.adapters.base import (
    Adapter,
    Entry,
    batch_dims,
    bias_axes,
    bias_layout,
    draw,
    entry,
    json_ready,
    per_site,
)  # fmt: skip
from lora_jax.adapters.parts.ranks import check_matrices, check_number, check_word, default_targets
from lora_jax.errors import UserError
from lora_jax.lift.nodes import OutputWeight
from lora_jax.lift.products import Dot
from lora_jax.lift.weight import Axes, NotStructural, register
from lora_jax.sites import in_layers, select

PLACEMENTS = {"houlsby": ("o", "down"), "pfeiffer": ("down",), "parallel": ("down",)}  # roles of the default targets
ACTIVATIONS: dict[str, Callable] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": lambda x: jnp.maximum(x, 0),
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "none": lambda x: x,
}


@entry(meta=("bias", "bias_batch", "layers"))
class Bottleneck(Entry):
    """One site's network.

    Attributes:
      down: (*batch, *fan_out, size) float32; parallel: (*batch, *fan_in, size) in `down_in`.
      up: (*batch, size, *fan_out) float32.
      down_bias, up_bias: (*batch, size) and (*batch, *fan_out) float32.
      bias: path of the layer's bias, after which the network acts, or None.
      bias_batch: its batch axes.
      layers: which layers of a stack have a network; () for all.
    """

    up: Any
    down_bias: Any
    up_bias: Any
    axes: Axes
    down: Any = None
    down_in: Any = None
    bias: str | None = None
    bias_batch: tuple[int, ...] = ()
    layers: tuple[bool, ...] = ()
    member: str = ""
    layout: ClassVar = {
        "down": ("batch", "fan_out", "size"), "down_in": ("batch", "fan_in", "size"),
        "up": ("batch", "size", "fan_out"), "down_bias": ("batch", "size"), "up_bias": ("batch", "fan_out"),
    }  # fmt: skip

    def about(self) -> str:
        """For the audit."""
        return f"bottleneck, size {self.down_bias.shape[-1]}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BottleneckWeight(OutputWeight):
    """What stands at the layer's bias, or at its weight: the output passes through the network."""

    up: Any
    down_bias: Any
    up_bias: Any
    live: Any
    scale: Any
    down: Any = None
    down_in: Any = None
    activation: str = "gelu"
    layout: ClassVar = {**Bottleneck.layout, "live": ("batch",), "scale": ("batch",)}

    def finish(self, y: jax.Array, axes: Axes) -> jax.Array:
        return y + self.network(y, self.down, [*axes.batch, *axes.fan_out], y.ndim, axes).astype(y.dtype)

    def network(self, x: jax.Array, down: Any, into: list[int], y_ndim: int, out: Axes) -> jax.Array:
        """The network's output, laid out as the layer's.

        Args:
          x: what it is fed with.
          down: (*batch, *fan, size).
          into: axes of `x` that its leading dimensions run along.
          y_ndim: number of the output's axes.
          out: where the output's batch and fan_out axes are.
        """
        letters, n = string.ascii_lowercase, len(out.batch)
        x_l = list(letters[: x.ndim])
        batch, fan = [x_l[i] for i in into[:n]], [x_l[i] for i in into[n:]]
        lead = [c for c in x_l if c not in batch + fan]
        kept = list(letters[x.ndim : x.ndim + len(out.fan_out)])
        word = "".join

        def spread(v: jax.Array) -> jax.Array:  # (*batch, *rest) -> (*batch, 1, ..., *rest)
            return v.reshape(*v.shape[:n], *(1,) * len(lead), *v.shape[n:]).astype(x.dtype)

        hidden = jnp.einsum(f"{word(x_l)},{word(batch + fan)}Z->{word(batch + lead)}Z", x, down.astype(x.dtype))
        hidden = ACTIVATIONS[self.activation](hidden + spread(self.down_bias))
        spec = f"{word(batch + lead)}Z,{word(batch)}Z{word(kept)}->{word(batch + lead + kept)}"
        up = jnp.einsum(spec, hidden, self.up.astype(x.dtype)) + spread(self.up_bias)
        each = lambda v: v.reshape(v.shape + (1,) * (up.ndim - n))  # noqa: E731
        up = jnp.where(each(self.live), each(self.scale).astype(x.dtype) * up, 0)
        rest = [i for i in range(y_ndim) if i not in (*out.batch, *out.fan_out)]
        return jnp.moveaxis(up, range(y_ndim), [*out.batch, *rest, *out.fan_out])

    def dot_general(self, x: jax.Array, use: Dot) -> jax.Array:
        if self.down_in is None:
            return super().dot_general(x, use)
        at = dict(zip((*use.contract[1], *use.shared[1]), (*use.contract[0], *use.shared[0]), strict=True))
        own = (*self.axes.batch, *self.axes.fan_in)
        if set(at) != set(own):
            raise NotStructural
        y, out = use.apply(x, self.base), use.in_output(x.ndim, len(self.shape))
        axes = Axes(tuple(out[a] for a in self.axes.batch), (), tuple(out[a] for a in self.axes.fan_out))
        return y + self.network(x, self.down_in, [at[a] for a in own], y.ndim, axes).astype(y.dtype)


register(BottleneckWeight, meta=("spread", "activation"))


def bottleneck(
    size: int = 64,
    *,
    targets: Any = None,
    layers: Any = "all",
    placement: str = "houlsby",
    activation: str = "gelu",
    scale: float = 1.0,
    std: float = 0.01,
) -> Adapter:
    """Small networks at the output of layers.

    Args:
      size: of the hidden layer.
      targets: patterns on whole paths, or roles; None: by placement `o` and `down`, or `down`, where the family names
        roles, else every linear layer.
      layers: 'all', 'last:k', 'first:k', or a list of layer indices.
      placement: 'houlsby', 'pfeiffer' or 'parallel'.
      activation: 'gelu', 'relu', 'silu', 'tanh' or 'none'.
      scale: of the network's output.
      std: standard deviation of `down`, cut at twice that.

    Returns:
      An Adapter. Its first output equals the base's exactly. It cannot be merged: it is not linear. Layer norms are
      trained beside it by `chain(bottleneck(...), layernorm())`.

    Raises:
      UserError: nothing to adapt, an embedding, a bad option.
    """
    check_word("bottleneck", "placement", placement, PLACEMENTS)
    check_word("bottleneck", "activation", activation, ACTIVATIONS)
    if type(size) is not int or size < 1:
        raise UserError(f"bottleneck: size={size!r}: expected a whole number, 1 or more")
    check_number("bottleneck", "scale", scale)
    check_number("bottleneck", "std", std, least=0.0)
    spec = json_ready(
        method="bottleneck", size=size, targets=targets, layers=layers, placement=placement, activation=activation,
        scale=scale, std=std,
    )  # fmt: skip

    def choose(sites):
        usual = default_targets(sites)
        roles = [p for p in usual if sites[p].role in PLACEMENTS[placement]]
        flags = in_layers(sites, select(sites, targets, roles or usual), layers)
        for path in check_matrices(sites, list(flags), "bottleneck"):
            _check_use(path, sites[path].uses, ("linear",) if placement == "parallel" else ("linear", "conv"))
        return {p: (f, bias_axes(sites[p], sites)) for p, f in flags.items()}

    def make(key, leaf, site, option):
        del leaf
        flags, (bias, bias_batch) = option
        parallel = placement == "parallel"
        batch, out = batch_dims(site), site.dims(site.fan_out)
        drawn = draw(key, batch, size, _truncated_normal, site.dims(site.fan_in) if parallel else out)
        # The barrier keeps one rounding a product, jitted or not: the same bits either way.
        drawn = jnp.moveaxis(std * jax.lax.optimization_barrier(drawn), len(batch), -1)
        return Bottleneck(
            down=None if parallel else drawn, down_in=drawn if parallel else None,
            up=jnp.zeros((*batch, size, *out)), down_bias=jnp.zeros((*batch, size)),
            up_bias=jnp.zeros((*batch, *out)), axes=Axes.of(site), bias=None if parallel else bias,
            bias_batch=() if parallel else bias_batch, layers=() if all(flags) else flags,
        )  # fmt: skip

    def weight(base, one, place):
        batch = one.down_bias.shape[:-1]
        live = jnp.asarray(one.layers).reshape(-1) if one.layers else jnp.ones(batch, bool)
        path = one.bias or place.path
        target = place.leaves[path]
        axes = bias_layout(one.bias_batch, len(target.shape)) if one.bias else one.axes
        own = jnp.asarray(scale if place.scale is None else place.scale, jnp.float32)
        return {path: BottleneckWeight(
            base=target, axes=axes, path=path, live=jnp.broadcast_to(live, batch), activation=activation,
            scale=jnp.broadcast_to(own, batch), up=one.up, down=one.down, down_in=one.down_in,
            down_bias=one.down_bias, up_bias=one.up_bias,
        )}  # fmt: skip

    return per_site(spec, choose=choose, make=make, weight=weight)


def _truncated_normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.truncated_normal(key, -2.0, 2.0, shape)


def _check_use(path: str, uses: tuple[str, ...], known: tuple[str, ...]) -> None:
    if len(set(uses)) != 1 or uses[0] not in known:
        raise UserError(
            f"bottleneck acts on what a layer ({' or '.join(known)}) puts out; {path!r} is used as {', '.join(uses)}. "
            "Leave it out of the targets"
        )
