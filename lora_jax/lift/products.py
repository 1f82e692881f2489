"""How an equation uses a weight: `Dot`, `Take`, `Conv`.

A `Dot` knows which axes of the weight are contracted, kept and shared, so a method can ask for "the same equation with
these factors in place of the weight" in any orientation: forward, transposed (tied embeddings), per head, per expert.
"""

import dataclasses
import math
import string
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.lift import merged as merging
from lora_jax.lift.low_rank import flat_low_rank
from lora_jax.lift.weight import AdaptedWeight, Axes, NotStructural

Array = jax.Array


def along(v: Array, positions: Sequence[int], ndim: int) -> Array:
    """Lays an array along some axes of another one: dimension i of `v` at `positions[i]`, size one elsewhere."""
    order = sorted(range(v.ndim), key=positions.__getitem__)
    shape = [1] * ndim
    for i in order:
        shape[positions[i]] = v.shape[i]
    return v.transpose(order).reshape(shape)


def on_axes(x: Array, axes: Sequence[int], function: Callable[[Array], Array]) -> Array:
    """Applies a function of the last axes to other ones, which stay where they are."""
    last = list(range(x.ndim - len(axes), x.ndim))
    return jnp.moveaxis(function(jnp.moveaxis(x, axes, last)), last, axes)


