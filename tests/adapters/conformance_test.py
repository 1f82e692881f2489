"""What every method promises, tried on every kind of site: a new file in `adapters/` is found and held to it.

`make test` tries every method on every kind under one way of running it; `make test-all` under every way.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax import trees
from lora_jax.lift import is_adapted
from tests.adapters import kinds
from tests.lift.checks import QUICK, bits_equal, close, furthest, loss, noisy, weights

METHODS = [m for m in lj.methods() if m not in kinds.ELSEWHERE]
quick = functools.partial(jax.jit, compiler_options=QUICK)


@functools.cache
def started(method: str, kind: str):
    """(kind, adapter, first delta) of a method on a kind."""
    if reason := kinds.CANNOT.get(method, {}).get(kind):
        pytest.skip(f"{method} cannot do {kind}: {reason}")
    site = kinds.get(kind)
    adapter = kinds.make(method, site)
    return site, adapter, quick(lambda v: adapter.init(jax.random.key(0), v, site.sites))(site.variables)


def moved(adapter, delta, seed=1, size=0.3):
    """The delta with noise on all that trains; what does not train stays."""
    mask = adapter.trainable(delta)
    return jax.tree_util.tree_map(lambda on, new, old: new if on else old, mask, noisy(delta, size, seed), delta)


def with_gradient(outputs):
    """A function of (variables, delta, *args) that returns (outputs, gradient of the delta)."""

    def run(variables, delta, *args):
        grads, out = jax.grad(lambda d: (loss(y := outputs(variables, d, *args)), y), has_aux=True)(delta)
        return out, grads

    return run


# How two deltas are run: each returns [(outputs, gradients), (outputs, gradients)].


def stacked(deltas):
    return jax.tree_util.tree_map(lambda *x: jnp.stack(x), *deltas)


def apart(results):
    return [jax.tree_util.tree_map(lambda x: x[i], results) for i in range(2)]  # noqa: B023


def by_jit(step, variables, deltas, args):
    run = quick(step)
    return [run(variables, d, *args) for d in deltas]


def eagerly(step, variables, deltas, args):
    return [step(variables, d, *args) for d in deltas]


def by_vmap(step, variables, deltas, args):
    run = quick(jax.vmap(step, in_axes=(None, 0, *(None,) * len(args))))
    return apart(run(variables, stacked(deltas), *args))


def by_scan(step, variables, deltas, args):
    run = quick(lambda v, d: jax.lax.scan(lambda c, one: (c, step(v, one, *args)), 0, d)[1])
    return apart(run(variables, stacked(deltas)))


def by_loop_over_examples(step, variables, deltas, args):
    """The batch in two halves, gradients added: what accumulation does."""
    halves = [tuple(x[i : i + 2] for x in args) for i in (0, 2)]
    out = []
    for d in deltas:
        (y0, g0), (y1, g1) = (quick(step)(variables, d, *half) for half in halves)
        out.append((jnp.concatenate([y0, y1]), jax.tree_util.tree_map(jnp.add, g0, g1)))
    return out


def on_a_mesh(step, variables, deltas, args):
    """Eight devices: the batch and one axis of every weight divided, where they divide."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def place(x):
        axis = next((i for i, n in reversed(list(enumerate(x.shape))) if n % 4 == 0), None)
        return jax.device_put(x, NamedSharding(mesh, P(*("model" if i == axis else None for i in range(x.ndim)))))

    with jax.set_mesh(mesh):
        args = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in args]
        variables, deltas = jax.tree_util.tree_map(place, (variables, deltas))
        return by_jit(step, variables, deltas, args)


WAYS = {
    "jit": by_jit,
    "vmap": by_vmap,
    "scan": by_scan,
    "remat": by_jit,  # around a checkpoint: test_lifted_equals_merged
    "mesh": on_a_mesh,
    "halves": by_loop_over_examples,
    "eager": eagerly,
}


