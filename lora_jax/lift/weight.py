"""AdaptedWeight: a pytree node that stands where a base weight stood.

It holds the frozen weight (an array, or another adapted weight: they nest) and a method's arrays beside it, and
answers the questions the interpreter asks: what is your dense shape, what are you transposed, reshaped, sliced, cast,
how do you multiply an activation, what is your dense value. A method writes a subclass with its fields, says in
`layout` which axes of the weight each field runs along, and implements the products; the structural operations follow
from `layout`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax

ROLES = ("batch", "fan_in", "fan_out")


class NotStructural(Exception):
    """The operation does not commute with this weight; the interpreter falls back on its dense value."""


@dataclasses.dataclass(frozen=True)
class Axes:
    """What the axes of a weight mean: each axis number stands in exactly one of the three tuples.

    The order inside a tuple is the order in which a method's field runs along those axes.
    """

    batch: tuple[int, ...] = ()
    fan_in: tuple[int, ...] = ()
    fan_out: tuple[int, ...] = ()

    @classmethod
    def of(cls, site: Any) -> "Axes":
        """The axes of a `Site`."""
        return cls(tuple(site.batch), tuple(site.fan_in), tuple(site.fan_out))

    def role(self, axis: int) -> str:
        """Which of the three tuples holds the axis."""
        return next(r for r in ROLES if axis in getattr(self, r))

    def relabel(self, new: Sequence[Sequence[int]]) -> "Axes":
        """Replaces every old axis `i` by the new axes `new[i]` (none, one or several)."""
        return Axes(*(tuple(n for a in getattr(self, r) for n in new[a]) for r in ROLES))


def register(cls: type, meta: Sequence[str] = ()) -> type:
    """Makes a dataclass with a `base`, its fields in `layout`, and static `meta` fields a pytree node."""
    meta = ["axes", "path", "idle", *meta]
    data = [f.name for f in dataclasses.fields(cls) if f.name not in meta]
    return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=meta)


def regroup(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pairs the dimensions of a reshape: the smallest runs of old and new dimensions with equal sizes.

    Dimensions of size one stand alone, paired with nothing.

    Returns:
      A list of (old axes, new axes).
    """
    olds = [i for i, n in enumerate(old) if n != 1]
    news = [i for i, n in enumerate(new) if n != 1]
    groups: list[tuple[list[int], list[int]]] = [([i], []) for i, n in enumerate(old) if n == 1]
    groups += [([], [i]) for i, n in enumerate(new) if n == 1]
    while olds or news:
        left, right = [olds.pop(0)], [news.pop(0)]
        while (a := math.prod(old[i] for i in left)) != (b := math.prod(new[i] for i in right)):
            if a < b:
                left.append(olds.pop(0))
            else:
                right.append(news.pop(0))
        groups.append((left, right))
    return groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptedWeight:
    """Base class of adapted weights. Subclasses are frozen dataclasses passed through `register`.

    Attributes:
      base: the frozen weight, an array or another adapted weight.
      axes: what the axes of the weight mean, as it stands now (structural operations change it).
      path: of the site, for messages.
      idle: how many leading slices of a stack are nothing but the base (no layer below the first adapted one).
      layout: field name -> the roles its leading dimensions run along; any other word is a private dimension.
      sliceable: roles along which a slice of the weight is the weight of the slice.
      frozen: True for a number format: nothing about it trains, so no backward pass is owed to it.
      free: it may become dense anywhere without the caller's leave (`lift.free`).
    """

    base: Any
    axes: Axes
    path: str
    idle: int = 0

    layout: ClassVar[dict[str, tuple[str, ...]]] = {}
    sliceable: ClassVar[tuple[str, ...]] = ROLES
    frozen: ClassVar[bool] = False
    free: ClassVar[bool] = False

    # What a method implements.

    def dense(self) -> jax.Array:
        """The weight as one array, in `dtype`."""
        raise NotImplementedError

    def dot_general(self, x: jax.Array, use: Any) -> jax.Array:
        """The product with an activation; `use` is a `lift.products.Dot`."""
        return use.apply(x, self.dense())

    def take(self, indices: jax.Array, use: Any) -> jax.Array:
        """The lookup of rows; `use` is a `lift.products.Take`."""
        return use.apply(indices, self.dense())

    def conv(self, x: jax.Array, use: Any) -> jax.Array:
        """The convolution with an activation; `use` is a `lift.products.Conv`."""
        return use.apply(x, self.dense())

    def unused_hint(self) -> str:
        """What to do where the function never uses the weight: the end of the error message."""
        return "Leave them out of the targets, or pass unused='allow' to lift if that is meant."

    # What follows from the base and the layout.

    @property
    def shape(self) -> tuple[int, ...]:
        """Dense shape: that of the base, so it follows slicing and vmap."""
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        """Dense dtype."""
        return self.base.dtype

    def astype(self, dtype: Any) -> Self:
        """Casts the base; the method's own arrays stay float32 masters."""
        return dataclasses.replace(self, base=self.base.astype(dtype))

    def transpose(self, permutation: Sequence[int]) -> Self:
        """Moves the axes of the weight; the method's arrays do not move, their meaning does."""
        new = [[list(permutation).index(a)] for a in range(len(self.shape))]
        return dataclasses.replace(self, base=transpose(self.base, permutation), axes=self.axes.relabel(new), idle=0)

    def reshape(self, shape: Sequence[int]) -> Self:
        """Splits axes, merges neighbouring axes of one role, adds or drops axes of size one."""
        if (ordered := self._ordered()) is not self:
            return ordered.reshape(shape)
        new: list[list[int]] = [[] for _ in self.shape]
        fresh: list[int] = []
        for left, right in regroup(self.shape, shape):
            if not left:
                fresh += right
            elif len(left) == 1:
                new[left[0]] = list(right)
            else:
                self._check_mergeable(left, right)
                new[left[0]] = list(right)
        axes = self.axes.relabel(new)
        axes = dataclasses.replace(axes, fan_out=(*axes.fan_out, *fresh))
        fields = {name: self._reshape_field(name, axes, shape) for name in self.layout}
        return dataclasses.replace(self, base=reshape(self.base, shape), axes=axes, idle=0, **fields)

    def slice(self, axis: int, start: Any, size: int, stride: int = 1) -> Self:
        """A slice along one axis; `start` may be traced when `stride` is one."""
        role = self.axes.role(axis)
        if role not in self.sliceable:
            raise NotStructural
        offset = getattr(self.axes, role).index(axis)
        fields = {}
        for name, roles in self.layout.items():
            value = getattr(self, name)
            if value is not None and role in roles:
                fields[name] = slice_along(value, self._position(name, role) + offset, start, size, stride)
        return dataclasses.replace(self, base=slice_along(self.base, axis, start, size, stride), idle=0, **fields)

    def constrain(self, place: Any) -> Self:
        """Applies a placement (a sharding constraint) to the base."""
        base = self.base.constrain(place) if isinstance(self.base, AdaptedWeight) else place(self.base)
        return dataclasses.replace(self, base=base)

    def stacked(self) -> tuple[dict[str, Any], "AdaptedWeight"]:
        """Splits off what a scan over the leading axis slices.

        Returns:
          The arrays to scan over by field name, each with the scanned axis leading, and the weight they are put
          back into by `unstacked`.
        """
        if 0 not in self.axes.batch:
            raise NotStructural
        position = self.axes.batch.index(0)
        base, rest = self.base.stacked() if isinstance(self.base, AdaptedWeight) else (self.base, None)
        scanned: dict[str, Any] = {"base": base}
        for name, roles in self.layout.items():
            value = getattr(self, name)
            if value is not None and "batch" in roles:
                scanned[name] = jnp.moveaxis(value, self._position(name, "batch") + position, 0)
        return scanned, dataclasses.replace(self, base=rest)

    def unstacked(self, scanned: dict[str, Any]) -> Self:
        """The weight of one step of the scan."""
        axes = self.axes.relabel([[] if a == 0 else [a - 1] for a in range(sum(map(len, self._roles())))])
        fields = dict(scanned)
        if isinstance(self.base, AdaptedWeight):
            fields["base"] = self.base.unstacked(scanned["base"])
        return dataclasses.replace(self, axes=axes, idle=0, **fields)

    def specs(self, spec: Any) -> Self:
        """A node of the same structure with a spec at every array; see the function `specs`."""
        fields = {"base": specs(self.base, spec)}
        for name in self.layout:
            if getattr(self, name) is not None:
                fields[name] = field_spec(self.layout[name], self.axes, spec)
        return dataclasses.replace(self, **fields)

    def _roles(self) -> tuple[tuple[int, ...], ...]:
        return (self.axes.batch, self.axes.fan_in, self.axes.fan_out)

    def _position(self, name: str, role: str) -> int:
        """Where a role's dimensions begin in a field."""
        before = self.layout[name][: self.layout[name].index(role)]
        return sum(len(getattr(self.axes, r)) if r in ROLES else 1 for r in before)

    def _ordered(self) -> Self:
        """Every role's axes ascending, so that neighbours in the weight are neighbours in the fields."""
        axes = Axes(*(tuple(sorted(axes)) for axes in self._roles()))
        if axes == self.axes:
            return self
        fields = {}
        for name in self.layout:
            order: list[int] = []
            for role in self.layout[name]:
                old = getattr(self.axes, role) if role in ROLES else (0,)
                order += [len(order) + i for i in sorted(range(len(old)), key=old.__getitem__)]
            if (value := getattr(self, name)) is not None:
                fields[name] = value.transpose(*order, *range(len(order), value.ndim))
        return dataclasses.replace(self, axes=axes, **fields)

    def _check_mergeable(self, left: list[int], right: list[int]) -> None:
        order = getattr(self.axes, self.axes.role(left[0]))
        start = order.index(left[0])
        if len(right) != 1 or list(order[start : start + len(left)]) != left:
            raise NotStructural

    def _reshape_field(self, name: str, axes: Axes, shape: Sequence[int]) -> Any:
        value = getattr(self, name)
        if value is None:
            return None
        sizes: list[int] = []
        position = 0
        for role in self.layout[name]:
            old = getattr(self.axes, role) if role in ROLES else (None,)
            if role in ROLES:
                sizes += [shape[a] for a in getattr(axes, role)]
            else:
                sizes.append(value.shape[position])
            position += len(old)
        return value.reshape(*sizes, *value.shape[position:])


