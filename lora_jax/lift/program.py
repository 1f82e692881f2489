"""A function as one flat list of steps: calls of jitted functions are opened, so that a function can be cut anywhere.

Values have numbers, the same ones at any shapes as long as the trace is the same sequence of operations. Remat, control
flow and functions with their own derivative stay whole.
"""

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from jax.extend import core as jex

from lora_jax.lift.interpret import opened, untouched

CALLS = ("jit", "pjit", "closed_call", "core_call")
PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general")
RANDOM = ("random_", "threefry", "rng_")  # how names of primitives that draw begin


@dataclasses.dataclass(frozen=True)
class Step:
    """One equation; `inputs` are numbers of values or literals."""

    eqn: Any
    inputs: tuple[Any, ...]
    outputs: tuple[int, ...]
    debug_info: Any

    @property
    def reads(self) -> tuple[int, ...]:
        """The values among the inputs."""
        return tuple(i for i in self.inputs if isinstance(i, int))


class Program:
    """What a trace does.

    Attributes:
      inputs: numbers of the arguments.
      outputs: numbers of the results, or literals.
      steps: what leads to them, in order.
      avals: shape and dtype of every value, by number.
    """

    def __init__(self, closed: Any):
        """Takes a closed jaxpr."""
        self.avals: list[Any] = []
        self.steps: list[Step] = []
        self._consts: dict[int, Any] = {}
        self.inputs = tuple(self._new(v) for v in closed.jaxpr.invars)
        self.outputs = tuple(self._open(closed.jaxpr, closed.consts, self.inputs))
        self.steps = list(self._live([i for i in self.outputs if isinstance(i, int)], (), effects=True))

    @property
    def signature(self) -> tuple:
        """Equal for two traces whose values correspond number by number."""
        return len(self.inputs), tuple((s.eqn.primitive.name, s.outputs) for s in self.steps)

    def run(self, wanted: Sequence[Any], given: Mapping[int, Any], effects: bool = False) -> list[Any]:
        """Computes values from others.

        Args:
          wanted: numbers of values, or literals.
          given: values by number: the arguments, and others that are then not computed.
          effects: whether steps with side effects run.
        """
        env = {**self._consts, **given}

        def read(i: Any) -> Any:
            return env[i] if isinstance(i, int) else i.val

        for step in self._live([i for i in wanted if isinstance(i, int)], given, effects):
            outs = untouched(step.eqn, [read(i) for i in step.inputs], step.debug_info)
            env.update(zip(step.outputs, outs, strict=True))
        return [read(i) for i in wanted]

    def _new(self, variable: Any) -> int:
        self.avals.append(variable.aval)
        return len(self.avals) - 1

    def _open(self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        """Adds the steps of a jaxpr; returns what its outputs are."""
        names: dict[Any, Any] = dict(zip(jaxpr.invars, arguments, strict=True))
        for variable, value in zip(jaxpr.constvars, consts, strict=True):
            names[variable] = self._new(variable)
            self._consts[names[variable]] = value

        def number(v: Any) -> Any:
            return v if isinstance(v, jex.Literal) else names[v]

        for eqn in jaxpr.eqns:
            operands = tuple(map(number, eqn.invars))
            if eqn.primitive.name in CALLS:
                inner, inner_consts = opened(eqn.params.get("jaxpr") or eqn.params["call_jaxpr"])
                names.update(zip(eqn.outvars, self._open(inner, inner_consts, operands), strict=True))
            else:
                outputs = tuple(map(self._new, eqn.outvars))
                names.update(zip(eqn.outvars, outputs, strict=True))
                self.steps.append(Step(eqn, operands, outputs, jaxpr.debug_info))
        return [number(v) for v in jaxpr.outvars]

    def _live(self, wanted: Sequence[int], given: Collection[int], effects: bool) -> list[Step]:
        needed, live = set(wanted) - set(given), []
        for step in reversed(self.steps):
            if needed.intersection(step.outputs) or (effects and step.eqn.effects):
                live.append(step)
                needed.update(i for i in step.reads if i not in given)
        return live[::-1]


def product_flops(eqn: Any) -> float:
    """Floating-point operations of the matrix products and convolutions in an equation; a loop of unknown length counts
    as one pass, a choice as its dearest branch."""
    name = eqn.primitive.name
    if name in PRODUCTS:
        out, (left, right) = eqn.outvars[0].aval, (v.aval for v in eqn.invars[:2])
        if name == "conv_general_dilated":
            features = right.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            return 2.0 * math.prod(out.shape) * math.prod(right.shape) / max(features, 1)
        contracted = eqn.params["dimension_numbers"][0][0] if name == "dot_general" else (left.ndim - 1,)
        return 2.0 * math.prod(out.shape) * math.prod(left.shape[a] for a in contracted)
    inner = [sum(map(product_flops, jaxpr.eqns)) for jaxpr in bodies(eqn)]
    times = eqn.params.get("length", 1) if name == "scan" else 1
    return times * (max(inner, default=0.0) if name == "cond" else sum(inner))


def draws(eqn: Any) -> bool:
    """Whether an equation draws random numbers, or something inside it does."""
    return eqn.primitive.name.startswith(RANDOM) or any(draws(e) for jaxpr in bodies(eqn) for e in jaxpr.eqns)


def bodies(eqn: Any) -> Iterator[Any]:
    """The jaxprs that an equation carries."""
    for value in eqn.params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(one, (jex.Jaxpr, jex.ClosedJaxpr)):
                yield opened(one)[0]