@functools.cache
def binds_arrays(method):
    """True if nothing that a method binds needs lifting; of such a method three kinds of sites say as much as all."""
    site = kinds.get("dense")
    adapter = kinds.make(method, site)
    shapes = jax.eval_shape(lambda v: adapter.bind(v, adapter.init(jax.random.key(0), v, site.sites)), site.variables)
    return not any(map(is_adapted, jax.tree_util.tree_leaves(shapes, is_leaf=is_adapted)))


def seldom(i, j):
    return binds_arrays(METHODS[i]) and (i + j) % 4 != 0


SITES = [
    pytest.param(m, k, id=f"{m}-{k}", marks=[pytest.mark.slow] if seldom(i, j) else [])
    for i, m in enumerate(METHODS)
    for j, k in enumerate(kinds.NAMES)
]
PAIRS = [
    pytest.param(*(m, k, w), id=f"{m}-{k}-{w}", marks=[pytest.mark.slow] if seldom(i, j) or (i + 2 * j + n) % 7 else [])
    for i, m in enumerate(METHODS)
    for j, k in enumerate(kinds.NAMES)
    for n, w in enumerate(WAYS)
]


@functools.cache
def merged_results(method: str, kind: str):
    """Outputs and gradients of two random deltas by merged weights: what every way must give."""
    site, adapter, delta = started(method, kind)
    deltas = [moved(adapter, delta, seed=s) for s in (1, 2)]
    step = with_gradient(lambda v, d, *args: site.function(adapter.merge(v, d), *args))
    if method in kinds.UNMERGED:
        step = with_gradient(lambda v, d, *args: lj.lift(site.function)(adapter.bind(v, d), *args))
    return deltas, by_jit(step, site.variables, deltas, site.args)


@pytest.mark.parametrize(("method", "kind", "way"), PAIRS)
def test_lifted_equals_merged(method, kind, way):
    site, adapter, _ = started(method, kind)
    deltas, expected = merged_results(method, kind)
    apply = lj.lift(site.function)
    if way == "remat":
        apply = jax.checkpoint(apply)
    step = with_gradient(lambda v, d, *args: apply(adapter.bind(v, d), *args))
    results = WAYS[way](step, site.variables, deltas, site.args)
    for (out, grads), (merged, merged_grads) in zip(results, expected, strict=True):
        close(out, merged, 1e-5, "output")
        # With a divided batch JAX 0.10.2 and 0.12 themselves return wrong gradients of a grouped convolution on 8 CPU
        # devices (4 times the right ones, without any of our code).
        if (kind, way) != ("grouped conv", "mesh"):
            close(grads, merged_grads, 1e-4, "gradient")


@functools.cache
def base_output(kind: str):
    site = kinds.get(kind)
    return quick(site.function)(site.variables, *site.args)


@pytest.mark.parametrize(("method", "kind"), SITES)
def test_starts_as_the_base_and_then_differs(method, kind):
    """Both directions: bit for bit the base at first, and with a random delta not the base, lifted or merged."""
    site, adapter, delta = started(method, kind)
    apply = lj.lift(site.function)
    first = quick(lambda v, d, *args: apply(adapter.bind(v, d), *args))(site.variables, delta, *site.args)
    bits_equal(first, base_output(kind))
    if method not in kinds.UNMERGED:
        bits_equal(adapter.merge(site.variables, delta), site.variables)
    for out, _ in merged_results(method, kind)[1]:
        assert furthest(out, base_output(kind)) > 1e-2


def on_dense(method):
    return started(method, "dense")