def transpose(value: Any, permutation: Sequence[int]) -> Any:
    """Transposes an array or an adapted weight."""
    if isinstance(value, AdaptedWeight):
        return value.transpose(permutation)
    return lax.transpose(value, tuple(permutation))


def reshape(value: Any, shape: Sequence[int]) -> Any:
    """Reshapes an array or an adapted weight."""
    if isinstance(value, AdaptedWeight):
        return value.reshape(shape)
    return lax.reshape(value, tuple(shape))


def slice_along(value: Any, axis: int, start: Any, size: int, stride: int = 1) -> Any:
    """Slices an array or an adapted weight along one axis; `start` may be traced when `stride` is one."""
    if isinstance(value, AdaptedWeight):
        return value.slice(axis, start, size, stride)
    if isinstance(start, int):
        limit = start + (size - 1) * stride + 1
        return lax.slice_in_dim(value, start, limit, stride, axis)
    return lax.dynamic_slice_in_dim(value, start, size, axis)


def is_adapted(value: Any) -> bool:
    """True for an adapted weight; the `is_leaf` of every tree operation that must not look inside one."""
    return isinstance(value, AdaptedWeight)


def specs(value: Any, spec: Any) -> Any:
    """The partition specs of a value's arrays, given that of the dense weight.

    Args:
      value: an array or an adapted weight.
      spec: PartitionSpec of the dense weight.

    Returns:
      `spec` for an array; for an adapted weight a node of the same structure with a spec at every array: each field
      inherits the entries of the axes it runs along, private dimensions are replicated.
    """
    return value.specs(spec) if isinstance(value, AdaptedWeight) else spec


def field_spec(layout: Sequence[str], axes: Axes, spec: Any) -> Any:
    """The PartitionSpec of one field from that of the weight it belongs to."""
    entries = tuple(spec) + (None,) * sum(len(getattr(axes, r)) for r in ROLES)
    return jax.sharding.PartitionSpec(
        *(entries[a] if a is not None else None for r in layout for a in (getattr(axes, r) if r in ROLES else (None,)))
    )
