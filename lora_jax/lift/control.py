"""Control flow is entered: jit, remat, scan, while, cond, shard_map. Functions with their own derivative are not, but
some say what is to be run in their place.

Each function rebuilds the construct with JAX's public API around an interpretation of its body, with adapted weights
passed through as the pytrees they are.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lora_jax.lift.interpret import ENTER, Interpreter, opened
from lora_jax.lift.weight import AdaptedWeight, NotStructural, is_adapted, slice_along, specs


def enter(*names: str):
    """Registers how to enter the body of a primitive."""

    def add(function):
        ENTER.update(dict.fromkeys(names, function))
        return function

    return add


@enter("jit", "pjit", "closed_call", "core_call")
def _jit(self: Interpreter, eqn: Any, operands: list, stack: str) -> list:
    """Evaluated in place: the whole lifted function is under one jit anyway."""
    jaxpr, consts = opened(eqn.params.get("jaxpr") or eqn.params["call_jaxpr"])
    # A weight that reaches only an output which the caller drops is not used.
    wanted = [v in self.needed for v in eqn.outvars]
    return self.run(jaxpr, consts, operands, stack, wanted)


_IN_PLACE_OF: dict[str, Callable] = {}


def opened_as(whole: Callable, name: str) -> Callable[[Callable], Callable]:
    """For a function that `jax.custom_vjp` is given a rule for: what `lift` runs where an adapted weight enters it.

    Args:
      whole: of the same arguments, equal in value and, by plain autodiff, in derivative.
      name: of the function in a program; its own.

    Returns:
      A decorator of the function.
    """
    _IN_PLACE_OF[name] = whole
    return lambda function: lambda *args: checkpoint_name(function(*args), name)


@enter("custom_vjp_call")
def _own_rule(self: Interpreter, eqn: Any, operands: list, stack: str) -> list:
    jaxpr, _ = opened(eqn.params["call_jaxpr"])
    names = [e.params["name"] for e in jaxpr.eqns if e.primitive.name == "name"]
    if len(names) != 1 or names[0] not in _IN_PLACE_OF:
        raise NotStructural
    whole = jax.make_jaxpr(_IN_PLACE_OF[names[0]])(*(v.aval for v in eqn.invars))
    return self.run(whole.jaxpr, whole.consts, operands, stack)


@enter("remat2", "remat", "checkpoint")
def _remat(self: Interpreter, eqn: Any, operands: list, stack: str) -> list:
    jaxpr, consts = opened(eqn.params["jaxpr"])

    def body(*args):
        outside, self.again = self.again, True
        try:
            return self.run_dense(jaxpr, consts, args, stack)
        finally:
            self.again = outside

    remat = jax.checkpoint(body, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
    return remat(*operands)


def _rank(v: Any) -> int:
    return len(v.aval.shape)


@enter("scan")
def _scan(self: Interpreter, eqn: Any, operands: list, stack: str) -> list:
    """Operands are split by comparing shapes outside and inside: names of scan's parameters differ between versions."""
    jaxpr, consts = opened(eqn.params["jaxpr"])
    n_carry = sum(_rank(o) == _rank(i) for o, i in zip(eqn.outvars, jaxpr.outvars, strict=True))
    n_xs = sum(_rank(o) != _rank(i) for o, i in zip(eqn.invars, jaxpr.invars, strict=True))
    n_consts = len(operands) - n_carry - n_xs
    shared = operands[:n_consts]
    carry = [self.dense(v, "scan (carried)", stack) for v in operands[n_consts : n_consts + n_carry]]
    xs = operands[n_consts + n_carry :]
    params = eqn.params

    def run(carry, xs, length):
        arrays, restore = _stack(self, xs, stack)

        def body(carry, xs):
            outs = self.run_dense(jaxpr, consts, [*shared, *carry, *restore(xs)], stack)
            return outs[:n_carry], outs[n_carry:]

        return lax.scan(body, carry, arrays, length, params["reverse"], params["unroll"])

    frontier = _frontier(shared, xs, params)
    if not frontier:
        final, ys = run(carry, xs, params["length"])
        return [*final, *ys]
    below, above = _split(xs, frontier, params["length"])
    carry, ys_below = run(carry, below, frontier)
    final, ys_above = run(carry, above, params["length"] - frontier)
    return [*final, *(jnp.concatenate(pair) for pair in zip(ys_below, ys_above, strict=True))]