@dataclasses.dataclass(frozen=True)
class Dot:
    """One `dot_general` between an activation and a weight.

    Attributes:
      dimension_numbers, precision, preferred, out_sharding: of the equation.
      weight_is_lhs: which operand the weight is.
      form: what the caller of `lift` asked for.
      again: whether the backward pass computes it again (remat).
    """

    dimension_numbers: Any
    weight_is_lhs: bool
    precision: Any
    preferred: Any
    out_sharding: Any = None
    form: str = "auto"
    again: bool = False

    @property
    def contract(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Contracted axes of (activation, weight), pairwise."""
        pair = self.dimension_numbers[0]
        return tuple(pair[::-1]) if self.weight_is_lhs else tuple(pair)

    @property
    def shared(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Batch axes of (activation, weight), pairwise."""
        pair = self.dimension_numbers[1]
        return tuple(pair[::-1]) if self.weight_is_lhs else tuple(pair)

    def apply(self, x: Array, weight: Any) -> Array:
        """The equation itself with another weight of the same shape: an array or an adapted weight."""
        if isinstance(weight, AdaptedWeight):
            return weight.dot_general(x, self)
        lhs, rhs = (weight, x) if self.weight_is_lhs else (x, weight)
        return lax.dot_general(
            lhs, rhs, self.dimension_numbers, precision=self.precision,
            preferred_element_type=self.preferred, out_sharding=self.out_sharding,
        )  # fmt: skip

    def letters(self, x_ndim: int, w_ndim: int) -> tuple[list[str], list[str], list[str]]:
        """Einsum letters of the activation, the weight and the output."""
        w = list(string.ascii_letters[:w_ndim])
        x = list(string.ascii_letters[w_ndim : w_ndim + x_ndim])
        for pair in (self.contract, self.shared):
            for i, j in zip(*pair, strict=True):
                x[i] = w[j]
        bound_x = {*self.contract[0], *self.shared[0]}
        bound_w = {*self.contract[1], *self.shared[1]}
        free_x = [x[i] for i in range(x_ndim) if i not in bound_x]
        free_w = [w[j] for j in range(w_ndim) if j not in bound_w]
        free = free_w + free_x if self.weight_is_lhs else free_x + free_w
        return x, w, [w[j] for j in self.shared[1]] + free

    def in_output(self, x_ndim: int, w_ndim: int) -> dict[int, int]:
        """`{axis of the weight: axis of the output}` of what is kept or shared."""
        _, w, out = self.letters(x_ndim, w_ndim)
        return {j: out.index(letter) for j, letter in enumerate(w) if letter in out}

    def scaled(self, x: Array, v: Array, axes: Sequence[int], product: Callable[[Array], Array], w_ndim: int) -> Array:
        """The equation with the weight times a vector that runs along some of its axes, without that weight.

        Args:
          x: the activation.
          v: float32, one dimension per entry of `axes`.
          axes: of the weight: all contracted (or shared), or none contracted.
          product: activation -> output, with the weight as it was.
          w_ndim: number of the weight's axes.
        """
        into_x = dict(zip((*self.contract[1], *self.shared[1]), (*self.contract[0], *self.shared[0]), strict=True))
        if all(a in into_x for a in axes):
            return product(x * along(v, [into_x[a] for a in axes], x.ndim).astype(x.dtype))
        out = self.in_output(x.ndim, w_ndim)
        if not all(a in out for a in axes):
            raise NotStructural
        y = product(x)
        return y * along(v, [out[a] for a in axes], y.ndim).astype(y.dtype)

    def mapped(self, x: Array, axes: Axes, function: Callable[[Array], Array], back: Callable[[Array], Array]) -> Array:
        """The equation with a linear map of the method's own in place of the weight.

        Args:
          x: the activation.
          axes: of the weight; without batch axes.
          function: (*lead, *fan_in) -> (*lead, *fan_out).
          back: its transpose, (*lead, *fan_out) -> (*lead, *fan_in), for a use that contracts fan_out.

        Raises:
          NotStructural: a weight with batch axes, or contracted along anything but its fan_in or its fan_out.
        """
        if self.contracts(axes.fan_in, axes):
            return self._last(x, axes.fan_in, axes.fan_out, function)
        if self.contracts(axes.fan_out, axes):
            return self._last(x, axes.fan_out, axes.fan_in, back)
        raise NotStructural

    def turned(
        self, x: Array, axes: Axes, product: Callable[[Array], Array],
        function: Callable[[Array], Array], back: Callable[[Array], Array],
    ) -> Array:  # fmt: skip
        """The equation with the weight turned along fan_in: `function` acts on the activation, or `back` on the output.

        Args:
          x: the activation.
          axes: of the weight; without batch axes.
          product: activation -> output, with the weight as it was.
          function: (*lead, *fan_in) -> the same shape.
          back: its transpose.

        Raises:
          NotStructural: as `mapped`.
        """
        if self.contracts(axes.fan_in, axes):
            at = dict(zip(self.contract[1], self.contract[0], strict=True))
            return product(on_axes(x, [at[w] for w in axes.fan_in], function))
        if self.contracts(axes.fan_out, axes):
            y = product(x)
            out = self.in_output(x.ndim, len(axes.fan_in + axes.fan_out))
            return on_axes(y, [out[w] for w in axes.fan_in], back)
        raise NotStructural

    def contracts(self, own: Sequence[int], axes: Axes) -> bool:
        """True if the equation contracts exactly these axes of a weight without batch axes."""
        return not self.shared[1] and not axes.batch and set(self.contract[1]) == set(own)

    def factored(self, x: Array, a: Array, b: Array, axes: Axes) -> Array:
        """The equation with the weight `a b` in place of the weight, never forming it.

        Args:
          x: the activation.
          a: (*batch, *fan_in, rank) float32, where the groups are the weight's axes in the order of `axes`.
          b: (*batch, rank, *fan_out) float32.
          axes: of the weight.

        Returns:
          An array of the equation's output shape, in x's dtype.
        """
        if self.contracts(axes.fan_in, axes):
            return self._last(x, axes.fan_in, axes.fan_out, lambda x: flat_low_rank(x, a, b, self.precision))
        if self.contracts(axes.fan_out, axes):
            a_out, b_out = jnp.moveaxis(a, -1, 0), jnp.moveaxis(b, 0, -1)
            return self._last(x, axes.fan_out, axes.fan_in, lambda x: flat_low_rank(x, b_out, a_out, self.precision))
        return self._einsum(x, a, b, axes)

    def merges(self, x: Array, weight: Array, axes: Axes) -> bool:
        """Whether `merged` stands for the equation, and is to be preferred to `factored`.

        Merging rounds the update to the weight's dtype, so below float32 it must be asked for. Under a mesh a merged
        weight would have to be divided as the weight is: not supported.
        """
        plain = isinstance(weight, jax.Array) and self.out_sharding is None
        natural = list(axes.fan_in + axes.fan_out) == list(range(weight.ndim if plain else 0))
        if not (plain and natural and self.contracts(axes.fan_in, axes) and jax.sharding.get_abstract_mesh().empty):
            return False
        if self.form != "auto":
            return self.form == "merged"
        n_in = math.prod(weight.shape[i] for i in axes.fan_in)
        full = x.dtype == weight.dtype == jnp.float32
        return full and merging.pays(x.size // max(n_in, 1), n_in, weight.size // max(n_in, 1))

    def merged(self, x: Array, weight: Array, a: Array, b: Array, axes: Axes) -> Array:
        """The equation with `weight + a b` in place of the weight, where `merges` says so; a and b as in `factored`."""
        options = merging.Options(self.precision, self.preferred, self.again)
        product = lambda x: merging.flat_merged(x, weight, a, b, options)  # noqa: E731
        return self._last(x, axes.fan_in, axes.fan_out, product)

    def _last(self, x: Array, into: Sequence[int], out: Sequence[int], function: Callable[[Array], Array]) -> Array:
        """Brings the contracted axes last, applies (*lead, *into) -> (*lead, *out), orders the axes as the equation."""
        pairs = dict(zip(self.contract[1], self.contract[0], strict=True))
        last = [pairs[w] for w in into]
        lead = [i for i in range(x.ndim) if i not in last]
        y = function(x.transpose(*lead, *last))
        # The equation puts the weight's kept axes in ascending order, first if it is the left operand.
        n = len(lead)
        kept = [n + list(out).index(w) for w in sorted(out)]
        return y.transpose(*(kept + list(range(n)) if self.weight_is_lhs else list(range(n)) + kept))

    def _einsum(self, x: Array, a: Array, b: Array, axes: Axes) -> Array:
        x_l, w_l, out_l = self.letters(x.ndim, len(axes.batch + axes.fan_in + axes.fan_out))
        rank = string.ascii_letters[-1]
        a_l = [w_l[i] for i in axes.batch + axes.fan_in] + [rank]
        b_l = [w_l[i] for i in axes.batch] + [rank] + [w_l[i] for i in axes.fan_out]
        spec = f"{''.join(x_l)},{''.join(a_l)},{''.join(b_l)}->{''.join(out_l)}"
        return jnp.einsum(spec, x, a.astype(x.dtype), b.astype(x.dtype), precision=self.precision)


@dataclasses.dataclass(frozen=True)
class Take:
    """One `gather` that looks up whole rows along one axis of the weight (an embedding)."""

    axis: int
    offset_dims: tuple[int, ...]
    mode: Any
    fill_value: Any
    flags: tuple[bool, bool]

    def apply(self, indices: Array, weight: Any) -> Array:
        """The lookup in another weight of the same shape; indices are (*lead, 1)."""
        if isinstance(weight, AdaptedWeight):
            return weight.take(indices, self)
        return self._gather(indices, weight, self.axis, self.offset_dims, self.fill_value)

    def in_output(self, w_ndim: int) -> dict[int, int]:
        """`{axis of the weight: axis of the output}` of what is kept."""
        return dict(zip([w for w in range(w_ndim) if w != self.axis], self.offset_dims, strict=True))

    def scaled(self, y: Array, indices: Array, v: Array, axes: Sequence[int], w_ndim: int) -> Array:
        """The looked-up rows `y` times a vector that runs along some of the weight's axes."""
        if tuple(axes) == (self.axis,):  # one number a row
            rows = self._gather(indices, v, 0, (), None if self.fill_value is None else 0)
            kept = set(self.offset_dims)
            return y * along(rows, [i for i in range(y.ndim) if i not in kept], y.ndim).astype(y.dtype)
        out = self.in_output(w_ndim)
        if not all(a in out for a in axes):
            raise NotStructural
        return y * along(v, [out[a] for a in axes], y.ndim).astype(y.dtype)

    def _gather(self, indices: Array, weight: Array, axis: int, offset_dims: tuple[int, ...], fill: Any) -> Array:
        sizes = tuple(1 if i == axis else n for i, n in enumerate(weight.shape))
        numbers = lax.GatherDimensionNumbers(offset_dims, collapsed_slice_dims=(axis,), start_index_map=(axis,))
        return lax.gather(
            weight, indices, numbers, sizes, indices_are_sorted=self.flags[0], unique_indices=self.flags[1],
            mode=self.mode, fill_value=fill,
        )  # fmt: skip

    def factored(self, indices: Array, a: Array, b: Array, axes: Axes, dtype: Any) -> Array:
        """The lookup in `a b`: rows of `a`, times `b`; the looked-up axis must be the only fan_in axis.

        Args:
          indices: (*lead, 1) integers.
          a: (fan_in, rank) float32.
          b: (rank, *fan_out) float32.
          axes: of the weight.
          dtype: of the result.
        """
        lead = indices.ndim - 1
        # Out of bounds the base gives the fill value; a zero row adds nothing to it (None fills with NaN, as the base).
        rows = self._gather(indices, a, 0, (lead,), None if self.fill_value is None else 0).astype(dtype)
        y = jnp.tensordot(rows, b.astype(dtype), axes=1)
        out = [lead + list(axes.fan_out).index(w) for w in sorted(axes.fan_out)]
        order = iter(range(lead))
        offsets = dict(zip(self.offset_dims, out, strict=True))
        return y.transpose(*(offsets[i] if i in offsets else next(order) for i in range(y.ndim)))


@dataclasses.dataclass(frozen=True)
class Conv:
    """One `conv_general_dilated` whose kernel is the weight."""

    params: tuple[tuple[str, Any], ...]

    @property
    def groups(self) -> int:
        """feature_group_count * batch_group_count."""
        params = dict(self.params)
        return params["feature_group_count"] * params["batch_group_count"]

    @property
    def out_axis(self) -> int:
        """The kernel's output-feature axis."""
        return dict(self.params)["dimension_numbers"].rhs_spec[0]

    def feature(self) -> int:
        """The output's feature axis."""
        return dict(self.params)["dimension_numbers"].out_spec[1]

    def scaled(self, y: Array, v: Array, axes: Sequence[int]) -> Array:
        """The output `y` times a vector along the kernel's output features."""
        if tuple(axes) != (self.out_axis,):
            raise NotStructural
        return y * along(v, [self.feature()], y.ndim).astype(y.dtype)

    def apply(self, x: Array, weight: Any) -> Array:
        """The convolution with another kernel of the same shape."""
        if isinstance(weight, AdaptedWeight):
            return weight.conv(x, self)
        return lax.conv_general_dilated(x, weight, **dict(self.params))

    def factored(self, x: Array, a: Array, b: Array, axes: Axes) -> Array:
        """The convolution with kernel `a b`: one with `rank` output features, then a product over features.

        Args:
          x: the activation.
          a: (*fan_in, rank) float32; fan_in are the kernel's spatial axes and its input features.
          b: (rank, fan_out) float32.
          axes: of the kernel.
        """
        order = [*axes.fan_in, *axes.fan_out]
        kernel = a.astype(x.dtype).transpose(*(order.index(i) for i in range(len(order))))
        z = lax.conv_general_dilated(x, kernel, **dict(self.params))
        feature = self.feature()
        return jnp.moveaxis(jnp.tensordot(z, b.astype(z.dtype), axes=((feature,), (0,))), -1, feature)
