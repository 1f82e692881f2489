"""`lift`: a function of arrays becomes a function of arrays and adapted weights.

The function is traced once with the dense shapes (`jax.make_jaxpr`), the jaxpr is kept by (tree, shapes, static
arguments), and every call evaluates it with the interpreter, under one `jax.jit`, so that an eager second call neither
traces nor compiles.
"""

import collections
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lora_jax.errors import UserError, did_you_mean
from lora_jax.lift import control  # noqa: F401  (registers the control-flow rules)
from lora_jax.lift.interpret import Interpreter
from lora_jax.lift.merged import FORMS
from lora_jax.lift.weight import is_adapted

# Settings of JAX that a trace depends on.
_CONFIG = (
    "jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion", "jax_numpy_rank_promotion",
    "jax_default_device",
)  # fmt: skip
_KEPT = 64  # traces kept per lifted function; a training run needs two or three


def is_traced(leaf: Any) -> bool:
    """True for what is traced: arrays and adapted weights. Everything else is static."""
    return is_adapted(leaf) or isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


class Call:
    """The arguments of one call, split into traced values and static ones."""

    def __init__(self, args: tuple, kwargs: dict):
        self.leaves, self.treedef = jax.tree_util.tree_flatten((args, kwargs), is_leaf=is_adapted)
        self.traced = [leaf for leaf in self.leaves if is_traced(leaf)]
        self.where = [i for i, leaf in enumerate(self.leaves) if is_traced(leaf)]
        self.static = [leaf for leaf in self.leaves if not is_traced(leaf)]

    def key(self) -> Any:
        """What a trace depends on, or None if a static argument cannot be hashed."""
        config = tuple(getattr(jax.config, name) for name in _CONFIG)
        avals = tuple(_aval(leaf) for leaf in self.traced)
        # True == 1 == 1.0: the types belong to the key.
        static = tuple((type(leaf), leaf) for leaf in self.static)
        key = (self.treedef, tuple(self.where), avals, static, jax.sharding.get_abstract_mesh(), config)
        try:
            hash(key)
        except TypeError:
            return None
        return key

    def trace(self, function: Callable) -> tuple[Any, Any]:
        """Returns (closed jaxpr, tree of the output) for dense weights."""

        def on_traced(*traced):
            leaves = list(self.leaves)
            for i, value in zip(self.where, traced, strict=True):
                leaves[i] = value
            args, kwargs = jax.tree_util.tree_unflatten(self.treedef, leaves)
            return function(*args, **kwargs)

        dense = [jax.ShapeDtypeStruct(x.shape, x.dtype) if is_adapted(x) else x for x in self.traced]
        jaxpr, out = jax.make_jaxpr(on_traced, return_shape=True)(*dense)
        return jaxpr, jax.tree_util.tree_structure(out)


def _aval(leaf: Any) -> Any:
    if is_adapted(leaf) or isinstance(leaf, jax.ShapeDtypeStruct):
        return (
            tuple(leaf.shape),
            np.dtype(leaf.dtype) if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended) else leaf.dtype,
        )
    return jax.typeof(leaf)


class Trace:
    """One trace of a function, and the compiled evaluation of it."""

    def __init__(self, function: Callable, call: Call, on_dense: str, unused: str, form: str):
        closed, self.out_tree = call.trace(function)
        self.consts = list(closed.consts)
        self.holds_tracers = any(isinstance(c, jax.core.Tracer) for c in self.consts)

        def evaluate(consts, traced):
            interpreter = Interpreter(on_dense, form)
            outs = interpreter.run_dense(closed.jaxpr, consts, traced, "", end="the function's output")
            if unused == "error":
                check_used(traced, interpreter.used)
            return outs

        self.evaluate = jax.jit(evaluate)

    def __call__(self, traced: list) -> Any:
        return self.out_tree.unflatten(self.evaluate(self.consts, traced))


def check_used(traced: list, used: set[str]) -> None:
    """Raises if an adapted weight reached no operation: the adapter would train and do nothing."""
    idle = [v for v in traced if is_adapted(v) and not v.frozen and v.path not in used]
    if idle:
        raise UserError(
            f"{len(idle)} adapted weight(s) are never used by the function, so adapting them does nothing: "
            f"{', '.join(v.path for v in idle[:5])}. {idle[0].unused_hint()}"
        )


def lift(function: Callable, *, on_dense: str = "error", unused: str = "error", form: str = "auto") -> Callable:
    """Makes a function accept adapted weights wherever it takes arrays. Function in, function out, as `jax.vmap`.

    The function is not changed and needs no cooperation: any JAX function will do (Linen's `apply`, an NNX module
    behind `nnx.split`, plain `jnp`). Arrays and adapted weights are traced; every other argument is static.

    Args:
      function: any traceable function.
      on_dense: 'error' (default) or 'allow': when an operation needs a weight's dense value (no rule covers it, or it
        is inside a `custom_jvp`/`custom_vjp`).
      unused: 'error' (default) or 'allow': when an adapted weight reaches no operation.
      form: how a low-rank update enters a product, both exact: 'factored', `x W + (x a) b`; 'merged', `x (W + a b)`,
        which is for products of dense float32 weights on one device without dropout (the others stay factored), and
        rounds the update to the dtype of weights below float32; 'auto' (default), whichever costs less at these
        shapes, for float32. Under a `vmap` over adapters ask for 'factored': a merged weight cannot be shared.

    Returns:
      A function of the same signature, differentiable in reverse mode with respect to the adapters' arrays, that
      composes with jit, grad, vmap, scan, checkpoint and meshes. Called without adapted weights it is the function
      itself.

    Raises:
      UserError: at the call, as `on_dense` and `unused` say.
    """
    for name, value in (("on_dense", on_dense), ("unused", unused)):
        if value not in ("error", "allow"):
            raise UserError(f"lift({name}={value!r}): expected 'error' or 'allow'")
    if form not in FORMS:
        raise UserError(f"lift(form={form!r}) does not exist; {did_you_mean(str(form), FORMS)}")
    traces: collections.OrderedDict[Any, Trace] = collections.OrderedDict()

    @functools.wraps(function)
    def lifted(*args, **kwargs):
        call = Call(args, kwargs)
        if not any(map(is_adapted, call.traced)):
            return function(*args, **kwargs)
        key = call.key()
        trace = traces.get(key) if key is not None else None
        if trace is None:
            trace = Trace(function, call, on_dense, unused, form)
            # A trace that closed over tracers of an enclosing transformation must not outlive it.
            if key is not None and not trace.holds_tracers:
                traces[key] = trace
                if len(traces) > _KEPT:
                    traces.popitem(last=False)
        return trace(call.traced)

    return lifted
