"""A quantized weight in a function: the same as its dense value there, for every kind of site and way of running it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax import quant, sharding, trees
from lora_jax.lift import is_adapted
from lora_jax.lift.weight import NotStructural
from tests.adapters import kinds
from tests.lift.checks import QUICK, bits_equal, close, furthest, loss, noisy, weights

quick = functools.partial(jax.jit, compiler_options=QUICK)
SOME = ("dense", "scan", "conv", "embedding")
IN_PLACE = ("full", "head", "layernorm", "layers")  # put on kernels
OTHERS = [f for f in quant.formats() if f != "nf4"]
TRIED = [("nf4", k) for k in kinds.NAMES] + [
    pytest.param(f, k, marks=[] if i in (0, j + 1) else [pytest.mark.slow])
    for j, f in enumerate(OTHERS) for i, k in enumerate(SOME)
]  # fmt: skip


@functools.cache
def small(kind, name="nf4"):
    """(kind, quantized variables, lora, a random delta)."""
    site = kinds.get(kind)
    variables = lj.quantize(site.variables, site.sites, name, site.weights)
    adapter = kinds.make("lora", site)
    shapes = jax.eval_shape(lambda v: adapter.init(jax.random.key(0), v, site.sites), variables)
    return site, variables, adapter, noisy(shapes)


def with_gradient(function, adapter):
    apply = lj.lift(function)

    def run(variables, delta, *args):
        value = lambda d: (loss(y := apply(adapter.bind(variables, d), *args)), y)  # noqa: E731
        grads, out = jax.grad(value, has_aux=True)(delta)
        return out, grads

    return run


@pytest.mark.parametrize(("name", "kind"), TRIED)
def test_lora_over_a_format_is_lora_over_its_dense_values(name, kind):
    site, variables, adapter, delta = small(kind, name)
    dense = quant.dequantize(variables)
    nodes = [x for x in trees.flatten(variables, is_adapted).values() if is_adapted(x)]
    assert nodes and not any(map(is_adapted, trees.flatten(dense, is_adapted).values()))
    run = quick(with_gradient(site.function, adapter))
    (out, grads), (expected, expected_grads) = (run(v, delta, *site.args) for v in (variables, dense))
    close(out, expected, 1e-5, "output")
    close(grads, expected_grads, 1e-4, "gradient")
    assert furthest(out, quick(site.function)(dense, *site.args)) > 1e-2, "the adapter does nothing"
    assert furthest(dense, site.variables) > 1e-4, "the format rounds nothing"


@pytest.mark.parametrize("method", [m for m in lj.methods() if m not in ("prompt", "prefix")])  # no weights of theirs
def test_every_method_over_nf4(method):
    """As over the dense values of the format, or a message: what trains weights themselves cannot."""
    site, variables, *_ = small("dense")
    adapter = kinds.make(method, site)
    dense = quant.dequantize(variables)
    delta = noisy(quick(lambda v: adapter.init(jax.random.key(0), v, site.sites))(dense), 0.1)
    try:
        adapter.bind(variables, delta)
    except lj.UserError as error:
        assert "is quantized, and this method trains" in str(error) and method in IN_PLACE
        return
    assert method not in IN_PLACE
    apply = quick(lambda v, d: lj.lift(site.function)(adapter.bind(v, d), *site.args))
    close(apply(variables, delta), apply(dense, delta), 1e-5)


@pytest.mark.parametrize("kind", SOME)
def test_merging_gives_arrays_of_the_old_dtype(kind):
    site, variables, adapter, delta = small(kind)
    merged = adapter.merge(variables, delta)
    assert jax.tree.structure(merged) == jax.tree.structure(site.variables)
    close(merged, adapter.merge(quant.dequantize(variables), delta), 1e-6)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), site.variables)
    of_half = adapter.merge(lj.quantize(half, site.sites, "nf4", site.weights), delta)
    assert {x.dtype for x in jax.tree.leaves(of_half)} == {jnp.dtype("bfloat16")}


def test_sites_are_the_same_after():
    for kind in ("scan", "tied embedding", "heads in"):
        site, variables, *_ = small(kind)
        assert lj.find_sites(site.function, variables, *site.args) == site.sites


def test_bits_of_the_first_output_are_the_base_s():
    site, variables, adapter, _ = small("dense")
    delta = adapter.init(jax.random.key(0), variables, site.sites)
    apply = quick(lj.lift(site.function))
    bits_equal(apply(adapter.bind(variables, delta), *site.args), apply(variables, *site.args))


def test_arms_share_one_weight():
    """vmap over deltas keeps the weight unbatched, and an arm that is NaN spoils no other."""
    site, variables, adapter, delta = small("dense")
    both = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), delta)
    run = with_gradient(site.function, adapter)
    outs, grads = quick(jax.vmap(run, in_axes=(None, 0, None)))(variables, both, *site.args)
    for i, one in enumerate((delta, jax.tree.map(lambda x: 2 * x, delta))):
        out, grad = quick(run)(variables, one, *site.args)
        close(jax.tree.map(lambda x: x[i], (outs, grads)), (out, grad), 1e-4)  # noqa: B023
    nan = jax.tree.map(lambda x: x.at[0].set(jnp.nan), both)
    spoilt = quick(jax.vmap(run, in_axes=(None, 0, None)))(variables, nan, *site.args)
    assert not np.isfinite(spoilt[0][0]).any()
    close(spoilt[0][1], outs[1], 1e-6)
    program = str(jax.make_jaxpr(jax.vmap(run, in_axes=(None, 0, None)))(variables, both, *site.args))
    assert "u8[2,1,4,8]" not in program and "u8[1,4,8]" in program


def test_a_tree_may_be_stacked_and_mapped():
    """The dense shape follows vmap and scan over the trees themselves: it is no metadata."""
    site, one, *_ = small("dense")
    other = lj.quantize(jax.tree.map(lambda x: -2 * x, site.variables), site.sites, "nf4", site.weights)
    stack = jax.tree.map(lambda *x: jnp.stack(x), one, other)
    assert trees.flatten(stack, is_adapted)["layers_0/kernel"].shape == (2, 8, 8)
    apply = lj.lift(site.function)
    expected = jnp.stack([apply(v, *site.args) for v in (one, other)])
    close(quick(jax.vmap(apply, in_axes=(0, None)))(stack, *site.args), expected, 1e-5)
    close(jax.lax.scan(lambda c, v: (c, apply(v, *site.args)), 0, stack)[1], expected, 1e-5)


@pytest.mark.parametrize("kind", ["dense", "scan", "heads out", "experts"])
def test_on_a_mesh(kind):
    site, variables, adapter, delta = small(kind)
    run = with_gradient(site.function, adapter)
    expected = quick(run)(variables, delta, *site.args)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with sharding.use(mesh):
        rules = [(p, (*(None,) * (len(s.shape) - 1), "tensor")) for p, s in site.sites.items() if s.is_matrix]
        placed = sharding.place_base(variables, sharding.base_specs(variables, rules, mesh), mesh)
        node = next(x for x in trees.flatten(placed, is_adapted).values() if is_adapted(x))
        assert not node.base.sharding.is_fully_replicated and not node.constants.sharding.is_fully_replicated
        args = jax.device_put(site.args, jax.NamedSharding(mesh, P("data")))
        got = quick(run)(placed, delta, *args)
    close(got, expected, 1e-4)


def test_specs_of_the_packed_arrays():
    variables = {"layers": {"kernel": weights(2, 256, 4, 8)}}
    function = lambda v, x: jnp.einsum("lbd,ldhk->lbhk", x, v["layers"]["kernel"])  # noqa: E731
    sites = lj.find_sites(function, variables, weights(2, 3, 256))
    node = lj.quantize(variables, sites, "nf4")["layers"]["kernel"]
    own = node.placement(P("data", "fsdp", "tensor"))
    assert (own.base, own.constants, own.levels) == (
        P("data", "fsdp", None, "tensor", None), P("data", "fsdp", "tensor", None), P("data", None),
    )  # fmt: skip
    moved = node.transpose((2, 0, 3, 1)).placement(P("tensor", "data", None, "fsdp"))
    assert moved.base == own.base


def test_inside_shard_map():
    """A weight divided along its batch axis, or not at all, enters; along others its parts are no weights."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def make(spec):
        return jax.shard_map(
            lambda w, x: jnp.einsum("ebd,edf->ebf", x, w), mesh=mesh, in_specs=(spec, P("data")), out_specs=P("data")
        )

    w, x = weights(2, 8, 8), weights(2, 4, 8)
    function = lambda v, x: make(P("data"))(v["w"], x)  # noqa: E731
    sites = lj.find_sites(lambda v, x: jnp.einsum("ebd,edf->ebf", x, v["w"]), {"w": w}, x)
    small = lj.quantize({"w": w}, sites, "nf4")
    with jax.set_mesh(mesh):
        expected = function(quant.dequantize(small), x)
        apply = lj.lift(function)
        close(jax.jit(apply)(small, x), expected, 1e-5)
        got, other = (
            jax.jit(jax.grad(lambda x: loss(f(v, x))))(x)  # noqa: B023
            for f, v in ((apply, small), (function, quant.dequantize(small)))
        )
        close(got, other, 1e-5)
        divided = lj.lift(lambda v, x: make(P(None, None, "data"))(v["w"], x))
        with pytest.raises(lj.UserError, match="'w' of shape .* enters 'shard_map'"):
            divided(small, x)


