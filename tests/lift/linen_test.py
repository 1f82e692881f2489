"""Unmodified Linen models, none of ours: what a user brings. Sites with their biases, lifted == merged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lora_jax as lj
from tests.lift.checks import axes, biases, bits_equal, check, close, noisy, variables_of, weights

LINEAR, STACKED = ((), (0,), (1,)), ((0,), (1,), (2,))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.gelu(nn.Dense(8, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(6, name="down")(h), None


class Loop(nn.Module):
    block: type = Block

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x, _ = self.block(name=f"layers_{i}")(x)
        return x


class Stack(nn.Module):
    block: type = Block
    axis: int = 0
    length: int = 3

    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(
            self.block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=self.length
        )
        return scanned(name="layers")(x, None)[0]


@pytest.mark.parametrize("block", [Block, nn.remat(Block)], ids=["loop", "remat"])
def test_loop(block):
    model, x = Loop(block), weights(5, 6)
    expect = {f"layers_{i}/{name}/kernel": LINEAR for i in range(2) for name in ("up", "down")}
    _, _, sites = check(model.apply, variables_of(model, x), x, expect=expect)
    assert biases(sites) == {path: path.replace("kernel", "bias") for path in expect}
    assert [sites[f"layers_{i}/up/kernel"].layer for i in range(2)] == [0, 1]
    assert sites["layers_0/LayerNorm_0/scale"].uses == ("elementwise",)


@pytest.mark.parametrize(
    ("block", "axis"),
    [
        (Block, 0),
        (nn.remat(Block, prevent_cse=False), 1),
        (nn.remat(Block, policy=jax.checkpoint_policies.dots_saveable), 0),
    ],
    ids=["scan", "scan over remat, axis 1", "scan over remat with a policy"],
)
def test_stack(block, axis):
    model, x = Stack(block, axis), weights(5, 6)
    variables = variables_of(model, x)
    expect = {f"layers/{name}/kernel": STACKED if axis == 0 else ((1,), (0,), (2,)) for name in ("up", "down")}
    _, _, sites = check(model.apply, variables, x, expect=expect)
    assert biases(sites) == {path: path.replace("kernel", "bias") for path in expect}
    assert all(site.layer_axis == axis and site.layers == (0, 1, 2) for site in sites.values())


def test_stack_of_one_layer():
    model, x = Stack(length=1), weights(5, 6)
    _, _, sites = check(model.apply, variables_of(model, x), x)
    assert axes(sites)["layers/up/kernel"] == STACKED


@pytest.mark.parametrize("axis", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_ranks_by_layer_equal_the_unrolled_model(axis):
    """A stack with ranks by layer computes what separate layers with those ranks compute."""
    stacked, unrolled, x = Stack(axis=axis, length=2), Loop(), weights(5, 6)
    variables = variables_of(stacked, x)
    adapter = lj.lora(rank=[(".*#0", 0), (".*up/kernel#1", 1), (".*", 2)])
    delta = adapter.init(jax.random.key(0), variables, lj.find_sites(stacked.apply, variables, x))
    live = {p: (np.arange(2) < np.reshape(one.ranks, (2, 1))) for p, one in delta.items()}
    delta = {
        p: dataclasses.replace(d, a=d.a * live[p][:, None, :], b=d.b * live[p][..., None])
        for p, d in noisy(delta).items()
    }
    out = lj.lift(stacked.apply)(adapter.bind(variables, delta), x)

    layer = lambda tree, i: jax.tree_util.tree_map(lambda w: w.take(i, axis), tree)  # noqa: E731
    apart = {"params": {f"layers_{i}": layer(variables["params"]["layers"], i) for i in range(2)}}
    rules = [("layers_1/up/kernel", 1), ("layers_1/.*", 2), (".*", 0)]
    single = lj.lora(rank=rules)
    own = single.init(jax.random.key(0), apart, lj.find_sites(unrolled.apply, apart, x))
    assert set(own) == {"layers_1/up/kernel", "layers_1/down/kernel"}
    own = {
        p: dataclasses.replace(
            one, a=delta[q := p.replace("_1", "")].a[1][:, : one.ranks[0]], b=delta[q].b[1][: one.ranks[0]]
        )
        for p, one in own.items()
    }
    close(out, lj.lift(unrolled.apply)(single.bind(apart, own), x), 1e-5)


def test_attention():
    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.MultiHeadDotProductAttention(num_heads=2, name="a")(x, x)

    x = weights(2, 5, 6)
    expect = {f"a/{n}/kernel": ((), (0,), (1, 2)) for n in ("query", "key", "value")} | {
        "a/out/kernel": ((), (0, 1), (2,))
    }
    _, _, sites = check(Attention().apply, variables_of(Attention(), x), x, expect=expect)
    assert biases(sites) == {path: path.replace("kernel", "bias") for path in expect}


def test_convolutions():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3), name="plain")(x))
            x = nn.Conv(8, (3, 3), strides=2, feature_group_count=4, name="grouped")(x)
            return nn.ConvTranspose(4, (2, 2), name="transposed")(x)

    x = weights(2, 8, 8, 4)
    expect = {f"{n}/kernel": ((), (0, 1, 2), (3,)) for n in ("plain", "grouped", "transposed")}
    _, _, sites = check(Net().apply, variables_of(Net(), x), x, expect=expect, grad_rtol=None)
    assert biases(sites) == {path: path.replace("kernel", "bias") for path in expect}


def test_tied_embedding():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            table = nn.Embed(9, 6, name="e")
            return table.attend(nn.Dense(6, name="d")(table(tokens)))

    tokens = jnp.array([[1, 2, 3], [4, 8, 0]])
    _, _, sites = check(
        Tied().apply, variables_of(Tied(), tokens), tokens, targets="e/embedding,d/kernel",
        expect={"e/embedding": LINEAR, "d/kernel": LINEAR},
    )  # fmt: skip
    assert sites["e/embedding"].uses == ("embedding", "linear")
    default = lj.lora(rank=1).init(jax.random.key(0), variables_of(Tied(), tokens), sites)
    assert set(default) == {"d/kernel"}, "an embedding is adapted only where it is asked for"


def test_experts():
    class Experts(nn.Module):
        shared_input: bool

        @nn.compact
        def __call__(self, x):
            axes = {"in_axes": None, "axis_size": 2} if self.shared_input else {"in_axes": 0}
            return nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, **axes)(4, name="e")(x)

    x = weights(2, 5, 6)
    for shared, expected in ((False, STACKED), (True, ((), (1,), (0, 2)))):
        model = Experts(shared)
        _, _, sites = check(model.apply, variables_of(model, x), x, expect={"e/kernel": expected})
        assert biases(sites) == {"e/kernel": "e/bias"}


def test_lstm_shares_its_bias_with_no_one_else():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.RNN(nn.LSTMCell(6), name="r")(x)

    x = weights(2, 5, 6)
    _, _, sites = check(Net().apply, variables_of(Net(), x), x, grad_rtol=None)
    assert len(axes(sites)) == 8 and sites["LSTMCell_0/ii/kernel"].bias is None


class Trained(nn.Module):
    """BatchNorm, dropout, a dict as output: collections, rngs and static flags."""

    @nn.compact
    def __call__(self, x, train: bool):
        h = nn.BatchNorm(use_running_average=not train)(nn.Dense(8, name="a")(x))
        h = nn.Dropout(0.5, deterministic=not train)(h)
        return {"out": nn.Dense(3, name="b")(h), "hidden": h, "none": None}


def test_collections_rngs_statics_and_dicts():
    x = weights(5, 6)
    variables = variables_of(Trained(), x, train=False)
    call = {"train": True, "mutable": ["batch_stats"]}
    apply = Trained().apply
    adapter, delta, sites = check(apply, variables, x, rngs={"dropout": jax.random.key(3)}, grad_rtol=None, **call)
    assert set(sites) == {"a/kernel", "a/bias", "b/kernel", "b/bias", "BatchNorm_0/scale", "BatchNorm_0/bias"}
    check(apply, variables, x, train=False)
    bound = adapter.bind(variables, delta)
    assert bound["batch_stats"] is not variables["params"] and set(bound) == {"params", "batch_stats"}
    bits_equal(bound["batch_stats"], variables["batch_stats"])
    lifted = lj.lift(apply)
    out, updates = lifted(bound, x, rngs={"dropout": jax.random.key(3)}, **call)
    assert set(updates) == {"batch_stats"} and out["none"] is None
    expected, _ = apply(adapter.merge(variables, delta), x, rngs={"dropout": jax.random.key(3)}, **call)
    close(out, expected, 1e-5)
    other, _ = lifted(bound, x, rngs={"dropout": jax.random.PRNGKey(4)}, **call)
    assert not np.allclose(out["hidden"], other["hidden"]), "the dropout key is data, not part of the trace"


def test_statics_that_are_equal_but_not_the_same():
    x, variables = weights(5, 6), {"w": weights(6, 6)}
    apply = lambda v, x, power: x @ v["w"] * (2.0 if power is True else 3.0)  # noqa: E731
    adapter = lj.lora(rank=2)
    delta = adapter.init(jax.random.key(0), variables, lj.find_sites(apply, variables, x, True))
    lifted, bound = lj.lift(apply), adapter.bind(variables, delta)
    np.testing.assert_allclose(3 * lifted(bound, x, True), 2 * lifted(bound, x, 1), rtol=1e-5)


def test_bf16_module():
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, dtype=jnp.bfloat16)(x)

    x = weights(5, 6)
    check(Half().apply, variables_of(Half(), x), x, rtol=2e-2, grad_rtol=2e-2)


def test_boxed_parameters_keep_their_names_and_boxes():
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
            return nn.Dense(4, kernel_init=init, name="d")(x)

    x = weights(5, 6)
    variables = variables_of(Boxed(), x)
    adapter, delta, _ = check(Boxed().apply, variables, x, expect={"d/kernel": LINEAR})
    merged = adapter.merge(variables, delta)
    assert isinstance(merged["params"]["d"]["kernel"], nn.Partitioned)


def test_weight_norm_needs_leave_and_says_where():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.WeightNorm(nn.Dense(4, name="d"))(x)

    x = weights(5, 6)
    variables = variables_of(Normed(), x)
    sites = lj.find_sites(Normed().apply, variables, x)
    with pytest.raises(lj.UserError, match="lora finds nothing to adapt by itself: no product .* any of the 3 weights"):
        lj.lora().init(jax.random.key(0), variables, sites)


def test_returned_weights_are_named():
    x = weights(5, 6)
    model = Loop()
    variables = variables_of(model, x)
    adapter = lj.lora(rank=2)
    bound = adapter.bind(
        variables, adapter.init(jax.random.key(0), variables, lj.find_sites(model.apply, variables, x))
    )
    with pytest.raises(lj.UserError, match='enters "the function\'s output"'):
        lj.lift(model.apply)(bound, x, mutable=True)
