"""`TiledWeight`: a frozen matrix laid out for products with few rows, such as one token of each text.

With a handful of rows a product costs what reading the matrix costs. Row by row, XLA on a CPU reads (n_in, n_out) in
pieces that lie far apart, at a third to two thirds of the memory's speed; in tiles of 64 columns, each of them one
piece of memory, at nearly all of it (512 x 512 times 8 rows: 96 us in rows, 44 us in tiles; two cores of Zen 4, jax
0.10.2). Not every CPU gains by it: `tiling.in_tiles`.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.lift.products import Dot
from lora_jax.lift.weight import AdaptedWeight, Axes, NotStructural, register

TILE = 64  # columns
MOST_ROWS = 32  # of an activation; beyond, the product costs its multiplications and the layout no longer matters


@dataclasses.dataclass(frozen=True, kw_only=True)
class TiledWeight(AdaptedWeight):
    """`base` is (n_out / TILE, n_in, TILE) and stands for (n_in, n_out)."""

    frozen: ClassVar[bool] = True
    free: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, ...]:
        tiles, n_in, width = self.base.shape
        return n_in, tiles * width

    def dense(self) -> jax.Array:
        return self.base.swapaxes(0, 1).reshape(self.shape)

    def dot_general(self, x: jax.Array, use: Dot) -> jax.Array:
        tiles, n_in, _ = self.base.shape
        if use.weight_is_lhs or not use.contracts((0,), self.axes) or use.contract[0] != (x.ndim - 1,):
            return use.apply(x, self.dense())
        lead = x.shape[:-1]
        rows = x.reshape(-1, n_in)
        numbers = (((2,), (1,)), ((0,), (0,)))
        y = lax.dot_general(
            jnp.broadcast_to(rows, (tiles, *rows.shape)), self.base, numbers,
            precision=use.precision, preferred_element_type=use.preferred,
        )  # fmt: skip
        return y.swapaxes(0, 1).reshape(*lead, self.shape[1])

    def transpose(self, permutation: Any) -> Any:
        raise NotStructural

    def reshape(self, shape: Any) -> Any:
        raise NotStructural

    def slice(self, axis: int, start: Any, size: int, stride: int = 1) -> Any:
        raise NotStructural

    def constrain(self, place: Any) -> Any:
        raise NotStructural


register(TiledWeight)


def tiled(weight: jax.Array, path: str) -> Any:
    """A matrix (n_in, n_out), contracted along n_in, in tiles; itself where n_out is no multiple of a tile."""
    n_in, n_out = weight.shape
    if n_out % TILE:
        return weight
    base = weight.reshape(n_in, n_out // TILE, TILE).swapaxes(0, 1)
    return TiledWeight(base=base, axes=Axes((), (0,), (1,)), path=path)
