"""What a function says itself about its backward pass: what it computes again, read from its trace; what it keeps."""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jex

from lora_jax.lift.program import PRODUCTS, bodies

REMAT = ("remat2", "remat", "checkpoint")
KEPT = "kept"  # the name of what `keep` was given


def keep(x: jax.Array) -> jax.Array:
    """The array itself, which a step keeps for its backward pass: small, and long to compute again."""
    return checkpoint_name(x, KEPT)


def traced(function: Callable, *args: Any) -> tuple[Any, Callable]:
    """(closed jaxpr of a function at these arguments, the function of such arguments that evaluates it)."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    tree = jax.tree.structure(shapes)
    return closed, lambda *args: jax.tree.unflatten(tree, jex.jaxpr_as_fun(closed)(*jax.tree.leaves(args)))


def recomputes_products(closed: Any) -> bool:
    """Whether some `jax.checkpoint` in it holds a product with a weight, that is one without batch axes."""
    return any(_recomputes(eqn, inside=False) for eqn in closed.jaxpr.eqns)


def _recomputes(eqn: Any, inside: bool) -> bool:
    name = eqn.primitive.name
    if inside and name in PRODUCTS:
        return name != "dot_general" or not eqn.params["dimension_numbers"][1][0]
    inside = inside or name in REMAT
    return any(_recomputes(e, inside) for jaxpr in bodies(eqn) for e in jaxpr.eqns)
