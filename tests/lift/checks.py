"""One check for every function under test: sites as expected, step 0 exact, lifted == merged, gradients too."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj

# Tests compile often and run once.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def weights(*shape: int, seed: int = 0) -> jax.Array:
    """A float32 array of unit-sized activations: N(0, 1/shape[0]), another one for every shape and seed."""
    drawn = np.random.default_rng([seed, *shape]).normal(size=shape) / math.sqrt(shape[0])
    return jnp.asarray(drawn, jnp.float32)


def variables_of(model: Any, *args: Any, **kwargs: Any) -> Any:
    """A Linen model's variables, nothing at zero: N(0, 0.4^2), positive outside `params` (running variances)."""
    variables = noisy(jax.eval_shape(lambda: model.init(jax.random.key(0), *args, **kwargs)), 0.4)
    return {
        name: tree if name == "params" else jax.tree_util.tree_map(jnp.abs, tree) for name, tree in variables.items()
    }


def noisy(tree: Any, size: float = 0.3, seed: int = 1) -> Any:
    """The tree with N(0, size^2) added to every float leaf; shapes count as zeros. numpy draws: nothing is compiled."""
    rng = np.random.default_rng(seed)

    def moved(x):
        if not _is_float(x):
            return x
        start = 0.0 if isinstance(x, jax.ShapeDtypeStruct) else np.asarray(x)
        return jnp.asarray(start + size * rng.normal(size=x.shape), x.dtype)

    return jax.tree_util.tree_map(moved, tree)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def loss(outputs: Any) -> jax.Array:
    """A scalar that depends on every output element by itself."""
    return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in jax.tree_util.tree_leaves(outputs) if _is_float(x))


def close(given: Any, expected: Any, rtol: float, what: str = "") -> None:
    """Asserts equality to `rtol` of each expected leaf's largest entry."""
    assert jax.tree_util.tree_structure(given) == jax.tree_util.tree_structure(expected), what
    pairs = zip(jax.tree_util.tree_leaves_with_path(given), jax.tree_util.tree_leaves(expected), strict=True)
    for (path, x), y in pairs:
        assert (x.shape, x.dtype) == (y.shape, y.dtype), (what, path)
        if _is_float(x):
            x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
            worst = np.abs(x - y).max(initial=0.0) / max(np.abs(y).max(initial=0.0), 1e-6)
            assert worst < rtol, f"{what}{jax.tree_util.keystr(path)}: off by {worst:.2e} of the largest entry"


def bits_equal(given: Any, expected: Any) -> None:
    """Asserts that two trees are equal bit for bit."""
    for x, y in zip(jax.tree_util.tree_leaves(given), jax.tree_util.tree_leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True)


def furthest(given: Any, other: Any) -> float:
    """The largest distance of two trees' floating-point entries."""
    pairs = zip(jax.tree_util.tree_leaves(given), jax.tree_util.tree_leaves(other), strict=True)
    return max(float(np.abs(np.subtract(x, y, dtype=np.float64)).max(initial=0.0)) for x, y in pairs if _is_float(x))


def axes(sites: Mapping[str, lj.Site]) -> dict[str, tuple]:
    """`{path: (batch, fan_in, fan_out)}` of the sites that a product uses."""
    return {path: (s.batch, s.fan_in, s.fan_out) for path, s in sites.items() if s.is_matrix}


def biases(sites: Mapping[str, lj.Site]) -> dict[str, str]:
    """`{path: path of its bias}`."""
    return {path: s.bias for path, s in sites.items() if s.bias is not None}


def check(
    function: Any,
    variables: Any,
    *args: Any,
    expect: Mapping[str, tuple] | None = None,
    targets: Any = None,
    rank: Any = 2,
    on_dense: str = "error",
    rtol: float = 1e-5,
    grad_rtol: float | None = 1e-4,
    **kwargs: Any,
) -> tuple[lj.Adapter, dict, dict]:
    """Runs lora through a function and compares with its merged weights.

    Args:
      function: called as `function(variables, *args, **kwargs)`.
      variables: its weights.
      *args: example arguments.
      expect: what `axes` must give for all matrices of the function.
      targets: of the adapter.
      rank: of the adapter.
      on_dense: of `lift`.
      rtol: of the outputs, relative to the largest.
      grad_rtol: of the gradients, likewise; None leaves them out.
      **kwargs: of the function, static ones included.

    Returns:
      (adapter, random delta, sites).
    """
    sites = lj.find_sites(function, variables, *args, **kwargs)
    if expect is not None:
        assert axes(sites) == dict(expect)
    adapter = lj.lora(rank=rank, targets=targets)
    # Shapes are enough: drawing the real start would compile more than the test itself.
    delta = noisy(jax.eval_shape(lambda v: adapter.init(jax.random.key(0), v, sites), variables))
    apply = lj.lift(function, on_dense=on_dense)

    leaves, treedef = jax.tree_util.tree_flatten((args, kwargs))
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, (jax.Array, np.ndarray))}

    def call(function, variables, arrays):
        args, kwargs = treedef.unflatten([arrays.get(i, x) for i, x in enumerate(leaves)])
        return function(variables, *args, **kwargs)

    def with_gradient(outputs, delta):
        if grad_rtol is None:
            return {}, outputs(delta)
        value = lambda d: (loss(out := outputs(d)), out)  # noqa: E731
        return jax.grad(value, has_aux=True)(delta)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(variables, delta, arrays, strength):
        batch = {path: one.a.shape[: len(one.axes.batch)] for path, one in delta.items()}
        scale = {path: strength * np.reshape(one.scales, batch[path]) for path, one in delta.items()}
        lifted = with_gradient(lambda d: call(apply, adapter.bind(variables, d, scale=scale), arrays), delta)
        return lifted, with_gradient(lambda d: call(function, adapter.merge(variables, d), arrays), delta)

    base = jax.jit(functools.partial(call, function), compiler_options=QUICK)(variables, arrays)
    # XLA fuses tiny products with what follows, so two programs may differ in the last bits; bit for bit is for the
    # conformance suite, whose sizes are not fused.
    close(both(variables, delta, arrays, 0.0)[0][1], base, rtol, "output at scale 0")
    (grads, out), (dense_grads, dense_out) = both(variables, delta, arrays, 1.0)
    assert furthest(out, base) > 1e-2, "the adapter does nothing"
    close(out, dense_out, rtol, "output")
    close(grads, dense_grads, grad_rtol, "gradient")
    return adapter, delta, sites