@pytest.mark.parametrize("method", METHODS)
def test_base_is_never_touched(method):
    """Training changes the delta alone, also when the delta is donated."""
    site, adapter, delta = on_dense(method)
    before = jax.tree_util.tree_map(np.array, site.variables)
    apply, tx = lj.lift(site.function), optax.sgd(0.1)

    @functools.partial(jax.jit, donate_argnums=1)
    def train(variables, delta):
        grads = jax.grad(lambda d: loss(apply(adapter.bind(variables, d), *site.args)))(delta)
        return optax.apply_updates(delta, tx.update(grads, tx.init(delta))[0])

    trained = train(site.variables, jax.tree_util.tree_map(jnp.copy, delta))
    assert furthest(trained, delta) > 0
    bits_equal(site.variables, before)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_what_trains(method):
    """A delta's arrays are float32, `trainable` has its structure, and everything that trains has a gradient."""
    site, adapter, delta = on_dense(method)
    mask = adapter.trainable(delta)
    assert jax.tree_util.tree_structure(mask) == jax.tree_util.tree_structure(delta)
    assert all(type(on) is bool for on in jax.tree_util.tree_leaves(mask)) and any(jax.tree_util.tree_leaves(mask))
    assert {x.dtype for x in jax.tree_util.tree_leaves(delta)} == {jnp.dtype("float32")}
    for _, grads in merged_results(method, "dense")[1]:
        for on, gradient in zip(jax.tree_util.tree_leaves(mask), jax.tree_util.tree_leaves(grads), strict=True):
            assert not on or float(jnp.abs(gradient).max()) > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["dense", "scan"])
def test_bfloat16_base(method, kind):
    site, adapter, _ = started(method, kind)
    half = jax.tree_util.tree_map(lambda x: x.astype(jnp.bfloat16), site.variables)
    sites = lj.find_sites(site.function, half, *site.args)
    delta = moved(adapter, quick(lambda v: adapter.init(jax.random.key(0), v, sites))(half))
    assert {x.dtype for x in jax.tree_util.tree_leaves(delta)} == {jnp.dtype("float32")}
    out = quick(lambda v, d: lj.lift(site.function)(adapter.bind(v, d), *site.args))(half, delta)
    if method in kinds.UNMERGED:
        close(out, merged_results(method, kind)[1][0][0].astype(out.dtype), 6e-2)
        return
    merged = adapter.merge(half, delta)
    assert {x.dtype for x in jax.tree_util.tree_leaves(merged)} == {jnp.dtype("bfloat16")}
    close(out, quick(site.function)(merged, *site.args), 3e-2)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "oft"])  # a rotation has no scale, and says so
@pytest.mark.parametrize("kind", ["dense", "scan"])
def test_a_scale_may_be_data(method, kind):
    """One program for any scale; a method that has one of its own (alpha, or scale) acts by it."""
    site, adapter, delta = started(method, kind)
    delta = moved(adapter, delta)
    apply = lj.lift(site.function)
    run = quick(lambda scale: apply(adapter.bind(site.variables, delta, scale=scale), *site.args))
    half, twice = run(jnp.float32(0.5)), run(jnp.float32(2.0))
    close(half, apply(adapter.bind(site.variables, delta, scale=0.5), *site.args), 1e-5)
    has_one = method == "chain" or not {"alpha", "scale"}.isdisjoint(lj.adapters.options(method))
    assert (furthest(half, twice) > 1e-3) == has_one


@pytest.mark.parametrize("method", METHODS)
def test_spec_rebuilds_the_adapter(method):
    import json

    site, adapter, delta = on_dense(method)
    spec = json.loads(json.dumps(adapter.spec))
    assert spec == adapter.spec and spec["method"] == method
    again = lj.from_spec(spec)
    bits_equal(quick(lambda v: again.init(jax.random.key(0), v, site.sites))(site.variables), delta)
    assert again.spec == adapter.spec


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["dense", "scan"])
def test_save_and_load(method, kind, tmp_path):
    site, adapter, delta = started(method, kind)
    delta = moved(adapter, delta)
    lj.save(tmp_path, adapter, delta, site.variables)
    again, read = lj.load(tmp_path, site.variables)
    assert again.spec == adapter.spec and list(read) == list(delta)
    assert jax.tree_util.tree_structure(read) == jax.tree_util.tree_structure(delta), "static fields survive too"
    bits_equal(read, delta)
    if method not in kinds.UNMERGED:
        bits_equal(again.merge(site.variables, read), adapter.merge(site.variables, delta))
    other = noisy(site.variables, 1e-3)
    with pytest.raises(lj.UserError) as caught:
        lj.load(tmp_path, other)
    assert trees.fingerprint(site.variables)[:16] in str(caught.value)
    assert trees.fingerprint(other)[:16] in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["dense", "scan"])
