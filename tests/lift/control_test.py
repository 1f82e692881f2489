"""Control flow is entered, functions with a rule of their own are not; what is closed over does not leak."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax.lift import opened_as
from tests.lift.checks import QUICK, axes, check, close, noisy, weights

LINEAR = ((), (0,), (1,))


def bound(function, variables, *args, targets=None):
    """(adapter, random delta) of lora on a function."""
    adapter = lj.lora(rank=2, targets=targets)
    sites = lj.find_sites(function, variables, *args)
    return adapter, noisy(jax.eval_shape(lambda v: adapter.init(jax.random.key(0), v, sites), variables))


@jax.custom_vjp
def squared(x):
    """x**2 whose derivative is made up: 100 instead of 2x, so that one sees which rule ran."""
    return x**2


squared.defvjp(lambda x: (x**2, x.shape), lambda shape, dy: (jnp.full(shape, 100.0) * dy,))


@jax.custom_jvp
def cubed(x):
    """x**3 whose derivative is made up: 50."""
    return x**3


cubed.defjvp(lambda primals, tangents: (primals[0] ** 3, 50.0 * tangents[0]))


@pytest.mark.parametrize(("act", "slope"), [(squared, 100.0), (cubed, 50.0)])
def test_own_derivative_rule_holds_for_activations(act, slope):
    """The custom rule must show in the adapter's gradient: opened, the function would give its true derivative."""
    variables, x = {"w": weights(6, 4), "out": weights(4, 3)}, weights(5, 6)
    adapter, delta, _ = check(lambda v, x: act(x @ v["w"]) @ v["out"], variables, x)
    lifted = lj.lift(lambda v, x: jnp.sum(act(x @ v["w"])))
    part = {"w": delta["w"]}
    grads = jax.grad(lambda d: lifted(adapter.bind(variables, d), x))(part)
    expected = jax.grad(lambda d: slope * jnp.sum(x @ adapter.merge(variables, d)["w"]))(part)
    close(grads, expected, 1e-4)


@pytest.mark.parametrize("kind", ["custom_jvp_call", "custom_vjp_call"])
def test_weight_entering_a_function_with_its_own_rule(kind):
    act = cubed if kind == "custom_jvp_call" else squared
    variables, x = {"block": {"w": weights(6, 6)}}, weights(5, 6)

    def apply(v, x):
        with jax.named_scope("my_module"):
            return jnp.tanh(x @ v["block"]["w"]) @ act(v["block"]["w"])

    adapter, delta, sites = check(apply, variables, x, on_dense="allow", expect={"block/w": LINEAR})
    assert sites["block/w"].uses == ("linear", "elementwise")
    with pytest.raises(lj.UserError) as caught:
        lj.lift(apply)(adapter.bind(variables, delta), x)
    for part in ("'block/w' of shape (6, 6)", f"enters '{kind}'", "in module 'my_module'", "on_dense='allow'"):
        assert part in str(caught.value)


def test_what_a_rule_is_opened_as_is_run_for_an_adapted_weight_alone():
    """The rule here gives zeros, so that one sees which derivative was taken."""
    product = jax.custom_vjp(opened_as(jnp.matmul, "product_of_this_test")(lambda x, w: x @ w))
    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, dy: jax.tree.map(jnp.zeros_like, kept))
    variables, x = {"w": weights(6, 6)}, weights(5, 6)
    inside, beside = lambda v, x: product(x, v["w"]), lambda v, x: product(x, weights(6, 6)) @ v["w"]
    adapter, delta = bound(inside, variables, x)
    assert lj.find_sites(inside, variables, x)["w"].fan_in == (0,)

    def slope(function, x):
        return jax.grad(lambda x: jnp.sum(lj.lift(function)(adapter.bind(variables, delta), x)))(x)

    with jax.disable_jit():
        assert np.any(slope(inside, x))
    close(slope(inside, x), jax.grad(lambda x: jnp.sum(x @ adapter.merge(variables, delta)["w"]))(x), 1e-4)
    assert not np.any(slope(beside, x))


def test_while_and_fori_with_weights_as_constants():
    def apply(v, x):
        x = lax.fori_loop(0, 2, lambda i, x: jnp.tanh(x @ v["a"]), x)
        go_on = lambda c: (c[0] < 3) & (jnp.sum(c[1] @ v["b"]) < 1e6)  # noqa: E731
        return lax.while_loop(go_on, lambda c: (c[0] + 1, jnp.tanh(c[1] @ v["a"]) + c[1] @ v["b"]), (0, x))[1]

    variables = {"a": weights(6, 6), "b": weights(6, 6, seed=1)}
    check(apply, variables, weights(5, 6), expect={"a": LINEAR, "b": LINEAR}, grad_rtol=None)