# Structural operations: remembered, and done on the dense value.

OPERATIONS = {
    "transpose": lambda w: w.transpose(tuple(reversed(range(len(w.shape))))),
    "swap": lambda w: w.transpose((1, 0, *range(2, len(w.shape)))),
    "cast": lambda w: w.astype(jnp.bfloat16),
    "split": lambda w: w.reshape((*w.shape[:-1], 2, w.shape[-1] // 2)),
    "expand": lambda w: w.reshape((1, *w.shape)),
    "slice last": lambda w: sliced(w, len(w.shape) - 1, 1, 2, 1),
    "stride": lambda w: sliced(w, len(w.shape) - 1, 0, 2, 2),
    "slice first": lambda w: sliced(w, 0, w.shape[0] - 1, 1, 1),
    "layer": lambda w: sliced(w, 0, 1 % w.shape[0], 1, 1).reshape(w.shape[1:]),
}


def sliced(w, axis, start, size, stride):
    if is_adapted(w):
        return w.slice(axis, start, size, stride)
    return jax.lax.slice_in_dim(w, start, start + (size - 1) * stride + 1, stride, axis)


CHAINS = [
    ("transpose", "split", "swap"),
    ("split", "cast", "slice last", "transpose"),
    ("layer", "transpose", "stride"),
    ("swap", "layer", "expand"),
    ("expand", "slice first", "swap", "cast"),
    ("swap", "swap", "layer", "split"),
    ("transpose", "transpose", "slice first", "split"),
    ("transpose", "layer", "swap"),
]


@pytest.mark.parametrize("batch", [(), (0,), (1,)])
@pytest.mark.parametrize("chain", CHAINS, ids="-".join)
def test_structural_operations(batch, chain):
    shape = (4, 4, 8)
    rest = tuple(a for a in range(3) if a not in batch)
    site = lj.Site("w", shape, jnp.float32, batch, rest[:1], rest[1:], ("linear",))
    node = quant.base.encode(weights(*shape), site, quant.get("nf4")())
    value = node.dense()
    done = 0
    for step in chain:
        try:
            node = OPERATIONS[step](node)
        except NotStructural:
            assert batch, "without batch axes everything is structural"
            break
        value, done = OPERATIONS[step](value), done + 1
        assert (node.shape, node.dtype) == (value.shape, value.dtype), step
        np.testing.assert_array_equal(np.asarray(node.dense(), np.float32), np.asarray(value, np.float32))
    assert done >= 1


def test_a_traced_layer_index_is_structural():
    """`w[i]` in a loop over layers takes the packed layer, not a layer of the dense stack."""
    variables = {"layers": {"kernel": weights(3, 64, 64)}}

    def function(v, x):
        take = lambda i: jax.lax.dynamic_index_in_dim(v["layers"]["kernel"], i, keepdims=False)  # noqa: E731
        return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ take(i)), x)

    sites = lj.find_sites(function, variables, weights(2, 64))
    assert sites["layers/kernel"].batch == (0,)
    small = lj.quantize(variables, sites, "nf4")
    apply = quick(lj.lift(function))
    close(apply(small, weights(2, 64)), function(quant.dequantize(small), weights(2, 64)), 1e-5)
    held = apply.lower(small, weights(2, 64)).compile().memory_analysis().temp_size_in_bytes
    assert held < 2.5 * 64 * 64 * 4, "more than one layer was dense"


