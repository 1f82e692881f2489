"""`input_moments`: what linear layers are fed with, as second moments; for inits that start from data (EVA)."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import trees
from lora_jax.errors import UserError
from lora_jax.lift.interpret import Interpreter
from lora_jax.lift.products import Dot
from lora_jax.lift.trace import Call
from lora_jax.lift.weight import AdaptedWeight, Axes, is_adapted, register
from lora_jax.sites import Sites


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listener(AdaptedWeight):
    """A weight that notes what it is multiplied with.

    Attributes:
      heard: path -> sum of the outer products of its inputs, filled during the trace.
    """

    heard: dict[str, jax.Array] = dataclasses.field(hash=False, compare=False, default_factory=dict)

    def dense(self) -> jax.Array:
        return self.base.dense() if isinstance(self.base, AdaptedWeight) else self.base

    def dot_general(self, x: jax.Array, use: Dot) -> jax.Array:
        if use.contracts(self.axes.fan_in, self.axes):
            at = dict(zip(use.contract[1], use.contract[0], strict=True))
            last = [at[w] for w in self.axes.fan_in]
            lead = [i for i in range(x.ndim) if i not in last]
            rows = x.transpose(*lead, *last).astype(jnp.float32).reshape(math.prod(x.shape[i] for i in lead), -1)
            self.heard[self.path] = self.heard.get(self.path, 0.0) + rows.T @ rows
        return use.apply(x, self.base)


register(Listener, meta=("heard",))


def input_moments(
    function: Callable, variables: Any, sites: Sites, paths: Iterable[str], *args: Any, **kwargs: Any
) -> dict[str, jax.Array]:
    """Second moments of the inputs of linear layers.

    Args:
      function: called as `function(variables, *args, **kwargs)`.
      variables: its weights.
      sites: from `find_sites`.
      paths: of the linear sites to listen at.
      *args: example arguments, as in `find_sites`.
      **kwargs: likewise.

    Returns:
      `{path: (fan_in, fan_in) float32}`, the sum of x x^T over all rows, padding among them where there is some; add up
      the results of several batches.

    Raises:
      UserError: a site that no product with an activation uses, or one inside a scan or remat, where nothing can be
        taken out.
    """
    leaves = trees.flatten(variables, is_leaf=is_adapted)
    heard: dict[str, jax.Array] = {}
    paths = list(paths)
    listeners = {p: Listener(base=leaves[p], axes=Axes.of(sites[p]), path=p, heard=heard) for p in paths}
    call = Call((trees.replace(variables, listeners, is_leaf=is_adapted), *args), kwargs)
    closed, _ = call.trace(function)

    def evaluate(consts, traced):
        heard.clear()
        Interpreter("allow").run_dense(closed.jaxpr, consts, traced, "")
        return dict(heard)

    try:
        out = jax.jit(evaluate)(list(closed.consts), call.traced)
    except jax.errors.UnexpectedTracerError:
        raise UserError("input_moments cannot look inside a scan or a remat; unroll the layers") from None
    if missing := [p for p in paths if p not in out]:
        raise UserError(f"no product with an activation uses {missing[0]!r}, so it has no input to start from")
    return out
