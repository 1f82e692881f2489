"""(IA)^3: one learned vector a layer that rescales what the layer puts out, or what it takes in.

Liu, Tam, Muqeeth, Mohta, Huang, Bansal, Raffel (2022), "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper
than In-Context Learning", arXiv:2205.05638, section 3.3: the keys, the values and the hidden layer of the feed-forward
network are rescaled, from ones. The hidden layer is what the second matrix takes in, hence the `feedforward` sites, as
in PEFT. The output form acts on `W x + b`: the bias is rescaled with the weight.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax.adapters.base import Adapter, Entry, batch_dims, bias_axes, bias_layout, entry, json_ready, per_site
from lora_jax.adapters.parts.ranks import check_matrices, default_targets
from lora_jax.lift.nodes import dense
from lora_jax.lift.products import Conv, Dot, Take, along
from lora_jax.lift.weight import AdaptedWeight, Axes, NotStructural, register
from lora_jax.sites import in_layers, select

ROLES = ("k", "v", "down")  # the paper's places
FEEDFORWARD = "down"


@entry(meta=("bias", "bias_batch", "layers"))
class IA3(Entry):
    """One site's vector.

    Attributes:
      into: (*batch, *fan_in) float32, or None: rescales what the layer takes in.
      out: (*batch, *fan_out) float32, or None: rescales what it puts out.
      bias: path of the bias that is rescaled with `out`, or None.
      bias_batch: its batch axes.
      layers: which layers of a stack are rescaled; () for all.
    """

    axes: Axes
    into: Any = None
    out: Any = None
    bias: str | None = None
    bias_batch: tuple[int, ...] = ()
    layers: tuple[bool, ...] = ()
    member: str = ""
    layout: ClassVar = {"into": ("batch", "fan_in"), "out": ("batch", "fan_out")}

    def about(self) -> str:
        """For the audit."""
        return f"ia3, of the {'output' if self.into is None else 'input'}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3Weight(AdaptedWeight):
    """`base` times a vector along fan_in or fan_out; at a bias, which has no fan_in, along all of it."""

    into: Any = None
    out: Any = None
    layout: ClassVar = IA3.layout

    @property
    def vector(self) -> tuple[jax.Array, tuple[int, ...]]:
        """The vector and the axes of the weight that it runs along."""
        if self.out is not None:
            return self.out, (*self.axes.batch, *self.axes.fan_out)
        return self.into, (*self.axes.batch, *self.axes.fan_in)

    def dense(self) -> jax.Array:
        base, (vector, axes) = dense(self.base), self.vector
        return (base.astype(jnp.float32) * along(vector, axes, base.ndim)).astype(base.dtype)

    def dot_general(self, x: jax.Array, use: Dot) -> jax.Array:
        return use.scaled(x, *self.vector, lambda x: use.apply(x, self.base), len(self.shape))

    def take(self, indices: jax.Array, use: Take) -> jax.Array:
        return use.scaled(use.apply(indices, self.base), indices, *self.vector, len(self.shape))

    def conv(self, x: jax.Array, use: Conv) -> jax.Array:
        vector, axes = self.vector
        if axes != (use.out_axis,):
            return use.apply(x, self.dense())  # along the window: a kernel is small
        return use.scaled(use.apply(x, self.base), vector, axes)

    def broadcast(self, shape: Any, into: Any) -> jax.Array:
        """A bias on its way to the sum: a vector, made dense at no cost."""
        if self.axes.fan_in:
            raise NotStructural
        return jax.lax.broadcast_in_dim(self.dense(), shape, into)

    def add(self, y: jax.Array) -> jax.Array:
        """A bias that needs no broadcast."""
        if self.axes.fan_in:
            raise NotStructural
        return y + self.dense()


register(IA3Weight)


def ia3(*, targets: Any = None, layers: Any = "all", feedforward: Any = None) -> Adapter:
    """Rescales activations by learned vectors.

    Args:
      targets: patterns on whole paths, or roles; None: keys, values and the second feed-forward matrix where the
        family names them, else every matrix but embeddings and a head.
      layers: 'all', 'last:k', 'first:k', or a list of layer indices.
      feedforward: patterns or roles of the targets that are rescaled at their input; None: role `down`. 'none': no
        site.

    Returns:
      An Adapter. Its first output equals the base's exactly.

    Raises:
      UserError: nothing to adapt, a target that is no matrix, a pattern that matches nothing.
    """
    spec = json_ready(method="ia3", targets=targets, layers=layers, feedforward=feedforward)

    def choose(sites):
        roles = [p for p in default_targets(sites) if sites[p].role in ROLES]
        flags = in_layers(sites, select(sites, targets, roles or default_targets(sites)), layers)
        check_matrices(sites, list(flags), "ia3")
        inputs = [] if feedforward == "none" else select(sites, feedforward, _feedforward(sites))
        return {p: (f, p in inputs, bias_axes(sites[p], sites)) for p, f in flags.items()}

    def make(key, leaf, site, option):
        del key, leaf
        flags, at_input, (bias, bias_batch) = option
        shape = site.dims(site.fan_in if at_input else site.fan_out)
        ones = jnp.ones((*batch_dims(site), *shape), jnp.float32)
        kept = () if all(flags) else flags
        if at_input:
            return IA3(into=ones, axes=Axes.of(site), layers=kept)
        return IA3(out=ones, axes=Axes.of(site), bias=bias, bias_batch=bias_batch, layers=kept)

    def weight(base, one, place):
        into, out = (None if v is None else _held(v, one) for v in (one.into, one.out))
        put = {place.path: IA3Weight(base=base, axes=one.axes, path=place.path, into=into, out=out)}
        if one.bias is not None:
            bias = place.leaves[one.bias]
            put[one.bias] = IA3Weight(
                base=bias, axes=bias_layout(one.bias_batch, len(bias.shape)), path=one.bias, out=out
            )
        return put

    return per_site(spec, choose=choose, make=make, weight=weight)


def _feedforward(sites: Any) -> list[str]:
    return [p for p, s in sites.items() if s.role == FEEDFORWARD]


def _held(vector: jax.Array, one: IA3) -> jax.Array:
    """The vector with ones in the layers of a stack that were left out."""
    if not one.layers:
        return vector
    live = jnp.asarray(one.layers).reshape((-1,) + (1,) * (vector.ndim - 1))
    return jnp.where(live, vector, 1.0)
