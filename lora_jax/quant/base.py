"""A frozen weight in few bits: `Format`, what a file of this folder defines, and `QuantizedWeight`, the node in its
place.

The weight is kept once, packed, as (*batch, *fan_in, *fan_out) in blocks along fan_in (an embedding's along fan_out:
a row is then rounded by itself). A transposition, reshape or cast is only remembered, and done on the dense value.
That value exists for the length of one product: `x W` is rematerialized, so the backward pass reads the packed bytes
again instead of keeping W, and nothing flows into W.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from lora_jax.errors import UserError
from lora_jax.lift.low_rank import varying_alike
from lora_jax.lift.weight import AdaptedWeight, Axes, NotStructural, register, regroup, slice_along
from lora_jax.quant import blocks
from lora_jax.quant.product import product
from lora_jax.sites import Site


@dataclasses.dataclass(frozen=True)
class Format:
    """A number format.

    Attributes:
      name: of the file.
      bits: of one code, 4 or 8.
      encode: float32 NumPy array in [-1, 1] -> uint8 codes.
      decode: uint8 JAX array of codes -> float32 in [-1, 1].
      block: weights that share one constant; None is the whole fan_in.
      double: whether the constants are quantized too.
    """

    name: str
    bits: int
    encode: Callable[[np.ndarray], np.ndarray]
    decode: Callable[[jax.Array], jax.Array]
    block: int | None
    double: bool

    def __post_init__(self):
        if self.block is not None and (type(self.block) is not int or self.block < 2):
            raise UserError(f"{self.name}: block={self.block!r}; expected an integer of at least 2, or None for fan_in")
        if type(self.double) is not bool:
            raise UserError(f"{self.name}: double={self.double!r}; expected True or False")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedWeight(AdaptedWeight):
    """A weight in a number format.

    Attributes:
      base: the codes, uint8 (*batch, blocks, bytes, *kept).
      constants: (*batch, blocks, *kept): the largest magnitude of each block, float32 or (double quantization) uint8.
      levels: (*batch, groups + 1) float32 of the double quantization, or None.
      format: how codes are read.
      blocked: sizes of the axes that blocks run along.
      kept: number of the axes that they do not run along.
      kind: name of the dtype that the weight had.
      views: what became of the axes after the batch axes: ("transpose", permutation), ("reshape", shape), ("slice",
        axis, start, size, stride); and of the values: ("astype", name), ("place", function, order).
      order: the permutation of all axes that comes after the views, where it moves batch axes; else None.
    """

    constants: Any
    levels: Any
    format: Format
    blocked: tuple[int, ...]
    kept: int
    kind: str
    views: tuple[tuple[Any, ...], ...] = ()
    order: tuple[int, ...] | None = None
    frozen: ClassVar[bool] = True

    @property
    def lead(self) -> int:
        """Number of batch axes, told by the arrays: a tree that vmap or a scan slices stays true."""
        return self.base.ndim - 2 - self.kept

    @property
    def shape(self) -> tuple[int, ...]:
        tail = (*self.blocked, *self.base.shape[self.lead + 2 :])
        for view in self.views:
            tail = _shape_after(view, tail)
        whole = (*self.base.shape[: self.lead], *tail)
        return whole if self.order is None else tuple(whole[a] for a in self.order)

    @property
    def dtype(self) -> Any:
        casts = [view[1] for view in self.views if view[0] == "astype"]
        return jnp.dtype(casts[-1] if casts else self.kind)

    def arrays(self) -> dict[str, Any]:
        """The arrays by field."""
        return {n: v for n in ("base", "constants", "levels") if (v := getattr(self, n)) is not None}

    def dense(self) -> jax.Array:
        lead, batch = self.lead, self.base.shape[: self.lead]
        codes = self.base if self.format.bits == 8 else blocks.unpack(self.base, lead + 1)
        constants = self.constants if self.levels is None else blocks.widen(self.constants, self.levels)
        value = self.format.decode(codes) * jnp.expand_dims(constants, lead + 1)
        kept = self.base.shape[lead + 2 :]
        value = value.reshape(*batch, codes.shape[lead] * codes.shape[lead + 1], *kept)
        value = lax.slice_in_dim(value, 0, math.prod(self.blocked), axis=lead)
        value = value.reshape(*batch, *self.blocked, *kept).astype(self.kind)
        for view in self.views:
            value = _apply(view, value, lead)
        return lax.stop_gradient(value if self.order is None else value.transpose(self.order))

    def dot_general(self, x: jax.Array, use: Any) -> jax.Array:
        return product(*varying_alike(x, self.base)[:1], self, use)

    def conv(self, x: jax.Array, use: Any) -> jax.Array:
        return product(*varying_alike(x, self.base)[:1], self, use)

    def astype(self, dtype: Any) -> Self:
        return self._viewed("astype", jnp.dtype(dtype).name)

    def constrain(self, place: Any) -> Self:
        """Applies a placement to the dense value, since the packed arrays have other axes."""
        return self._viewed("place", place, self.order)

    def transpose(self, permutation: Sequence[int]) -> Self:
        order = range(len(self.shape)) if self.order is None else self.order
        return dataclasses.replace(self, order=tuple(order[p] for p in permutation)).settled()

    def reshape(self, shape: Sequence[int]) -> Self:
        """Any reshape that does not merge batch axes with others."""
        if self.order is not None:
            return self._reshape_around(shape)
        batch = self.base.shape[: self.lead]
        end = next((k for k in range(len(shape) + 1) if math.prod(shape[:k]) == math.prod(batch)), None)
        if end is None:
            raise NotStructural
        return self._batched(tuple(shape[:end]))._viewed("reshape", tuple(shape[end:]))

    def slice(self, axis: int, start: Any, size: int, stride: int = 1) -> Self:
        """A slice; `start` may be traced along a batch axis."""
        own = axis if self.order is None else self.order[axis]
        if own < self.lead:
            self._check_unplaced()
            new = {name: slice_along(value, own, start, size, stride) for name, value in self.arrays().items()}
            return dataclasses.replace(self, **new)
        if not isinstance(start, int):
            raise NotStructural
        return self._viewed("slice", own - self.lead, start, size, stride)

    def stacked(self) -> tuple[dict[str, Any], AdaptedWeight]:
        axis = 0 if self.order is None else self.order[0]
        if axis >= self.lead:
            raise NotStructural
        self._check_unplaced()
        order = None if self.order is None else tuple(a - (a > axis) for a in self.order[1:])
        scanned = {name: jnp.moveaxis(value, axis, 0) for name, value in self.arrays().items()}
        return scanned, dataclasses.replace(self, base=None, constants=None, levels=None, order=order)

    def unstacked(self, scanned: dict[str, Any]) -> Self:
        return dataclasses.replace(self, **scanned).settled()

    def specs(self, spec: Any) -> Self:
        """As `lift.weight.specs`; inside `shard_map` a part of the packed arrays must be the weight of the part.

        Raises:
          NotStructural: the spec divides more than batch axes.
        """
        entries = self._entries(spec)
        if any(e is not None for e in entries[self.lead :]):
            raise NotStructural
        return self._specs(entries)

    def placement(self, spec: Any) -> Self:
        """Specs of the arrays that put them where the dense weight's `spec` would put it."""
        return self._specs(self._entries(spec))

    def settled(self) -> Self:
        """Moves what `order` says about the axes after the batch axes into the views, if it says no more than that."""
        lead, order = self.lead, self.order
        if order is None or order[:lead] != tuple(range(lead)):
            return self
        tail = tuple(a - lead for a in order[lead:])
        plain = dataclasses.replace(self, order=None)
        return plain if tail == tuple(range(len(tail))) else plain._viewed("transpose", tail)

    def _viewed(self, *view: Any) -> Self:
        return dataclasses.replace(self, views=(*self.views, view))

    def _batched(self, batch: tuple[int, ...]) -> Self:
        """The batch axes reshaped."""
        lead = self.lead
        if batch == self.base.shape[:lead]:
            return self
        self._check_unplaced()
        new = {name: value.reshape(*batch, *value.shape[lead:]) for name, value in self.arrays().items()}
        return dataclasses.replace(self, **new)

    def _reshape_around(self, shape: Sequence[int]) -> Self:
        """A reshape while batch axes stand between the others; each of them stays, or goes if its size is one."""
        assert self.order is not None
        lead, batch, order = self.lead, self.base.shape[: self.lead], self.order
        after = {}  # batch axis -> where it is after the reshape
        for left, right in regroup(self.shape, shape):
            own = [order[i] for i in left if order[i] < lead]
            if own and (len(left) > 1 or len(right) > 1):
                raise NotStructural
            after.update({a: j for a in own for j in right})
        tail = tuple(a - lead for a in order if a >= lead)
        rest = [j for j in range(len(shape)) if j not in after.values()]
        stay = sorted(after)
        slim = dataclasses.replace(self._batched(tuple(batch[a] for a in stay)), order=None)
        slim = slim._viewed("transpose", tail)._viewed("reshape", tuple(shape[j] for j in rest))
        axes = [after[a] for a in stay] + rest
        return slim.transpose([axes.index(j) for j in range(len(shape))])

    def _check_unplaced(self) -> None:
        """A placement was made for the shape that the weight had."""
        if any(view[0] == "place" for view in self.views):
            raise NotStructural

    def _entries(self, spec: Any) -> list[Any]:
        """The entries of a dense weight's spec in the order of the packed weight's axes."""
        entries = [*spec, *[None] * (len(self.shape) - len(spec))]
        origin = list(range(len(self.blocked) + self.kept))
        if not any(e is not None for e in entries):
            return [None] * (self.lead + len(origin))
        for view in self.views:
            if view[0] in ("reshape", "slice"):
                raise NotStructural
            if view[0] == "transpose":
                origin = [origin[p] for p in view[1]]
        whole = [*range(self.lead), *(self.lead + o for o in origin)]
        axes = whole if self.order is None else [whole[a] for a in self.order]
        return [entries[axes.index(a)] for a in range(len(axes))]

    def _specs(self, entries: list[Any]) -> Self:
        lead = self.lead
        batch, first, kept = entries[:lead], entries[lead], entries[lead + len(self.blocked) :]
        new: dict[str, Any] = {
            "base": P(*batch, first, None, *kept),
            "constants": P(*batch, first, *kept),
            "levels": P(*batch, None),
        }
        return dataclasses.replace(self, **{name: new[name] for name in self.arrays()})


