"""How an equation uses a weight: `Dot`, `Take`, `Conv`; and the low-rank product with its own derivative rule.

A `Dot` knows which axes of the weight are contracted, kept and shared, so a method can ask for "the same equation with
these factors in place of the weight" in any orientation: forward, transposed (tied embeddings), per head, per expert.
"""

import dataclasses
import functools
import math
import string
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.lift.weight import AdaptedWeight, Axes

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def low_rank(x: Array, a: Array, b: Array, precision: Any = None) -> Array:
    """Computes `(x a) b` without the transposed copies and the dense product that plain autodiff would make.

    Args:
      x: (*lead, *fan_in), the activation.
      a: (*fan_in, rank), float32; cast to x's dtype in the product.
      b: (rank, *fan_out), float32; likewise.
      precision: of the products, as in `jax.lax.dot_general`.

    Returns:
      (*lead, *fan_out) in x's dtype. The gradients of a and b come out in float32, contracted over all leading
      dimensions at once.
    """
    return _forward(x, a, b, precision)[0]


def _contract(
    x: Array, y: Array, x_axes: Sequence[int], y_axes: Sequence[int], precision: Any, dtype: Any = None
) -> Array:
    numbers = ((tuple(x_axes), tuple(y_axes)), ((), ()))
    return lax.dot_general(x, y, numbers, precision=precision, preferred_element_type=dtype)


def _forward(x, a, b, precision):
    n_in = a.ndim - 1
    z = _contract(x, a.astype(x.dtype), range(x.ndim - n_in, x.ndim), range(n_in), precision)
    return _contract(z, b.astype(x.dtype), (z.ndim - 1,), (0,), precision), (x, z, a, b)


def _backward(precision, residuals, dy):
    x, z, a, b = residuals
    lead, n_out = z.ndim - 1, b.ndim - 1
    dy = dy.astype(x.dtype)
    dz = _contract(dy, b.astype(x.dtype), range(dy.ndim - n_out, dy.ndim), range(1, b.ndim), precision)
    db = _contract(z, dy, range(lead), range(lead), precision, jnp.float32)
    da = _contract(x, dz, range(lead), range(lead), precision, jnp.float32)
    dx = _contract(dz, a.astype(x.dtype), (dz.ndim - 1,), (a.ndim - 1,), precision)
    return dx, da.astype(a.dtype), db.astype(b.dtype)


low_rank.defvjp(_forward, _backward)


def flat_low_rank(x: Array, a: Array, b: Array, precision: Any = None) -> Array:
    """`low_rank` on operands flattened to matrices, which is faster on one device.

    Under a mesh the operands keep their dimensions: merging a sharded with an unsharded one would cost all-gathers.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        return low_rank(*_varying_alike(x, a, b), precision)
    lead = x.shape[: x.ndim - (a.ndim - 1)]
    rank, out = b.shape[0], b.shape[1:]
    # No -1 in the shapes: it cannot be told for an empty batch.
    n_in, n_out = math.prod(a.shape[:-1]), math.prod(out)
    y = low_rank(x.reshape(math.prod(lead), n_in), a.reshape(n_in, rank), b.reshape(rank, n_out), precision)
    return y.reshape(*lead, *out)


def _varying_alike(*arrays: Array) -> list[Array]:
    """Marks all as varying over the manual axes that any of them varies over, which is nothing outside `shard_map`.

    A derivative rule of one's own must return what varies as its input does; the sum over the other axes is the
    transpose of the mark.
    """
    axes = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    whole = frozenset().union(*axes)
    return [x if own == whole else lax.pcast(x, tuple(whole - own), to="varying") for x, own in zip(arrays, axes)]


@dataclasses.dataclass(frozen=True)
class Dot:
    """One `dot_general` between an activation and a weight."""

    dimension_numbers: Any
    weight_is_lhs: bool
    precision: Any
    preferred: Any
    out_sharding: Any = None

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
        contracted, kept = set(self.contract[1]), None
        if not self.shared[1] and not axes.batch:
            if contracted == set(axes.fan_in):
                kept = axes.fan_out
                return self._matrix(x, a, b, axes.fan_in, kept)
            if contracted == set(axes.fan_out):
                a_out, b_out = jnp.moveaxis(a, -1, 0), jnp.moveaxis(b, 0, -1)
                return self._matrix(x, b_out, a_out, axes.fan_out, axes.fan_in)
        return self._einsum(x, a, b, axes)

    def _matrix(self, x: Array, a: Array, b: Array, into: Sequence[int], out: Sequence[int]) -> Array:
        pairs = dict(zip(self.contract[1], self.contract[0], strict=True))
        last = [pairs[w] for w in into]
        lead = [i for i in range(x.ndim) if i not in last]
        y = flat_low_rank(x.transpose(*lead, *last), a, b, self.precision)
        # y is (*lead, *out); the equation puts the weight's kept axes in ascending order, first if it is the left
        # operand.
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
        feature = dict(self.params)["dimension_numbers"].out_spec[1]
        return jnp.moveaxis(jnp.tensordot(z, b.astype(z.dtype), axes=((feature,), (0,))), -1, feature)
