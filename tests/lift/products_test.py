"""Products in every orientation and shape: axes are read from the use, lifted == merged. No library, plain jnp."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from tests.lift.checks import axes, biases, check, weights

SIZES = {"b": 3, "t": 5, "d": 6, "h": 2, "k": 4, "e": 2, "f": 7, "c": 3}

# equation, then (batch, fan_in, fan_out) of the weight, which is the second operand
EINSUMS = {
    "bd,dk->bk": ((), (0,), (1,)),
    "bd,dk->kb": ((), (0,), (1,)),
    "db,kd->bk": ((), (1,), (0,)),
    "btd,dhk->bthk": ((), (0,), (1, 2)),
    "btd,hdk->bhtk": ((), (1,), (0, 2)),
    "bhtk,hkd->bdt": ((), (0, 1), (2,)),
    "bthk,khd->btd": ((), (0, 1), (2,)),
    "btd,dhkc->cbkth": ((), (0,), (1, 2, 3)),
    "ebtd,edf->ebtf": ((0,), (1,), (2,)),
    "bted,def->fbte": ((1,), (0,), (2,)),
    "btd,edf->ebtf": ((), (1,), (0, 2)),
    "bted,ed->bte": ((0,), (1,), ()),
    "btd,d->bt": ((), (0,), ()),
}


@pytest.mark.parametrize("equation", EINSUMS)
def test_einsum(equation):
    left, right = equation.split("->")[0].split(",")
    x, w = (weights(*(SIZES[c] for c in letters)) for letters in (left, right))
    check(lambda v, x: jnp.einsum(equation, x, v["w"]), {"w": w}, x, expect={"w": EINSUMS[equation]}, rank=1)


def test_weight_as_left_operand():
    x = weights(3, 5, 6)
    check(lambda v, x: jnp.einsum("dhk,btd->bthk", v["w"], x), {"w": weights(6, 2, 4)}, x)
    check(lambda v, x: v["w"] @ x[0].T, {"w": weights(4, 6)}, x, expect={"w": ((), (1,), (0,))})


@pytest.mark.parametrize(
    ("use", "shape", "expected"),
    [
        (lambda x, w: x @ w.T, (4, 6), ((), (1,), (0,))),
        (lambda x, w: x @ w.reshape(6, -1), (6, 2, 3), ((), (0,), (1, 2))),
        (lambda x, w: x @ w.reshape(6, 4), (2, 3, 4), ((), (0, 1), (2,))),
        (lambda x, w: x @ w.reshape(6, 2, 3).transpose(0, 2, 1).reshape(6, 6), (6, 6), ((), (0,), (1,))),
        (lambda x, w: (x @ w[:, :4]) * (x @ w[:, 4:8]) + x @ w[:, 8:], (6, 12), ((), (0,), (1,))),
        (lambda x, w: (x @ w[:, :1]) * (x @ w[:, 1:]), (6, 5), ((), (0,), (1,))),
        (lambda x, w: jnp.concatenate([x @ part for part in jnp.split(w, 3, axis=1)], 1), (6, 6), ((), (0,), (1,))),
        (lambda x, w: x[:, :3] @ w[:3] - x[:, 3:] @ w[3:], (6, 4), ((), (0,), (1,))),
        (lambda x, w: x @ w[:, ::2], (6, 5), ((), (0,), (1,))),
        (lambda x, w: x @ jnp.squeeze(jnp.expand_dims(w, (0, 2)), (0, 2)), (6, 4), ((), (0,), (1,))),
        (lambda x, w: jnp.tensordot(x, w, 1, precision="highest"), (6, 4), ((), (0,), (1,))),
        (lambda x, w: lax.optimization_barrier((w, x))[0].T @ x.T, (6, 4), ((), (0,), (1,))),
    ],
)
def test_structural_operations_commute(use, shape, expected):
    check(lambda v, x: use(x, v["w"]), {"w": weights(*shape)}, weights(5, 6), expect={"w": expected})


def by_loop(w, x):
    for i in range(3):
        x = jnp.tanh(x @ w[i])
    return x


def by_traced_index(w, x):
    return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w[i]), x)


def by_dynamic_index(w, x):
    return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ lax.dynamic_index_in_dim(w, i, 0, False)), x)


def by_scan(w, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), jnp.cos(x)), x, w)


def by_reversed_scan(w, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), jnp.sum(x)), x, w, reverse=True)


@pytest.mark.parametrize("walk", [by_loop, by_traced_index, by_dynamic_index, by_scan, by_reversed_scan])
def test_stacked_weights(walk):
    w = weights(3, 6, 6) * 2
    _, _, sites = check(lambda v, x: walk(v["w"], x), {"w": w}, weights(5, 6), expect={"w": ((0,), (1,), (2,))})
    assert sites["w"].layer_axis == 0 and sites["w"].layers == (0, 1, 2)


@pytest.mark.parametrize("walk", [by_scan, by_reversed_scan, by_traced_index])
@pytest.mark.parametrize("idle", [[0], [0, 1], [1], [2], [0, 2]], ids=str)
def test_stack_with_layers_left_out(walk, idle):
    """Layers of rank zero: a scan may be split below the first one that is adapted, its outputs must not change."""
    rank = [(f"w#{i}", 0) for i in idle] + [(".*", 2)]
    check(lambda v, x: walk(v["w"], x), {"w": weights(3, 6, 6) * 2}, weights(5, 6), rank=rank)


def test_stack_along_another_axis_by_traced_index():
    _, _, sites = check(
        lambda v, x, i: x @ v["w"][:, i], {"w": weights(6, 3, 4)}, weights(5, 6), jnp.int32(1),
        expect={"w": ((1,), (0,), (2,))},
    )  # fmt: skip
    assert sites["w"].layer_axis == 1


def test_an_indexed_pair_inside_a_numbered_layer_is_not_two_layers():
    variables = {f"layers_{i}": {"kv": weights(2, 6, 6, seed=i)} for i in range(3)}

    def apply(v, x):
        for i in range(3):
            x = jnp.tanh(x @ v[f"layers_{i}"]["kv"][0]) * (x @ v[f"layers_{i}"]["kv"][1])
        return x

    _, _, sites = check(apply, variables, weights(5, 6))
    site = sites["layers_2/kv"]
    assert (site.batch, site.layer, site.layer_axis) == ((0,), 2, None)
    assert lj.lora(rank=2, layers="last:1").init(jax.random.key(0), variables, sites).keys() == {"layers_2/kv"}


def test_embedding_by_index_by_take_and_one_hot():
    tokens = jnp.array([[1, 2], [3, 8]])
    for use in (lambda e, t: e[t], lambda e, t: jnp.take(e, t, axis=0), lambda e, t: jnp.take(e.T, t, axis=1)):
        _, _, sites = check(lambda v, t: use(v["e"], t), {"e": weights(9, 6)}, tokens, targets="e")  # noqa: B023
        assert sites["e"].uses == ("embedding",) and axes(sites)["e"] == ((), (0,), (1,))
    check(lambda v, t: jax.nn.one_hot(t, 9) @ v["e"], {"e": weights(9, 6)}, tokens, expect={"e": ((), (0,), (1,))})


def test_lookup_out_of_bounds_gives_the_fill_value():
    tokens = jnp.array([[1, 2], [3, 11]])
    check(lambda v, t: v["e"].at[t].get(mode="fill", fill_value=1.0), {"e": weights(9, 6)}, tokens, targets="e")


@pytest.mark.parametrize(
    ("apply", "uses", "expected"),
    [
        (lambda v, x, t: jnp.tanh(v["e"][t]) @ v["e"].T, ("embedding", "linear"), ((), (0,), (1,))),
        (lambda v, x, t: jnp.tanh(x @ v["e"].T)[0, 0] + v["e"][t], ("linear", "embedding"), ((), (1,), (0,))),
    ],
)
def test_tied_weight_either_use_first(apply, uses, expected):
    tokens = jnp.array([[1, 2], [3, 8]])
    _, _, sites = check(apply, {"e": weights(9, 6)}, weights(5, 6), tokens, targets="e", expect={"e": expected})
    assert sites["e"].uses == uses


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_convolution(layout, groups):
    x = weights(2, 6, 6, 4) if layout == "NHWC" else weights(2, 4, 6, 6)
    expect = {"w": ((), (0, 1, 2), (3,))} if layout == "NHWC" else {"w": ((), (1, 2, 3), (0,))}
    w = weights(3, 3, 4 // groups, 8) if layout == "NHWC" else weights(8, 4 // groups, 3, 3)
    numbers = (layout, "HWIO" if layout == "NHWC" else "OIHW", layout)

    def apply(v, x):
        return lax.conv_general_dilated(
            x, v["w"], (2, 1), "SAME", rhs_dilation=(1, 2), dimension_numbers=numbers, feature_group_count=groups
        )

    check(apply, {"w": w}, x, expect=expect)


def test_shared_weight_counts_every_use_once():
    dense = jax.jit(lambda w, x: x @ w)  # JAX hands out one jaxpr for both calls

    def apply(v, x):
        return (dense(v["w"], x) + v["b"][None]) * dense(v["w"], jnp.sin(x))

    _, _, sites = check(apply, {"w": weights(6, 4), "b": weights(4)}, weights(5, 6))
    assert sites["w"].uses == ("linear", "linear")
    assert sites["w"].bias is None, "the second use has no bias"


def test_bias_is_what_runs_along_the_outputs():
    x, w = weights(5, 6), weights(6, 4)
    found = lambda f, v: biases(lj.find_sites(f, v, x))  # noqa: E731
    assert found(lambda v, x: x @ v["w"] + v["b"][None], {"w": w, "b": weights(4)}) == {"w": "b"}
    assert found(lambda v, x: v["b"][None] + x @ v["w"], {"w": w, "b": weights(4)}) == {"w": "b"}
    assert found(lambda v, x: x @ v["w"] + v["table"], {"w": w, "table": weights(5, 4)}) == {}
    assert found(lambda v, x: jnp.tanh(x @ v["w"]) + v["b"][None], {"w": w, "b": weights(4)}) == {}
    two = {"w": w, "u": weights(6, 4, seed=1), "b": weights(4)}
    assert found(lambda v, x: (x @ v["w"] + v["b"][None]) * (x @ v["u"] + v["b"][None]), two) == {}


def test_learned_queries_times_a_weight():
    variables = {"queries": weights(5, 6), "w": weights(6, 6)}
    _, delta, sites = check(lambda v, x: (v["queries"] @ v["w"]) @ x.T, variables, weights(5, 6, seed=3))
    assert set(delta) == {"w"} and sites["queries"].uses == ("elementwise",)


def test_product_of_two_adapted_weights():
    variables = {"a": weights(6, 4), "b": weights(4, 5)}
    both = lambda v, x: (x @ v["a"]) * jnp.sum(v["a"] @ v["b"]) + x @ v["a"] @ v["b"] @ jnp.ones((5, 4))  # noqa: E731
    adapter, delta, _ = check(both, variables, weights(3, 6), on_dense="allow")
    assert set(delta) == {"a", "b"}
    with pytest.raises(lj.UserError, match=r"'(a|b)' of shape .* enters 'dot_general'"):
        lj.lift(both)(adapter.bind(variables, delta), weights(3, 6))


@pytest.mark.parametrize(
    ("use", "operation"),
    [
        (lambda w: jnp.concatenate([w, w], 1), "concatenate"),
        (lambda w: w[::-1], "rev"),
        (lambda w: w * 2.0, "mul"),
        (lambda w: jnp.broadcast_to(w, (5, 6, 4))[0], "broadcast_in_dim"),
        (lambda w: w.reshape(4, 6).T, "reshape"),
        (lambda w: lax.cumsum(w), "cumsum"),
    ],
)
def test_what_has_no_rule_needs_leave(use, operation):
    # The first product makes the weight a matrix; the second use is the one without a rule.
    apply = lambda v, x: jnp.sum(x @ v["w"]) + x @ use(v["w"])  # noqa: E731
    adapter, delta, _ = check(apply, {"w": weights(6, 4)}, weights(5, 6), on_dense="allow")
    with pytest.raises(lj.UserError) as caught:
        lj.lift(apply)(adapter.bind({"w": weights(6, 4)}, delta), weights(5, 6))
    assert f"'w' of shape (6, 4) enters '{operation}'" in str(caught.value)
    assert "on_dense='allow'" in str(caught.value)


def test_bf16_compute_with_float32_weights():
    apply = lambda v, x: x.astype(jnp.bfloat16) @ v["w"].astype(jnp.bfloat16)  # noqa: E731
    # The merged weight is rounded to bf16, the factors' product is not: 8 bits of mantissa.
    adapter, delta, _ = check(apply, {"w": weights(6, 4)}, weights(5, 6), rtol=2e-2, grad_rtol=2e-2)
    out = lj.lift(apply)(adapter.bind({"w": weights(6, 4)}, delta), weights(5, 6))
    assert out.dtype == jnp.bfloat16 and delta["w"].a.dtype == jnp.float32


def test_rounded_weights_round_the_base_only():
    check(
        lambda v, x: x @ lax.reduce_precision(v["w"], 8, 7),
        {"w": weights(6, 4)},
        weights(5, 6),
        rtol=2e-2,
        grad_rtol=2e-2,
    )


def test_empty_batch():
    variables = {"w": weights(6, 4)}
    adapter = lj.lora(rank=2)
    delta = adapter.init(jax.random.key(0), variables, lj.find_sites(lambda v, x: x @ v["w"], variables, weights(5, 6)))
    out = lj.lift(lambda v, x: x @ v["w"])(adapter.bind(variables, delta), jnp.zeros((0, 6)))
    assert out.shape == (0, 4)


def test_sites_say_what_is_unused_and_where_the_order_comes_from():
    variables = {"b": weights(6, 4), "a": weights(6, 4), "idle": weights(3, 3), "steps": jnp.arange(3)}
    sites = lj.find_sites(lambda v, x: x @ v["a"] + x @ v["b"], variables, weights(5, 6))
    assert list(sites) == ["a", "b", "idle"], "in the order of the tree; whole numbers are no weights"
    assert sites["idle"].uses == () and not sites["idle"].is_matrix
    shapes = jax.tree_util.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    assert (
        lj.find_sites(lambda v, x: x @ v["a"] + x @ v["b"], shapes, jax.ShapeDtypeStruct((5, 6), np.float32)) == sites
    )
    with pytest.raises(lj.UserError, match="no floating-point weights.*got dict"):
        lj.find_sites(lambda v: v["n"], {"n": jnp.arange(3)})
