"""`find_sites`: what the axes of every weight mean, read from how the function uses it.

The function is traced abstractly (nothing is computed) with a probe in place of each weight. A probe remembers which
axes of the original weight its present axes came from, through transposes, reshapes, slices and scans; when a product
consumes it, the contracted axes are fan_in, shared and scanned ones batch, the others fan_out. Nothing is guessed from
shapes: a square matrix is as clear as any other.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import trees
from lora_jax.errors import UserError
from lora_jax.lift.interpret import Interpreter
from lora_jax.lift.trace import Call
from lora_jax.lift.weight import AdaptedWeight, Axes, NotStructural, is_adapted, register, regroup
from lora_jax.sites import Site, layer_index


@dataclasses.dataclass
class Record:
    """What the trace has shown of one weight."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    uses: list[str] = dataclasses.field(default_factory=list)
    seen: set[Any] = dataclasses.field(default_factory=set)
    axes: Axes | None = None
    layer_axis: int | None = None
    biases: list[str] = dataclasses.field(default_factory=list)
    bias_of: list[str] = dataclasses.field(default_factory=list)

    def use(self, name: str) -> bool:
        """Counts one use once, however often its equation is traced; True if it is new.

        The equations around it belong to its identity: JAX hands out one jaxpr for two calls of a jitted function.
        """
        where = tuple(map(id, _current)) or name
        new = where not in self.seen
        self.seen.add(where)
        if new:
            self.uses.append(name)
        return new

    def stack(self, gone: Sequence[tuple[int, bool]]) -> int | None:
        """The axis that counts layers: one that a scan walks; one that is indexed, unless the path names the layer."""
        scanned = [axis for axis, by_scan in gone if by_scan]
        if scanned or layer_index(self.path) is not None:
            return scanned[0] if scanned else None
        return gone[0][0] if gone else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe(AdaptedWeight):
    """A weight whose present axes are traced back to the original ones.

    Attributes:
      record: where the findings go.
      origin: for each present axis the original axes it is made of (none for an axis of size one or a broadcast).
      gone: original axes that the weight was taken apart along (layers of a stack), with True if a scan did it.
    """

    record: Record
    origin: tuple[tuple[int, ...], ...]
    gone: tuple[tuple[int, bool], ...] = ()

    def dense(self) -> jax.Array:
        return self.base

    def _moved(self, base: Any, origin: Sequence[Sequence[int]], gone: Sequence = ()) -> "Probe":
        return dataclasses.replace(self, base=base, origin=tuple(map(tuple, origin)), gone=(*self.gone, *gone))

    def transpose(self, permutation):
        return self._moved(self.base.transpose(permutation), [self.origin[p] for p in permutation])

    def reshape(self, shape):
        origin: list[tuple[int, ...]] = [()] * len(shape)
        gone: list[tuple[int, bool]] = []
        for left, right in regroup(self.shape, shape):
            if len(left) > 1 and len(right) > 1:
                raise NotStructural
            for r in right:
                origin[r] = tuple(a for i in left for a in self.origin[i])
            if not right:  # an axis of size one goes: `w[i]` is a slice and this
                gone += [(a, False) for a in self.origin[left[0]] if self.record.shape[a] > 1]
        return self._moved(self.base.reshape(shape), origin, gone)

    def broadcast(self, shape, into):
        origin: list[tuple[int, ...]] = [()] * len(shape)
        for i, d in enumerate(into):
            origin[d] = self.origin[i] if shape[d] == self.shape[i] else ()
        return self._moved(jax.lax.broadcast_in_dim(self.base, shape, into), origin)

    def slice(self, axis, start, size, stride=1):
        return self._moved(self.base[(slice(None),) * axis + (slice(0, size),)], self.origin)

    def stacked(self):
        rest = self._moved(None, self.origin[1:], [(a, True) for a in self.origin[0]])
        return {"base": self.base}, rest

    def unstacked(self, scanned):
        return dataclasses.replace(self, base=scanned["base"])

    def constrain(self, place):
        return self

    def dot_general(self, x, use):
        self.product("linear", use.contract[1], use.shared[1])
        return Product(base=use.apply(x, self.base), axes=Axes(), path=self.path, record=self.record)

    def take(self, indices, use):
        self.product("embedding", (use.axis,), ())
        return use.apply(indices, self.base)

    def conv(self, x, use):
        kept = use.out_axis
        self.product("conv", [i for i in range(len(self.shape)) if i != kept], ())
        return Product(base=use.apply(x, self.base), axes=Axes(), path=self.path, record=self.record)

    def product(self, name: str, contracted: Sequence[int], shared: Sequence[int]) -> None:
        """Notes a product; the first one sets the axes."""
        if not self.record.use(name) or self.record.axes is not None:
            return
        fan_in = {a for i in contracted for a in self.origin[i]}
        batch = {a for i in shared for a in self.origin[i]} | {a for a, _ in self.gone}
        fan_out = {a for i, o in enumerate(self.origin) if i not in (*contracted, *shared) for a in o}
        lost = set(range(len(self.record.shape))) - fan_in - batch - fan_out
        fan_out |= lost  # axes of size one that a reshape dropped
        if fan_in & batch or fan_in & fan_out or batch & fan_out:
            return  # one original axis plays two parts: no method can act on it, so it is no matrix
        self.record.axes = Axes(tuple(sorted(batch)), tuple(sorted(fan_in)), tuple(sorted(fan_out)))
        self.record.layer_axis = self.record.stack(self.gone)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product(AdaptedWeight):
    """The output of a product, followed only as far as the addition of its bias."""

    record: Record

    def dense(self) -> jax.Array:
        return self.base

    def _same(self, base):
        return dataclasses.replace(self, base=base)

    def astype(self, dtype):
        return self._same(self.base.astype(dtype))

    def transpose(self, permutation):
        return self._same(self.base.transpose(permutation))

    def reshape(self, shape):
        return self._same(self.base.reshape(shape))