def test_first_values_depend_on_key_and_site_alone(method, kind):
    """Leaving out a site or a layer changes nothing for the others; another key changes what is drawn."""
    site, adapter, delta = started(method, kind)
    paths = [p for p in delta if trees.matches(site.weights, p)] or list(delta)
    draw = quick(lambda key: adapter.init(key, site.variables, site.sites))
    if kind == "dense":
        fewer = kinds.make(method, dataclasses.replace(site, weights=paths[-1]))
        rest = fewer.init(jax.random.key(0), site.variables, site.sites)
        assert paths[0] not in rest
        # (Compiled or not, a normal draw may differ in its last bit.)
        close(list(jax.tree_util.tree_leaves(rest[paths[-1]])), list(jax.tree_util.tree_leaves(delta[paths[-1]])), 1e-6)
    elif "layers" in lj.adapters.options(method):
        last = kinds.make(method, site, layers="last:1").init(jax.random.key(0), site.variables, site.sites)
        for whole, part in zip(*(jax.tree_util.tree_leaves(d[paths[0]]) for d in (delta, last)), strict=True):
            np.testing.assert_allclose(whole[-1], part[-1], rtol=1e-6)
    if method in ("lora", "chain"):
        assert furthest(draw(jax.random.key(7)), delta) > 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_learns(method):
    """The method drives the loss of a small problem on a frozen random network close to zero."""
    site, adapter, delta = on_dense(method)
    # What the method itself can reach: the network with a random delta.
    apply, tx = lj.lift(site.function), optax.adam(0.03)
    goal = quick(lambda d: apply(adapter.bind(site.variables, d), *site.args))(moved(adapter, delta, seed=5, size=0.1))
    mask = adapter.trainable(delta)

    def error(delta):
        return jnp.mean((apply(adapter.bind(site.variables, delta), *site.args) - goal) ** 2)

    @quick
    def train(delta):
        def step(carry, _):
            delta, state = carry
            value, grads = jax.value_and_grad(error)(delta)
            grads = jax.tree_util.tree_map(lambda on, g: g if on else 0 * g, mask, grads)
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(delta, updates), state), value

        return jax.lax.scan(step, (delta, tx.init(delta)), None, length=300)[1]

    losses = train(delta)
    assert losses[-1] < 0.1 * losses[0], f"from {losses[0]:.4f} to {losses[-1]:.4f}"


# Every option of every method changes something.

OTHER = {
    "rank": 3, "alpha": 1.0, "layers": "last:1", "dropout": 0.5, "targets": "layers_1/kernel",
    "feedforward": ".*_1/kernel", "decompose_factor": 4, "block_size": 2, "blocks": 2,
}  # fmt: skip
# What a knob needs beside it to matter on so small a weight.
WITH: dict[str, dict] = {"decompose_both": {"decompose_factor": 8}, "share_blocks": {"block_size": 4}}
IN_GRADIENTS = ("norm_gradient",)  # knobs that change nothing but gradients
# Of methods with a budget of ranks, on a run of 20 steps.
OTHER |= {"init_rank": 5, "beta": 0.2, "beta1": 0.2, "beta2": 0.2, "start": 1, "end": 18, "tinit": 5, "tfinal": 1}
OTHER |= {"interval": 2, "total_steps": 14}


def other_value(method, name, default):
    """A value that is not the one in use; of a choice between words the error message tells the others."""
    if name in OTHER:
        return OTHER[name]
    if isinstance(default, bool):
        return not default
    if isinstance(default, (int, float)):
        return default * 2 + 1
    with pytest.raises(lj.UserError, match="known: ") as caught:
        lj.adapters.get(method)(**{name: "no such word"})
    known = str(caught.value).partition("known: ")[2].rstrip(")").split(", ")
    return next(word for word in known if word != default)


