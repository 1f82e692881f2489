"""The interpreter: evaluates a jaxpr in which some inputs are adapted weights.

Equations that touch no adapted weight are passed on untouched, one by one, through `jax.extend.core.jaxpr_as_fun`, so
everything JAX can do keeps working. Equations that do are handed to a rule (`rules.py`) or, when they carry jaxprs of
their own, entered (`control.py`). What is left needs the dense weight, and the caller's leave.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex

from lora_jax.errors import UserError
from lora_jax.lift.rules import RULES
from lora_jax.lift.weight import NotStructural, is_adapted

# Primitives that hold a jaxpr to enter: name -> function(interpreter, eqn, operands, stack). Filled by control.py.
ENTER: dict[str, Callable] = {}


def opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """The jaxpr and its constants, whether it came closed or not (JAX versions differ)."""
    if isinstance(jaxpr, jex.ClosedJaxpr):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, ()


def live_equations(jaxpr: Any, wanted: Sequence[bool]) -> tuple[list[Any], set[Any]]:
    """The equations that wanted outputs or effects depend on, in order, and the variables that those need."""
    needed = {v for v, w in zip(jaxpr.outvars, wanted, strict=True) if w and not isinstance(v, jex.Literal)}
    live = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(v in needed for v in eqn.outvars):
            live.append(eqn)
            needed.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
    return live[::-1], needed


class Interpreter:
    """Evaluates jaxprs with adapted weights among the inputs.

    Attributes:
      on_dense: 'error' or 'allow': what to do when an operation needs a weight's dense value.
      form: of low-rank products, one of `merged.FORMS`.
      again: whether the jaxpr at hand is one that the backward pass computes again.
      used: paths of the adapted weights that some live equation consumed.
      needed: variables of the jaxpr at hand whose values something depends on.
    """

    def __init__(self, on_dense: str, form: str = "auto"):
        self.on_dense, self.form, self.again = on_dense, form, False
        self.used: set[str] = set()
        self.needed: set[Any] = set()

    def run(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], stack: str = "", wanted: Any = None
    ) -> list[Any]:
        """Returns the outputs of the jaxpr: arrays or (only where a weight passes through unused) adapted weights.

        Args:
          jaxpr: an open jaxpr.
          consts: values of its constvars.
          args: values of its invars, arrays or adapted weights.
          stack: the names of the modules around it, for messages.
          wanted: which outputs the caller needs; None for all.
        """
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(v):
            return v.val if isinstance(v, jex.Literal) else env.get(v)

        live, needed = live_equations(jaxpr, wanted or [True] * len(jaxpr.outvars))
        for eqn in live:
            self.needed = needed
            outs = self.equation(eqn, [read(v) for v in eqn.invars], jaxpr.debug_info, stack)
            env.update((v, out) for v, out in zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def run_dense(
        self, jaxpr: Any, consts: Any, args: Any, stack: str, end: str = "the output of control flow"
    ) -> list:
        """Like `run`, for control flow or a whole function (`end` says which): the outputs must be arrays."""
        return [self.dense(x, end, stack) for x in self.run(jaxpr, consts, args, stack)]

    def equation(self, eqn: Any, operands: list[Any], debug_info: Any, stack: str) -> list[Any]:
        """Evaluates one equation."""
        if not any(map(is_adapted, operands)):
            return untouched(eqn, operands, debug_info)
        own = str(eqn.source_info.name_stack)
        inner = "/".join(s for s in (stack, own) if s)
        name = eqn.primitive.name
        try:
            if name in ENTER:
                return ENTER[name](self, eqn, operands, inner)
            if name in RULES:
                self.used.update(v.path for v in operands if is_adapted(v))
                with jax.named_scope(own or name):
                    return RULES[name](operands, {**eqn.params, "form": self.form, "again": self.again})
        except NotStructural:
            pass
        return untouched(eqn, [self.dense(v, name, inner) for v in operands], debug_info)

    def dense(self, value: Any, primitive: str, stack: str) -> Any:
        """The dense value of a weight that an operation without a rule consumes.

        Raises:
          UserError: the caller did not allow it.
        """
        if not is_adapted(value):
            return value
        self.used.add(value.path)
        if self.on_dense == "error" and not value.free:
            raise UserError(
                f"the adapted weight {value.path!r} of shape {value.shape} enters {primitive!r}"
                + (f" in module {stack!r}" if stack else "")
                + ", which has no rule for adapted weights. Leave that weight out of the targets, or pass "
                "on_dense='allow' to lift: the weight is then made dense there, at the cost of its full gradient."
            )
        return value.dense()


def untouched(eqn: Any, operands: Sequence[Any], debug_info: Any) -> list[Any]:
    """Evaluates one equation on arrays, exactly as JAX would."""
    variables: dict[Any, Any] = {}
    for v, value in zip(eqn.invars, operands, strict=True):
        if not isinstance(v, jex.Literal):
            variables[v] = value
    kept = [i for i, v in enumerate(eqn.outvars) if not isinstance(v, jex.DropVar)]
    jaxpr = jex.Jaxpr([], list(variables), [eqn.outvars[i] for i in kept], [eqn], eqn.effects, debug_info)
    results = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, []))(*variables.values())
    outs: list[Any] = [None] * len(eqn.outvars)
    for i, result in zip(kept, results, strict=True):
        outs[i] = result
    return outs
