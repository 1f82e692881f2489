"""The forms that most methods take at a weight: a low-rank update, an action on flattened axes, one on the output.

A method's own node is one of these with the method's arrays and one function: `factors` says what the update is a
product of, `finish` what becomes of the output.
"""

import dataclasses
import math
import string
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from lora_jax.dropout import drop
from lora_jax.errors import UserError
from lora_jax.lift.products import Conv, Dot, Take
from lora_jax.lift.weight import AdaptedWeight, Axes, NotStructural


def dense(weight: Any) -> jax.Array:
    """The dense value of an array or an adapted weight."""
    return weight.dense() if isinstance(weight, AdaptedWeight) else weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankWeight(AdaptedWeight):
    """`base + a b`. A product takes it factored, or merged where that costs less; its dense gradient is never formed.

    Attributes:
      key: (*batch,) random keys; dropout is on while they are there.
      dropout: of the activation before the first factor.
    """

    key: Any = None
    dropout: float = 0.0
    layout: ClassVar = {"key": ("batch",)}

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """What the update is a product of, scale included.

        Returns:
          (*batch, *fan_in, rank) and (*batch, rank, *fan_out), float32.
        """
        raise NotImplementedError

    @property
    def drops(self) -> bool:
        """Whether dropout is on."""
        return self.key is not None and self.dropout > 0.0

    def dropped(self, x: jax.Array) -> jax.Array:
        """The activation as the first factor sees it: with dropout on while a key is bound (PEFT's `lora_dropout`)."""
        if not self.drops:
            return x
        return drop(self.key.reshape(-1)[0], self.dropout, x)

    def update(self) -> jax.Array:
        """The dense update, float32; for merging."""
        letters = string.ascii_letters
        batch, fan_in, fan_out = ("".join(letters[i] for i in axes) for axes in self._roles())
        a, b = self.factors()
        return jnp.einsum(f"{batch}{fan_in}Z,{batch}Z{fan_out}->{letters[: len(self.shape)]}", a, b)

    def dense(self) -> jax.Array:
        base = dense(self.base)
        return (base.astype(jnp.float32) + self.update()).astype(base.dtype)

    def dot_general(self, x: jax.Array, use: Dot) -> jax.Array:
        if not self.drops and use.merges(x, self.base, self.axes):
            return use.merged(x, self.base, *self.factors(), self.axes)
        y = use.apply(x, self.base)
        return y + use.factored(self.dropped(x), *self.factors(), self.axes).astype(y.dtype)

    def take(self, indices: jax.Array, use: Take) -> jax.Array:
        (a, b), axes = self.factors(), self.axes
        if (use.axis,) == axes.fan_out:  # the weight was first used the other way round
            a, b = jnp.moveaxis(b, 0, -1), jnp.moveaxis(a, -1, 0)
            axes = Axes(axes.batch, axes.fan_out, axes.fan_in)
        if axes.batch or (use.axis,) != axes.fan_in:
            raise NotStructural
        y = use.apply(indices, self.base)
        return y + use.factored(indices, a, b, axes, y.dtype)

    def conv(self, x: jax.Array, use: Conv) -> jax.Array:
        if use.groups > 1 or self.axes.batch or self.axes.fan_out != (use.out_axis,):
            # A grouped kernel is small, and its factors do not factor the convolution.
            return use.apply(x, LowRankWeight.dense(self))
        y = use.apply(x, self.base)
        return y + use.factored(self.dropped(x), *self.factors(), self.axes).astype(y.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlatWeight(AdaptedWeight):
    """Acts on fan_in (and fan_out) as one axis each, flattened in the order of `axes`: no part of one has a meaning."""

    sliceable: ClassVar[tuple[str, ...]] = ("batch",)

    def sizes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Sizes of the batch, the fan_in and the fan_out axes."""
        batch, fan_in, fan_out = (tuple(self.shape[i] for i in axes) for axes in self._roles())
        return batch, fan_in, fan_out

    def flat(self, weight: jax.Array) -> jax.Array:
        """A dense weight as (*batch, n_in, n_out)."""
        batch, fan_in, fan_out = self.sizes()
        ordered = weight.transpose([i for axes in self._roles() for i in axes])
        return ordered.reshape(*batch, math.prod(fan_in), math.prod(fan_out))

    def unflat(self, matrix: jax.Array) -> jax.Array:
        """The inverse of `flat`."""
        order = [i for axes in self._roles() for i in axes]
        whole = matrix.reshape([n for sizes in self.sizes() for n in sizes])
        return whole.transpose([order.index(i) for i in range(len(order))])

    def reshape(self, shape: Any) -> Self:
        """As long as the order of the axes is that of the weight: sorting them would shuffle what is flattened."""
        if any(list(axes) != sorted(axes) for axes in self._roles()):
            raise NotStructural
        return super().reshape(shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputWeight(AdaptedWeight):
    """Acts on what a layer puts out, `W x + b`: it stands at the bias where there is one, else at the weight itself.

    Attributes:
      spread: (shape, axes) once the bias has been broadcast to the output's shape: where its axes went.
    """

    spread: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def finish(self, y: jax.Array, axes: Axes) -> jax.Array:
        """What becomes of the output.

        Args:
          y: `W x + b`.
          axes: where the weight's batch and fan_out axes are in `y`, in the order of the node's arrays.
        """
        raise NotImplementedError

    def dense(self) -> jax.Array:
        raise UserError(
            f"what stands at {self.path!r} acts on the layer's output and has no dense value: leave this layer out of "
            "the targets, or use a method that changes weights"
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spread[0] if self.spread else tuple(self.base.shape)

    def dot_general(self, x: jax.Array, use: Dot) -> jax.Array:
        return self._finished(use.apply(x, self.base), use.in_output(x.ndim, len(self.shape)))

    def conv(self, x: jax.Array, use: Conv) -> jax.Array:
        return self._finished(use.apply(x, self.base), {use.out_axis: use.feature()})

    def broadcast(self, shape: Any, into: Any) -> Self:
        """Follows the bias as far as the output's shape; nothing is broadcast."""
        self._check_unspread()
        own = [i for i, d in enumerate(into) if shape[d] == self.shape[i]]
        if any(n != 1 for i, n in enumerate(self.shape) if i not in own):
            raise NotStructural
        slim = super().reshape([self.shape[i] for i in own])
        return dataclasses.replace(slim, spread=(tuple(shape), tuple(into[i] for i in own)))

    def add(self, y: jax.Array) -> jax.Array:
        """`y` plus the bias, finished."""
        if self.spread is None:  # an addition may broadcast axes of size one by itself
            return self.broadcast(y.shape, range(y.ndim)).add(y)
        shape, into = self.spread
        y = y + jax.lax.broadcast_in_dim(dense(self.base), shape, into)
        return self._finished(y, dict(enumerate(into)))

    def _finished(self, y: jax.Array, at: dict[int, int]) -> jax.Array:
        kept = (*self.axes.batch, *self.axes.fan_out)
        if not all(a in at for a in kept):
            raise NotStructural
        place = lambda axes: tuple(at[a] for a in axes)  # noqa: E731
        return self.finish(y, Axes(place(self.axes.batch), (), place(self.axes.fan_out)))

    def transpose(self, permutation: Any) -> Self:
        self._check_unspread()
        return super().transpose(permutation)

    def reshape(self, shape: Any) -> Self:
        self._check_unspread()
        return super().reshape(shape)

    def slice(self, axis: int, start: Any, size: int, stride: int = 1) -> Self:
        self._check_unspread()
        return super().slice(axis, start, size, stride)

    def _check_unspread(self) -> None:
        if self.spread:
            raise NotStructural