KNOBS = [(m, name) for m in METHODS for name in lj.adapters.options(m)]


@pytest.mark.parametrize(("method", "knob"), KNOBS)
def test_every_knob_changes_something(method, knob):
    site = kinds.get("dense")
    usual = kinds.options_for(method, site) | WITH.get(knob, {})
    default = lj.adapters.options(method)[knob]

    def effect(options):
        """Start, shapes, and the output with everything that trains moved and the key given."""
        adapter = kinds.make(method, site, **options)
        delta = adapter.init(jax.random.key(0), site.variables, site.sites)
        shown = moved(adapter, delta)
        bound = lambda d: adapter.bind(site.variables, d, key=jax.random.key(1))  # noqa: E731
        apply = lj.lift(site.function)
        if knob in IN_GRADIENTS:
            return delta, list(jax.grad(lambda d: loss(apply(bound(d), *site.args)))(shown).values())
        return delta, apply(bound(shown), *site.args)

    other = usual | {knob: other_value(method, knob, default)}
    (start, out), (start_2, out_2) = effect(usual), effect(other)
    shapes = lambda tree: {p: [x.shape for x in jax.tree_util.tree_leaves(d)] for p, d in tree.items()}  # noqa: E731
    assert shapes(start) != shapes(start_2) or furthest(list(start.values()), list(start_2.values())) > 0 or (
        furthest(out, out_2) > 1e-3
    ) or furthest(trained(method, **usual), trained(method, **other)) > 1e-5  # fmt: skip


@functools.cache
def trained(method, **options):
    """What penalty and wrapped optimizer make of 20 updates with gradients that know nothing of the method, each."""
    site = kinds.get("dense")
    busy = {"interval": 3, "init_rank": 7, "end": 17}  # so that ranks are pruned often, and many
    options = {name: value for name, value in busy.items() if name in lj.adapters.options(method)} | options
    adapter = lj.adapters.for_steps(kinds.make(method, site, **options), 20)
    delta = moved(adapter, adapter.init(jax.random.key(0), site.variables, site.sites))
    tx = (adapter.wrap or (lambda tx: tx))(optax.sgd(0.05))
    penalty = jax.grad(adapter.penalty or (lambda delta: 0.0))

    @quick
    def run(delta, noise):
        def step(carry, noise):
            delta, state = carry
            grads = jax.tree_util.tree_map(jnp.add, penalty(delta), noise)
            updates, state = tx.update(grads, state, delta)
            delta = optax.apply_updates(delta, updates)
            return (delta, state), delta

        return jax.lax.scan(step, (delta, tx.init(delta)), noise)[1]

    return run(delta, noisy(jax.tree_util.tree_map(lambda x: jnp.zeros((20, *x.shape)), delta), 1.0, seed=3))


@pytest.mark.parametrize("method", [m for m in METHODS if "dropout" in lj.adapters.options(m)])
@pytest.mark.parametrize("kind", ["dense", "scan"])
def test_dropout(method, kind):
    site = kinds.get(kind)
    adapter = kinds.make(method, site, dropout=1 - 1e-9)
    delta = moved(adapter, started(method, kind)[2])

    def run(adapter, key):
        apply = lj.lift(site.function)
        return quick(lambda d, k: apply(adapter.bind(site.variables, d, key=k), *site.args))(delta, key)

    if method != "dora":  # its magnitude acts all the same
        close(run(adapter, jax.random.key(3)), base_output(kind), 1e-6, "all dropped")
    without = kinds.make(method, site, dropout=0.0)
    bits_equal(run(adapter, None), run(without, None))
    half = kinds.make(method, site, dropout=0.5)
    assert furthest(run(half, jax.random.key(3)), run(half, jax.random.key(4))) > 1e-3
    bits_equal(
        run(half, jax.random.key(3)), run(half, jax.random.wrap_key_data(jax.random.key_data(jax.random.key(3))))
    )
    bits_equal(run(half, jax.random.PRNGKey(3)), run(half, jax.random.key(3)))