def test_the_scan_is_split_where_the_adapted_layers_begin():
    """A number format below an adapter owes nothing to the backward pass: the split is as on a dense base."""
    site = kinds.get("scan")
    adapter = kinds.make("lora", site, layers="last:1")
    everything = lj.quantize(site.variables, site.sites, "nf4")

    def scans(variables):
        delta = adapter.init(jax.random.key(0), variables, site.sites)
        program = jax.make_jaxpr(lambda d: lj.lift(site.function)(adapter.bind(variables, d), *site.args))(delta)
        return str(program).count(" scan[")

    assert scans(everything) == scans(site.variables) == 2


def test_constraints_and_casts_reach_the_dense_value():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def function(v, x):
        w = jax.lax.with_sharding_constraint(v["w"], jax.NamedSharding(mesh, P(None, "data")))
        return x @ jax.lax.reduce_precision(w, 8, 2).T

    variables, x = {"w": weights(8, 64)}, weights(2, 64)
    sites = lj.find_sites(function, variables, x)
    small = lj.quantize(variables, sites, "int8")
    close(jax.jit(lj.lift(function))(small, x), jax.jit(function)(quant.dequantize(small), x), 1e-6)


def test_later_calls_do_not_trace_again():
    site, variables, adapter, delta = small("dense")
    traced = []

    def function(*args):
        traced.append(1)
        return site.function(*args)

    apply = lj.lift(function)
    run = jax.jit(lambda v, d: apply(adapter.bind(v, d), *site.args))
    run(variables, delta), apply(variables, *site.args)
    count = len(traced)
    again = lj.quantize(jax.tree.map(lambda x: x + 1, site.variables), site.sites, "nf4", site.weights)
    run(again, delta), apply(again, *site.args)
    assert len(traced) == count and run._cache_size() == 1


