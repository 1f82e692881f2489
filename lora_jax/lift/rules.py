"""What to do with an equation that consumes an adapted weight: one small rule per primitive.

A rule takes the equation's operands (arrays and adapted weights) and its parameters, with the `form` that the caller
of `lift` asked for and whether the equation is computed `again` (remat). It returns the list of results, or raises
`NotStructural`; then, and for every primitive without a rule, the weight is made dense if the caller allows it.
"""

from collections.abc import Callable
from typing import Any

import jax

from lora_jax.lift.products import Conv, Dot, Take
from lora_jax.lift.weight import AdaptedWeight, NotStructural, is_adapted

Rule = Callable[[list[Any], dict[str, Any]], list[Any]]
RULES: dict[str, Rule] = {}


def rule(name: str) -> Callable[[Rule], Rule]:
    """Registers the rule of one primitive."""

    def add(function: Rule) -> Rule:
        RULES[name] = function
        return function

    return add


@rule("dot_general")
def _dot(operands, params):
    weight_is_lhs = is_adapted(operands[0])
    weight, x = operands if weight_is_lhs else operands[::-1]
    if is_adapted(x):
        raise NotStructural
    use = Dot(
        params["dimension_numbers"], weight_is_lhs, params["precision"],
        params["preferred_element_type"], params.get("out_sharding"), params["form"], params["again"],
    )  # fmt: skip
    return [weight.dot_general(x, use)]


@rule("gather")
def _gather(operands, params):
    weight, indices = operands
    numbers = params["dimension_numbers"]
    axes = numbers.start_index_map
    whole = all(n == 1 if i in axes else n == weight.shape[i] for i, n in enumerate(params["slice_sizes"]))
    if is_adapted(indices) or len(axes) != 1 or numbers.collapsed_slice_dims != axes or not whole:
        raise NotStructural
    if numbers.operand_batching_dims:
        raise NotStructural
    flags = (params["indices_are_sorted"], params["unique_indices"])
    use = Take(axes[0], numbers.offset_dims, params["mode"], params["fill_value"], flags)
    return [weight.take(indices, use)]


_CONV = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers", "feature_group_count",
         "batch_group_count", "precision", "preferred_element_type")  # fmt: skip


@rule("conv_general_dilated")
def _conv(operands, params):
    x, kernel = operands
    if is_adapted(x):
        raise NotStructural
    return [kernel.conv(x, Conv(tuple((name, params[name]) for name in _CONV)))]


@rule("add")
@rule("add_any")
def _add(operands, params):
    del params
    weights = [v for v in operands if is_adapted(v)]
    if len(weights) != 1 or not hasattr(weights[0], "add"):
        raise NotStructural
    return [weights[0].add(operands[0] if operands[1] is weights[0] else operands[1])]


@rule("convert_element_type")
def _convert(operands, params):
    return [operands[0].astype(params["new_dtype"])]


@rule("transpose")
def _transpose(operands, params):
    return [operands[0].transpose(params["permutation"])]


@rule("reshape")
def _reshape(operands, params):
    if params.get("dimensions") is not None:
        raise NotStructural
    return [operands[0].reshape(params["new_sizes"])]


@rule("squeeze")
def _squeeze(operands, params):
    shape = operands[0].shape
    drop = {d % len(shape) for d in params["dimensions"]}
    return [operands[0].reshape([n for i, n in enumerate(shape) if i not in drop])]


@rule("expand_dims")
def _expand(operands, params):
    shape = list(operands[0].shape)
    for d in sorted(params["dimensions"]):
        shape.insert(d, 1)
    return [operands[0].reshape(shape)]


@rule("broadcast_in_dim")
def _broadcast(operands, params):
    weight, shape = operands[0], params["shape"]
    into = params["broadcast_dimensions"]
    grown = [shape[d] != weight.shape[i] for i, d in enumerate(into)]
    if any(grown) or any(n != 1 for d, n in enumerate(shape) if d not in into):
        return [weight.broadcast(shape, into)] if hasattr(weight, "broadcast") else _refuse()
    return [weight.reshape(shape)]


def _refuse():
    raise NotStructural


@rule("slice")
def _slice(operands, params):
    weight = operands[0]
    strides = params["strides"] or (1,) * len(weight.shape)
    for axis, (start, limit, stride) in enumerate(
        zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    ):
        size = -(-(limit - start) // stride)
        if (start, size) != (0, weight.shape[axis]):
            weight = weight.slice(axis, start, size, stride)
    return [weight]


@rule("dynamic_slice")
def _dynamic_slice(operands, params):
    weight, *starts = operands
    if any(is_adapted(s) for s in starts):
        raise NotStructural
    for axis, (start, size) in enumerate(zip(starts, params["slice_sizes"], strict=True)):
        if size != weight.shape[axis]:
            weight = weight.slice(axis, start, size)
    return [weight]


@rule("split")
def _split(operands, params):
    out, start = [], 0
    for size in params["sizes"]:
        out.append(operands[0].slice(params["axis"], start, size))
        start += size
    return out


@rule("sharding_constraint")
def _constrain(operands, params):
    weight: AdaptedWeight = operands[0]
    return [weight.constrain(lambda w: jax.lax.with_sharding_constraint(w, params["sharding"]))]


@rule("reduce_precision")
def _reduce_precision(operands, params):
    bits = params["exponent_bits"], params["mantissa_bits"]
    return [operands[0].constrain(lambda w: jax.lax.reduce_precision(w, *bits))]


@rule("pvary")
def _pvary(operands, params):
    return [operands[0].constrain(lambda w: jax.lax.pcast(w, params["axes"], to="varying"))]


@rule("copy")
@rule("copy_p")
@rule("optimization_barrier")
def _pass(operands, params):
    del params
    return list(operands)