def test_methods_are_found_by_folder(monkeypatch, tmp_path):
    """A file dropped into a folder of methods is a method, and this suite would try it."""
    (tmp_path / "twice.py").write_text(
        "from lora_jax.adapters.lora import lora\n\n\ndef twice(rank=2):\n    return lora(rank)\n"
    )
    monkeypatch.setattr(lj.adapters, "__path__", [*lj.adapters.__path__, str(tmp_path)])
    assert set(lj.methods()) == {*METHODS, *kinds.ELSEWHERE, "twice"}
    assert lj.adapters.get("twice")().spec["rank"] == 2 and lj.adapters.options("twice") == {"rank": 2}


def _data(tree):
    """Random keys as the numbers they are."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree_util.tree_map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def test_a_chain_is_its_members():
    site = kinds.get("dense")
    lora, full = lj.lora(2, targets="layers_0/kernel"), lj.full(targets="out/.*")
    chain = lj.chain(lora, lj.chain(full))
    delta = chain.init(jax.random.key(0), site.variables, site.sites)
    own = lora.init(jax.random.key(0), site.variables, site.sites)
    bits_equal(jax.tree_util.tree_leaves(delta["layers_0/kernel"]), jax.tree_util.tree_leaves(own["layers_0/kernel"]))
    assert {p: one.member for p, one in delta.items()} == {
        "layers_0/kernel": "0",
        "out/kernel": "1.0",
        "out/bias": "1.0",
    }
    whole = lj.lora(2, targets="layers_0/kernel", dropout=0.5)
    shown = {p: moved(whole, {p: one})[p] for p, one in own.items()}
    in_chain = {p: dataclasses.replace(one, member="1") for p, one in shown.items()}
    for given in ({"key": jax.random.key(3)}, {"scale": 0.25}):
        bound = whole.bind(site.variables, shown, **given)
        other = lj.chain(full, whole).bind(site.variables, in_chain, **given)
        bits_equal(jax.tree_util.tree_leaves(_data(other)), jax.tree_util.tree_leaves(_data(bound)))
    with pytest.raises(lj.UserError, match="two adapters of a chain select 'out/kernel'"):
        lj.chain(lj.lora(2, targets="out/kernel"), full).init(jax.random.key(0), site.variables, site.sites)
    with pytest.raises(lj.UserError, match=r"at 'layers_0/kernel' \(member ''\) is not of this chain of 2"):
        chain.bind(site.variables, own)
    with pytest.raises(lj.UserError, match="at least one adapter"):
        lj.chain()


def test_adapted_weights_nest():
    """Two adapters on one weight, bound one after the other, add up."""
    site = kinds.get("scan")
    adapter = kinds.make("lora", site)
    deltas = [moved(adapter, started("lora", "scan")[2], seed=s) for s in (1, 2)]
    bound = adapter.bind(adapter.bind(site.variables, deltas[0]), deltas[1])
    merged = adapter.merge(adapter.merge(site.variables, deltas[0]), deltas[1])
    close(quick(lj.lift(site.function))(bound, *site.args), quick(site.function)(merged, *site.args), 1e-5)


def test_delta_of_another_model_is_refused():
    site = kinds.get("dense")
    for method in METHODS:
        adapter, delta = started(method, "dense")[1:]
        smaller = jax.tree_util.tree_map(lambda x: x[(slice(4),) * x.ndim], site.variables)
        with pytest.raises(lj.UserError, match=r"does not fit the weight '\w+/\w+' of shape \(4,.*another base"):
            adapter.bind(smaller, delta)
        with pytest.raises(lj.UserError, match="the variables have no weight .* for another model"):
            adapter.bind({"params": {"layers_9": {"kernel": weights(8, 8)}}}, delta)