register(QuantizedWeight, meta=("format", "blocked", "kept", "kind", "views", "order"))


def _shape_after(view: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    match view:
        case "transpose", permutation:
            return tuple(shape[p] for p in permutation)
        case "reshape", new:
            return new
        case "slice", axis, _, size, _:
            return (*shape[:axis], size, *shape[axis + 1 :])
    return shape


def _apply(view: tuple[Any, ...], value: jax.Array, lead: int) -> jax.Array:
    match view:
        case "transpose", permutation:
            return value.transpose(*range(lead), *(lead + p for p in permutation))
        case "reshape", new:
            return value.reshape(*value.shape[:lead], *new)
        case "slice", axis, start, size, stride:
            return lax.slice_in_dim(value, start, start + (size - 1) * stride + 1, stride, lead + axis)
        case "astype", name:
            return value.astype(name)
        case "place", function, None:
            return function(value)
        case "place", function, order:
            return function(value.transpose(order)).transpose(np.argsort(order))
    raise AssertionError(view)


def encode(weight: Any, site: Site, form: Format) -> QuantizedWeight:
    """Quantizes one weight on the host.

    Args:
      weight: the array.
      site: what its axes mean.
      form: the format.

    Raises:
      UserError: an entry that is not finite.
    """
    dense = np.asarray(weight).astype(np.float32)
    if not np.isfinite(dense).all():
        raise UserError(f"the weight {site.path!r} has entries that are not finite; {form.name} cannot hold them")
    blocked, kept = site.fan_in, site.fan_out
    if site.uses[:1] == ("embedding",):
        blocked, kept = kept, blocked
    lead, axes = len(site.batch), (*site.batch, *blocked, *kept)
    dense = dense.transpose(axes)
    rows = (*dense.shape[:lead], math.prod(site.dims(blocked)), *site.dims(kept))
    cut = blocks.cut(dense.reshape(rows), lead, form.block)
    largest = np.abs(cut).max(lead + 1)
    codes = form.encode(cut / np.expand_dims(np.where(largest == 0, 1, largest), lead + 1))
    codes = codes if form.bits == 8 else blocks.pack(codes, lead + 1)
    constants, levels = blocks.squeeze(largest, lead) if form.double else (largest, None)
    order = tuple(axes.index(a) for a in range(len(axes)))
    return QuantizedWeight(
        base=jnp.asarray(codes), constants=jnp.asarray(constants), levels=None if levels is None else
        jnp.asarray(levels), axes=Axes(), path=site.path, format=form, blocked=site.dims(blocked), kept=len(kept),
        kind=jnp.dtype(weight.dtype).name, order=order,
    ).settled()  # fmt: skip