def test_carried_weights_need_leave():
    apply = lambda v, x: lax.fori_loop(0, 2, lambda i, c: (c[0] / 2, jnp.tanh(c[1] @ c[0])), (v["w"], x))[1] @ v["w"]  # noqa: E731
    variables, x = {"w": weights(6, 6)}, weights(5, 6)
    adapter, delta, _ = check(apply, variables, x, on_dense="allow")
    with pytest.raises(lj.UserError, match=r"enters 'scan \(carried\)'"):
        lj.lift(apply)(adapter.bind(variables, delta), x)


def test_cond_and_switch():
    def apply(v, x, pick):
        x = lax.cond(pick > 0, lambda x: x @ v["a"], lambda x: x @ v["b"], x)
        return lax.switch(pick, [lambda x: x @ v["a"], lambda x: 2 * x @ v["c"], lambda x: x], x)

    variables = {name: weights(6, 6, seed=i) for i, name in enumerate("abc")}
    expect = dict.fromkeys("abc", LINEAR)
    adapter, delta, _ = check(apply, variables, weights(5, 6), jnp.int32(1), expect=expect)
    lifted = jax.jit(lj.lift(apply), compiler_options=QUICK)
    for pick in range(3):
        out = lifted(adapter.bind(variables, delta), weights(5, 6), jnp.int32(pick))
        close(out, apply(adapter.merge(variables, delta), weights(5, 6), jnp.int32(pick)), 1e-5)


def test_nested_jit_scan_remat_cond():
    @jax.jit
    def inner(w, x):
        step = lambda x, w: (lax.cond(jnp.sum(x) > 0, lambda x: jnp.tanh(x @ w), lambda x: x @ w, x), None)  # noqa: E731
        return lax.scan(jax.checkpoint(step), x, w)[0]

    check(lambda v, x: inner(v["w"], x), {"w": weights(3, 6, 6)}, weights(5, 6), expect={"w": ((0,), (1,), (2,))})


def test_nested_scans_over_stages_and_layers():
    def apply(v, x):
        layer = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        return lax.scan(lambda x, ws: (lax.scan(layer, x, ws)[0], None), x, v["w"])[0]

    variables = {"w": weights(2, 3, 6, 6)}
    _, _, sites = check(apply, variables, weights(5, 6), expect={"w": ((0, 1), (2,), (3,))})
    assert sites["w"].layer_axis == 0