for _cls, _meta in ((Probe, ("record", "origin", "gone")), (Product, ("record",))):
    register(_cls, _meta)

_current: list[Any] = []  # the equations being evaluated, innermost last: what identifies a use


class Finder(Interpreter):
    """The interpreter that records instead of refusing."""

    def equation(self, eqn, operands, debug_info, stack):
        _current.append(eqn)
        try:
            if eqn.primitive.name in ("add", "add_any") and self.is_bias(operands):
                operands = [v.base if isinstance(v, AdaptedWeight) else v for v in operands]
            # Only structural operations keep a product a product.
            if eqn.primitive.name not in ("convert_element_type", "transpose", "reshape"):
                operands = [v.base if isinstance(v, Product) else v for v in operands]
            if eqn.primitive.name == "dot_general" and all(isinstance(v, Probe) for v in operands):
                # Learned queries times a weight: as in `x @ w`, the right operand is the weight.
                operands = [self.dense(operands[0], eqn.primitive.name, stack), operands[1]]
            return super().equation(eqn, operands, debug_info, stack)
        finally:
            _current.pop()

    def is_bias(self, operands: list[Any]) -> bool:
        """Notes `product + vector`, where the vector is a whole weight."""
        product = next((v for v in operands if isinstance(v, Product)), None)
        vector = next((v for v in operands if isinstance(v, Probe)), None)
        if product is None or vector is None:
            return False
        if vector.record.use("bias"):
            product.record.biases.append(vector.path)
            vector.record.bias_of.append(product.path)
            if vector.record.layer_axis is None:
                vector.record.layer_axis = vector.record.stack(vector.gone)
        return True

    def dense(self, value, primitive, stack):
        if isinstance(value, Probe):
            value.record.use("elementwise")
            if value.record.layer_axis is None and value.record.axes is None:
                value.record.layer_axis = value.record.stack(value.gone)
        return value.base if isinstance(value, AdaptedWeight) else value


def find_sites(function: Callable, variables: Any, *args: Any, **kwargs: Any) -> dict[str, Site]:
    """Finds every weight of a function and what its axes mean. Traces abstractly; computes nothing.

    Args:
      function: called as `function(variables, *args, **kwargs)`; any traceable function.
      variables: `{'params': ...}`, a plain tree of weights, or an NNX state; arrays, quantized weights or
        `jax.ShapeDtypeStruct`s.
      *args: example arguments; arrays (or `jax.ShapeDtypeStruct`s) are traced, everything else is static.
      **kwargs: likewise.

    Returns:
      `{path: Site}` for every floating-point weight, in the order of the tree. A weight that no product uses
      (a bias, a norm's scale, or one the function does not touch) has empty `fan_in`.

    Raises:
      UserError: the variables hold no floating-point weights.
    """
    records = {
        path: Record(path, tuple(leaf.shape), leaf.dtype)
        for path, leaf in trees.flatten(variables, is_leaf=is_adapted).items()
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    if not records:
        raise UserError(
            "find_sites: the variables (the argument after the function) hold no floating-point weights; "
            f"expected {{'params': ...}}, a tree of weights or an NNX state, got {type(variables).__name__}"
        )
    probes = {p: _probe(r) for p, r in records.items()}
    call = Call((trees.replace(variables, probes, is_leaf=is_adapted), *args), kwargs)
    closed, _ = call.trace(function)

    def evaluate(consts, traced):
        return Finder("allow").run_dense(closed.jaxpr, consts, traced, "")

    jax.eval_shape(evaluate, list(closed.consts), call.traced)
    return {path: _site(record, records) for path, record in records.items()}


def _probe(record: Record) -> Probe:
    base = jax.ShapeDtypeStruct(record.shape, record.dtype)
    origin = tuple((a,) for a in range(len(record.shape)))
    return Probe(base=base, axes=Axes(), path=record.path, record=record, origin=origin)


def _site(record: Record, records: dict[str, Record]) -> Site:
    axes = record.axes or Axes()
    batch = axes.batch or (() if record.layer_axis is None else (record.layer_axis,))
    out = math.prod(record.shape[a] for a in (*axes.batch, *axes.fan_out))
    # A bias runs along the outputs alone: a table of positions added to a product is none.
    own = [
        b for b in dict.fromkeys(record.biases)
        if records[b].uses == ["bias"] and records[b].bias_of == [record.path] and math.prod(records[b].shape) == out
    ]  # fmt: skip
    return Site(
        path=record.path, shape=record.shape, dtype=record.dtype,
        batch=batch, fan_in=axes.fan_in, fan_out=axes.fan_out,
        uses=tuple(record.uses), bias=own[0] if len(own) == 1 and len(record.uses) == 1 else None,
        layer=None if record.layer_axis is not None else layer_index(record.path), layer_axis=record.layer_axis,
    )  # fmt: skip