@pytest.mark.parametrize("method", ["full", "layers", "head"])
def test_a_method_that_trains_weights_in_place_refuses(method):
    site, variables, *_ = small("dense")
    options = {} if method == "layers" else {"targets": "layers_0/kernel"}
    adapter = lj.adapters.get(method)(**options)
    dense = adapter.init(jax.random.key(0), site.variables, site.sites)
    for call in (
        lambda: adapter.init(jax.random.key(0), variables, site.sites),
        lambda: adapter.bind(variables, dense),
    ):
        with pytest.raises(lj.UserError, match="kernel' is quantized, and this method trains.*lora"):
            call()
    beside = lj.full(targets="out/.*")
    close(beside.merge(variables, beside.init(jax.random.key(0), variables, site.sites)), variables, 1e-9)


def test_an_audit_names_the_format_and_counts_weights():
    site, variables, adapter, _ = small("dense")
    delta = adapter.init(jax.random.key(0), variables, site.sites)
    seen = lj.audit(adapter, delta, variables, site.sites, site.function, *site.args)
    assert seen.total == trees.count(site.variables) and seen.difference is not None
    assert "2 weights of 128 parameters in nf4, " in str(seen) and "bits a weight" in str(seen)
    assert lj.audit(adapter, delta, site.variables, site.sites).notes == ()


def test_an_adapter_belongs_to_the_quantized_base(tmp_path):
    site, variables, adapter, delta = small("dense")
    lj.save(tmp_path, adapter, delta, variables)
    bits_equal(lj.load(tmp_path, variables)[1], delta)
    for other in (site.variables, lj.quantize(site.variables, site.sites, "fp4", site.weights)):
        with pytest.raises(lj.UserError, match="was made for the base"):
            lj.load(tmp_path, other)


def test_unused_quantized_weights_are_no_mistake():
    """They were not chosen to train."""
    variables = {"a": weights(8, 8), "b": weights(8, 8, seed=1)}
    sites = lj.find_sites(lambda v, x: x @ v["a"] @ v["b"], variables, weights(2, 8))
    small = lj.quantize(variables, sites, "nf4")
    dense = dataclasses.replace(small["a"]).dense()
    close(lj.lift(lambda v, x: x @ v["a"])(small, weights(2, 8)), weights(2, 8) @ dense, 1e-6)