@pytest.mark.parametrize("split", ["columns", "rows"])
def test_shard_map_with_sharded_weights(split):
    """Tensor parallelism by hand: the factors are sharded as the weight's axes that they run along."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    spec = P(None, "model") if split == "columns" else P("model", None)
    out_spec = P("data", "model") if split == "columns" else P("data", None)

    def body(w, x):
        y = x @ w
        return y if split == "columns" else lax.psum(y, "model")

    def apply(v, x):
        in_specs = (spec, P("data", None) if split == "columns" else P("data", "model"))
        return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_spec)(v["w"], x)

    with jax.set_mesh(mesh):
        variables = {"w": jax.device_put(weights(8, 8), NamedSharding(mesh, spec))}
        check(apply, variables, weights(4, 8), expect={"w": LINEAR})


def test_sharding_constraints_on_weights():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def apply(v, x):
        w = jax.lax.with_sharding_constraint(v["w"], NamedSharding(mesh, P("model", None)))
        return x @ w

    with jax.set_mesh(mesh):
        check(apply, {"w": weights(8, 8)}, weights(4, 8), expect={"w": LINEAR})


def test_transforms_of_the_user_inside():
    """vmap over examples, grad and checkpoint inside the function."""

    def apply(v, x):
        single = lambda x: jnp.sum(jnp.tanh(x @ v["w"])[None] @ v["u"])  # noqa: E731
        return jax.vmap(jax.grad(jax.checkpoint(single)))(x)

    variables = {"w": weights(6, 6), "u": weights(6, 1)}
    _, _, sites = check(apply, variables, weights(5, 6), targets="w")
    assert axes(sites)["w"] == LINEAR


def test_closed_over_tracers_do_not_leak():
    variables, x = {"w": weights(6, 4)}, weights(5, 6)
    adapter, delta = bound(lambda v, x: x @ v["w"], variables, x)
    seen = {"factor": jnp.float32(1)}
    lifted = lj.lift(lambda v, x: seen["factor"] * jax.jit(jnp.sin)(x @ v["w"] * seen["factor"]))

    @jax.jit
    def outer(factor, x):
        seen["factor"] = factor
        return lifted(adapter.bind(variables, delta), x)

    def expected(factor):
        return factor * jnp.sin(x @ adapter.merge(variables, delta)["w"] * factor)

    close(outer(2.0, x), expected(2.0), 1e-5)
    close(outer(np.float32(3.0), x), expected(3.0), 1e-5)
    grad = jax.grad(outer)  # another trace of the same shapes, over a tracer of another kind
    with pytest.raises(TypeError, match="scalar"):
        grad(2.0, x)
    close(jax.grad(lambda f: jnp.sum(outer(f, x)))(2.0), jax.grad(lambda f: jnp.sum(expected(f)))(2.0), 1e-4)
    mapped = jax.vmap(lambda f: outer(f, x))(jnp.array([1.0, 4.0]))
    close(mapped, jnp.stack([expected(1.0), expected(4.0)]), 1e-5)


def test_effects_stay(capfd):
    variables, x = {"w": weights(6, 4)}, weights(5, 6)

    def apply(v, x):
        y = x @ v["w"]
        jax.debug.print("row {}", y[0, 0])
        return y

    adapter, delta = bound(apply, variables, x)
    lj.lift(apply)(adapter.bind(variables, delta), x)
    jax.effects_barrier()
    assert "row " in capfd.readouterr().out


@pytest.mark.parametrize("how", ["not at all", "in a dead result", "in a dropped output of a jitted function"])
def test_unused_weights_raise(how):
    variables, x = {"w": weights(6, 4), "idle": weights(6, 4, seed=1)}, weights(5, 6)
    inner = jax.jit(lambda v, x: (x @ v["w"], x @ v["idle"]))

    def apply(v, x):
        if how == "in a dead result":
            _ = jnp.sum(x @ v["idle"])
        return inner(v, x)[0] if how.endswith("function") else x @ v["w"]

    adapter, delta = bound(lambda v, x: x @ v["w"] + x @ v["idle"], variables, x)
    with pytest.raises(lj.UserError, match=r"1 adapted weight\(s\) are never used .*: idle\..*unused='allow'"):
        lj.lift(apply)(adapter.bind(variables, delta), x)
    out = lj.lift(apply, unused="allow")(adapter.bind(variables, delta), x)
    close(out, x @ adapter.merge(variables, delta)["w"], 1e-5)
    if how != "in a dead result":
        assert lj.find_sites(apply, variables, x)["idle"].uses == ()


def test_options_of_lift_are_checked():
    for option in ("on_dense", "unused"):
        with pytest.raises(lj.UserError, match=rf"lift\({option}='maybe'\): expected 'error' or 'allow'"):
            lj.lift(lambda v: v, **{option: "maybe"})


def test_without_adapted_weights_it_is_the_function_itself():
    calls = []
    lifted = lj.lift(lambda v, x: calls.append(type(x)) or x @ v["w"])
    variables, x = {"w": weights(6, 4)}, weights(5, 6)
    np.testing.assert_array_equal(lifted(variables, x), x @ variables["w"])
    assert not issubclass(calls[0], jax.core.Tracer)


class Counted:
    """A function that counts how often it is traced, and the compilations while it is watched."""

    compiled: list = []

    def __init__(self):
        self.traces = 0

    def __call__(self, v, x, flag=True, *, table=None):
        self.traces += 1
        return jnp.tanh(x @ v["w"]) if flag else x


@pytest.fixture(scope="module", autouse=True)
def watched():
    def listen(event, seconds, **_):
        if "backend_compile" in event or "jaxpr_trace" in event:
            Counted.compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)


@pytest.mark.parametrize("mode", ["eager", "jitted", "gradient"])
def test_second_call_neither_traces_nor_compiles(mode):
    function = Counted()
    variables, x = {"w": weights(6, 4)}, weights(5, 6)
    adapter, delta = bound(lambda v, x: x @ v["w"], variables, x)
    lifted = lj.lift(function)
    run = lambda v, d, x: jnp.sum(lifted(adapter.bind(v, d), x, True, table=[1, "a"]))  # noqa: E731
    if mode == "jitted":
        run = jax.jit(run)
    if mode == "gradient":
        run = jax.jit(jax.grad(run, argnums=1))
    inputs = [({"w": weights(6, 4, seed=i)}, noisy(delta, seed=i), weights(5, 6, seed=i)) for i in range(3)]
    run(*inputs[0])
    run(*inputs[1])  # the first eager call after a fresh one may still place an array
    assert function.traces == 1
    before = len(Counted.compiled)
    assert before > 0, "the listener hears nothing"
    run(*inputs[2])
    assert function.traces == 1 and Counted.compiled[before:] == []
    run(*inputs[0][:2], weights(7, 6))
    assert function.traces == 2, "another shape is another trace"


def test_old_traces_are_let_go():
    function = Counted()
    variables = {"w": weights(6, 4)}
    adapter, delta = bound(lambda v, x: x @ v["w"], variables, weights(5, 6))
    lifted = lj.lift(function)

    def shapes(x):  # a new function each time: jax.eval_shape keeps results too
        jax.eval_shape(lambda v, d, x: lifted(adapter.bind(v, d), x), variables, delta, x)

    for n in range(1, 70):
        shapes(weights(n, 6))
    assert function.traces == 69
    shapes(weights(69, 6))
    assert function.traces == 69
    shapes(weights(1, 6))
    assert function.traces == 70, "the oldest of more than 64 is traced again"