def _frontier(shared: list, xs: list, params: Any) -> int:
    """How many first steps of a scan meet no adapted layer; the backward pass need not enter those."""
    adapted = [v for v in xs if _trains(v)]
    if params["reverse"] or any(map(_trains, shared)) or not adapted:
        return 0
    frontier = min(v.idle for v in adapted)
    return frontier if frontier < params["length"] else 0


def _trains(value: Any) -> bool:
    return is_adapted(value) and not value.frozen


def _split(xs: list, frontier: int, length: int) -> tuple[list, list]:
    """The operands of the steps below the frontier, plain weights there, and of those above."""

    def plain(v):
        while _trains(v) and v.idle >= frontier:
            v = v.base
        return v

    below = [slice_along(plain(v), 0, 0, frontier) for v in xs]
    return below, [slice_along(v, 0, frontier, length - frontier) for v in xs]


def _stack(self: Interpreter, values: list, stack: str):
    """The arrays that a scan slices, and the function that makes one step's operands of them again."""
    arrays: list[Any] = []
    rests: list[AdaptedWeight | None] = []
    for value in values:
        rest = None
        if is_adapted(value):
            try:
                value, rest = value.stacked()
            except NotStructural:
                value = self.dense(value, "scan over an axis that is not a batch axis", stack)
        arrays.append(value)
        rests.append(rest)

    def restore(xs):
        return [x if rest is None else rest.unstacked(x) for x, rest in zip(xs, rests, strict=True)]

    return arrays, restore


@enter("while")
def _while(self: Interpreter, eqn: Any, operands: list, stack: str) -> list:
    test, test_consts = opened(eqn.params["cond_jaxpr"])
    step, step_consts = opened(eqn.params["body_jaxpr"])
    n_carry = len(eqn.outvars)
    n_test = len(test.invars) - n_carry
    for_test, for_step = operands[:n_test], operands[n_test : len(operands) - n_carry]
    carry = [self.dense(v, "while (carried)", stack) for v in operands[len(operands) - n_carry :]]
    return lax.while_loop(
        lambda c: self.run_dense(test, test_consts, [*for_test, *c], stack)[0],
        lambda c: self.run_dense(step, step_consts, [*for_step, *c], stack),
        carry,
    )


@enter("cond")
def _cond(self: Interpreter, eqn: Any, operands: list, stack: str) -> list:
    def branch(closed):
        jaxpr, consts = opened(closed)
        return lambda *args: self.run_dense(jaxpr, consts, args, stack)

    index = self.dense(operands[0], "cond (the predicate)", stack)
    return lax.switch(index, [branch(b) for b in eqn.params["branches"]], *operands[1:])


@enter("shard_map")
def _shard_map(self: Interpreter, eqn: Any, operands: list, stack: str) -> list:
    params = eqn.params
    jaxpr, consts = opened(params["jaxpr"])
    in_specs = tuple(specs(v, spec) for v, spec in zip(operands, params["in_specs"], strict=True))

    def body(*args):
        return tuple(self.run_dense(jaxpr, consts, args, stack))

    mapped = jax.shard_map(
        body, mesh=params["mesh"], in_specs=in_specs, out_specs=tuple(params["out_specs"]),
        check_vma=params["check_vma"], axis_names=set(params.get("newly_manual_axes") or params["manual_axes"]),
    )  # fmt: skip
    return list(mapped(*operands))
