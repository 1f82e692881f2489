"""The frontier of an adapter: a function is split where the first adapted weight enters.

Every step that depends on an adapted weight or draws random numbers is hot, all others are cold. What the cold steps
give to the hot ones is the same at every pass over the data, so it can be computed once and kept. Kept are the fewest
bytes that spare every matrix product and convolution of the cold part: a minimum cut, so a cheap function of what is
kept anyway (a norm, a cast, a split into heads) is computed again instead, and so are masks and positions. An adapter
on the last layers keeps that layer's input, one on the head alone the pooled features: feature-based fine-tuning is
the extreme case.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax import trees
from lora_jax.errors import UserError
from lora_jax.lift.min_cut import min_cut
from lora_jax.lift.program import Program, Step, draws, product_flops
from lora_jax.lift.trace import Call, is_traced
from lora_jax.lift.weight import is_adapted


class Split(NamedTuple):
    """A function in two parts: `suffix(variables, prefix(variables, **inputs), **inputs)` is what it computes.

    Both are ordinary functions that take arrays of any batch size and length at which the function's trace is the same
    sequence of operations; `lift` takes them.

    Attributes:
      prefix: `(variables, **inputs)` -> tuple of arrays, the batch as leading axis: the frontier.
      suffix: `(variables, frontier, **inputs)` -> the function's output, with no product of the cold part.
      share: the prefix's part of the function's floating-point operations in products, 0 to 1.
      frontier: shapes and dtypes of the frontier for the inputs that the split was made with.
      cut: which values of the function these are; equal for two adapters that share a frontier.
    """

    prefix: Callable[..., tuple[Any, ...]]
    suffix: Callable[..., Any]
    share: float
    frontier: tuple[jax.ShapeDtypeStruct, ...]
    cut: tuple[int, ...]


def split(function: Callable, variables: Any, paths: Collection[str], **inputs: Any) -> Split | None:
    """Splits a function at the frontier of an adapter.

    A row of the output must depend on that row of the inputs alone, as it does in any model without batch statistics;
    otherwise what is kept of a row would be wrong in another batch. A scan or remat that holds an adapted weight is hot
    as a whole.

    Args:
      function: called as `function(variables, **inputs)`.
      variables: its weights, arrays or shapes.
      paths: of the adapted weights.
      **inputs: example arguments, arrays or shapes; every array but random keys has the batch as leading axis.

    Returns:
      The two parts, or None where there is nothing to keep: no product lies before the first adapted weight, or what
      would be kept has no batch axis.

    Raises:
      UserError: a path that the variables do not have, or inputs without a common batch axis.
    """
    size = _batch_size(inputs)
    program = _program(function, variables, inputs)
    hot = _hot(program, _adapted(program, variables, paths))
    fed = _fed(program, inputs)
    cold = [s for s in program.steps if hot.isdisjoint(s.outputs)]
    heavy = [s for s in cold if product_flops(s.eqn) and fed.intersection(s.reads)]
    sources = {i for s in heavy for i in s.outputs}
    made_of = _made_of(cold, sources)
    sinks = {i for s in program.steps if not hot.isdisjoint(s.outputs) for i in s.reads}
    sinks |= {i for i in program.outputs if isinstance(i, int)}
    sinks &= sources | set(made_of)
    if not sinks:
        return None
    twice = _program(function, variables, _doubled(inputs))
    if twice.signature != program.signature:
        return None  # a batch of one row is often traced to another program
    cut = min_cut(sources, sinks, made_of, lambda i: _bytes(program.avals[i], twice.avals[i], size))
    if cut is None:
        return None
    total = sum(product_flops(s.eqn) for s in program.steps)
    prefix, suffix = _parts(function, program.signature, cut)
    avals = [program.avals[i] for i in cut]
    shapes = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals)
    return Split(prefix, suffix, sum(product_flops(s.eqn) for s in heavy) / total, shapes, cut)


def is_random(function: Callable, variables: Any, **inputs: Any) -> bool:
    """Whether the output depends on random numbers, such as dropout; traces, computes nothing."""
    return any(draws(s.eqn) for s in _program(function, variables, inputs).steps)


def _parts(function: Callable, signature: tuple, cut: tuple[int, ...]) -> tuple[Callable, Callable]:
    def traced(variables, inputs) -> tuple[Program, dict[int, Any], Any]:
        call = Call((variables,), inputs)
        closed, tree = call.trace(function)
        program = Program(closed)
        if program.signature != signature:
            raise UserError(
                "the function's trace at these shapes is another sequence of operations than at those it was split "
                "with, so its parts would not fit together; keep to batches of two rows or more, or do not split it"
            )
        return program, dict(zip(program.inputs, call.traced, strict=True)), tree

    def prefix(variables, **inputs):
        program, given, _ = traced(variables, inputs)
        return tuple(program.run(cut, given))

    def suffix(variables, frontier, **inputs):
        program, given, tree = traced(variables, inputs)
        for i, value in zip(cut, frontier, strict=True):
            if tuple(value.shape) != tuple(program.avals[i].shape):
                raise UserError(
                    f"the frontier has an array of shape {tuple(value.shape)}, but these inputs need "
                    f"{tuple(program.avals[i].shape)}; was it made for another batch?"
                )
        return tree.unflatten(program.run(program.outputs, given | dict(zip(cut, frontier, strict=True)), effects=True))

    return prefix, suffix


def _program(function: Callable, variables: Any, inputs: Mapping[str, Any]) -> Program:
    return Program(Call((variables,), dict(inputs)).trace(function)[0])


def _adapted(program: Program, variables: Any, paths: Collection[str]) -> set[int]:
    """The arguments that are adapted weights."""
    missing = set(paths) - set(trees.flatten(variables, is_adapted))
    if missing:
        raise UserError(f"split: the variables have no weight {sorted(missing)[0]!r}")
    marks = jax.tree.leaves(trees.map_with_path(lambda path, _: path in paths, variables, is_adapted))
    leaves = jax.tree.leaves(variables, is_leaf=is_adapted)
    traced = [mark for mark, leaf in zip(marks, leaves, strict=True) if is_traced(leaf)]
    return {i for i, mark in zip(program.inputs, traced, strict=False) if mark}


def _hot(program: Program, adapted: set[int]) -> set[int]:
    """What depends on the adapted weights or on chance; steps with side effects are never moved."""
    hot = set(adapted)
    for step in program.steps:
        if step.eqn.effects or draws(step.eqn) or not hot.isdisjoint(step.reads):
            hot.update(step.outputs)
    return hot


def _fed(program: Program, inputs: Mapping[str, Any]) -> set[int]:
    """What depends on the inputs. They are the last arguments."""
    count = len(Call((), dict(inputs)).traced)
    fed = set(program.inputs[len(program.inputs) - count :])
    for step in program.steps:
        if not fed.isdisjoint(step.reads):
            fed.update(step.outputs)
    return fed


def _made_of(cold: Sequence[Step], sources: set[int]) -> dict[int, list[int]]:
    """Value -> the values it is made of, where a source leads to it; all else is computed again at no cost."""
    out: dict[int, list[int]] = {}
    for step in cold:
        own = [i for i in step.reads if i in sources or i in out]
        if own and sources.isdisjoint(step.outputs):
            out.update(dict.fromkeys(step.outputs, own))
    return out


def _arrays(inputs: Mapping[str, Any]) -> list[Any]:
    leaves = [x for x in jax.tree.leaves(dict(inputs)) if is_traced(x)]
    return [x for x in leaves if np.ndim(x) and not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]


def _batch_size(inputs: Mapping[str, Any]) -> int:
    sizes = sorted({x.shape[0] for x in _arrays(inputs)})
    if len(sizes) != 1:
        raise UserError(
            f"split: the inputs must share a leading batch axis, but their arrays have leading sizes {sizes}; give "
            "arrays with a batch axis by keyword, and wrap the rest into the function"
        )
    return sizes[0]


def _doubled(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes of a batch of twice the rows: what grows along its first axis alone has the batch there."""
    ours = {id(x) for x in _arrays(inputs)}

    def double(x):
        return jax.ShapeDtypeStruct((2 * x.shape[0], *x.shape[1:]), x.dtype) if id(x) in ours else x

    return jax.tree.map(double, dict(inputs))


def _bytes(one: Any, two: Any, rows: int) -> float:
    """Size of a value; infinite unless its first axis is the batch."""
    batched = tuple(two.shape) == (2 * rows, *one.shape[1:]) and one.shape[:1] == (rows,)
    return float(math.prod(one.shape) * one.dtype.itemsize) if batched else math.inf
