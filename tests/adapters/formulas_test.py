"""Methods against their formulas written out in numpy, on layers with and without a bias, in stacks and per head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

import lora_jax as lj
from lora_jax.errors import UserError
from tests.adapters import kinds
from tests.lift.checks import close, noisy, weights


def moved(adapter, delta, seed=0):
    mask = adapter.trainable(delta)
    return jax.tree.map(lambda on, new, old: new if on else old, mask, noisy(delta, 0.3, seed), delta)


def run(function, adapter, delta, variables, *args):
    return np.asarray(jax.jit(lambda v, d: lj.lift(function)(adapter.bind(v, d), *args))(variables, delta))


def gelu(x):
    return x * 0.5 * (1 + erf(x / np.sqrt(2)))


def layer(v, x):
    return x @ v["w"] + v["b"].reshape(1, -1) if "b" in v else x @ v["w"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("placement", ["houlsby", "parallel"])
def test_bottleneck(placement, bias):
    """y + s up(f(down(y))), with the bias inside y; parallel: fed with x."""
    variables = {"w": weights(6, 5)} | ({"b": weights(5, seed=3)} if bias else {})
    x = weights(4, 6, seed=2)
    sites = lj.find_sites(layer, variables, x)
    adapter = lj.bottleneck(3, placement=placement, scale=0.7)
    delta = moved(adapter, adapter.init(jax.random.key(0), variables, sites))
    one = jax.tree.map(np.float64, delta["w"])
    y = np.float64(layer(variables, x))
    fed, down = (np.float64(x), one.down_in) if placement == "parallel" else (y, one.down)
    expected = y + 0.7 * (gelu(fed @ down + one.down_bias) @ one.up + one.up_bias)
    close(run(layer, adapter, delta, variables, x), expected.astype(np.float32), 1e-5)


def test_bottleneck_in_a_stack_and_per_head():
    """A scanned layer's network is its own layer's; a (D, H, Dh) layer's output is flattened over heads."""
    for kind, path in (("scan", "layers/dense/kernel"), ("heads out", "in_0/kernel")):
        site = kinds.get(kind)
        adapter = lj.bottleneck(3, targets=path)
        delta = moved(adapter, adapter.init(jax.random.key(0), site.variables, site.sites))
        p, x = jax.tree.map(np.float64, site.variables["params"]), np.float64(site.args[0])
        one = jax.tree.map(np.float64, delta[path])
        if kind == "scan":
            for i in range(2):
                y = x @ p["layers"]["dense"]["kernel"][i] + p["layers"]["dense"]["bias"][i]
                x = x + np.tanh(y + gelu(y @ one.down[i] + one.down_bias[i]) @ one.up[i] + one.up_bias[i])
            expected = x @ p["out"]["kernel"] + p["out"]["bias"]
        else:
            y = np.einsum("btd,dhk->bthk", x, p["in_0"]["kernel"]) + p["in_0"]["bias"]
            hidden = gelu(np.einsum("bthk,hks->bts", y, one.down) + one.down_bias)
            y = np.tanh(y + np.einsum("bts,shk->bthk", hidden, one.up) + one.up_bias)
            y = np.einsum("bthk,hkd->btd", y, p["back_1"]["kernel"]) + p["back_1"]["bias"]
            expected = np.tanh(y) @ p["out"]["kernel"]
        close(run(site.function, adapter, delta, site.variables, *site.args), expected.astype(np.float32), 1e-5)


def test_what_bottleneck_cannot_do():
    site = kinds.get("dense")
    adapter = lj.bottleneck(3)
    delta = adapter.init(jax.random.key(0), site.variables, site.sites)
    with pytest.raises(UserError, match="acts on the layer's output and has no dense value"):
        adapter.merge(site.variables, delta)
    table = kinds.get("embedding")
    with pytest.raises(UserError, match="'layers_0/embedding' is used as embedding. Leave it out"):
        lj.bottleneck(3, targets=table.weights).init(jax.random.key(0), table.variables, table.sites)
    with pytest.raises(UserError, match="placement='pfeifer' is unknown; did you mean 'pfeiffer'"):
        lj.bottleneck(3, placement="pfeifer")
    with pytest.raises(UserError, match="size=0: expected a whole number"):
        lj.bottleneck(0)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("bottleneck", {"std": -1}, "bottleneck: std=-1: expected a number of at least 0"),
        ("bottleneck", {"scale": "x"}, "bottleneck: scale='x': expected a number"),
        ("vera", {"d_initial": "x"}, "vera: d_initial='x': expected a number"),
        ("ia3", {"feedforward": 3}, "targets must be patterns (strings), got 3"),
    ],
)
def test_options_of_a_wrong_kind(method, options, message):
    site = kinds.get("dense")
    with pytest.raises(UserError) as caught:
        lj.adapters.get(method)(**options).init(jax.random.key(0), site.variables, site.sites)
    assert message in str(caught.value)


@pytest.mark.parametrize("placement, sites_a_layer", [("houlsby", 2), ("pfeiffer", 1), ("parallel", 1)])
def test_bottleneck_parameters_of_a_transformer(placement, sites_a_layer):
    """2 m d + d + m a network (Houlsby et al., section 2.1), two or one a layer."""
    base = lj.from_config({
        "model_type": "bert", "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 16, "type_vocab_size": 2,
    })  # fmt: skip
    adapter, m, d = lj.bottleneck(5, placement=placement), 5, 16
    delta = adapter.init(jax.random.key(0), base.variables, base.sites)
    a_network = m * 24 + m * d + d + m if placement == "parallel" else 2 * m * d + d + m
    assert sum(x.size for x in jax.tree.leaves(delta)) == 2 * sites_a_layer * a_network


def test_bitfit_gives_a_bias_to_a_model_without_any():
    variables, x = {"w": weights(6, 5), "v": weights(5, 4, seed=1)}, weights(3, 6, seed=2)
    function = lambda v, x: jnp.tanh(x @ v["w"]) @ v["v"]  # noqa: E731
    sites = lj.find_sites(function, variables, x)
    adapter = lj.bitfit()
    delta = moved(adapter, adapter.init(jax.random.key(0), variables, sites))
    assert set(delta) == {"w", "v"}
    x_, w, v, new_w, new_v = map(np.asarray, (x, variables["w"], variables["v"], delta["w"].value, delta["v"].value))
    expected = np.tanh(x_ @ w + new_w) @ v + new_v
    close(run(function, adapter, delta, variables, x), np.asarray(expected), 1e-5)
    with pytest.raises(UserError, match="no dense value"):
        adapter.merge(variables, delta)
    site = kinds.get("experts")  # one bias an expert
    adapter = lj.bitfit(targets=site.weights)
    delta = moved(adapter, adapter.init(jax.random.key(0), site.variables, site.sites))
    bias = np.asarray(delta["layers_0/down"].value)
    hidden = np.tanh(np.einsum("btd,edf->ebtf", site.args[0], site.variables["layers_0"]["up"]))
    back = np.einsum("ebtf,efd->ebtd", hidden, site.variables["layers_0"]["down"]) + bias[:, None, None]
    gate = jax.nn.softmax(site.args[0] @ site.variables["out"]["kernel"][:, :2])
    expected = np.einsum("bte,ebtd->btd", gate, back).astype(np.float32)
    close(run(site.function, adapter, delta, site.variables, *site.args), expected, 1e-5)


def test_dora_is_magnitude_times_direction():
    variables, x = {"w": weights(6, 5), "b": weights(5, seed=3)}, weights(4, 6, seed=2)
    sites = lj.find_sites(layer, variables, x)
    adapter = lj.dora(2, 3)
    delta = moved(adapter, adapter.init(jax.random.key(0), variables, sites))
    one = jax.tree.map(np.float64, delta["w"])
    whole = np.float64(variables["w"]) + 1.5 * one.a @ one.b
    direction = whole / np.linalg.norm(whole, axis=0)
    expected = np.float64(x) @ (one.magnitude * direction) + np.float64(variables["b"])
    close(run(layer, adapter, delta, variables, x), np.asarray(expected, np.float32), 1e-5)
    assert adapter.trainable(delta)["w"].norm2 is False, "the norm of the frozen weight is stored, not trained"


def test_dora_leaves_out_layers_of_a_stack_whole():
    """A layer that is left out keeps its weight, whatever becomes of the magnitude stored for it."""
    site = kinds.get("scan")
    adapter = lj.dora(2, targets=site.weights, layers="last:1")
    delta = moved(adapter, adapter.init(jax.random.key(0), site.variables, site.sites))
    merged = adapter.merge(site.variables, delta)["params"]["layers"]["dense"]["kernel"]
    kernel = site.variables["params"]["layers"]["dense"]["kernel"]
    np.testing.assert_array_equal(merged[0], kernel[0])
    assert np.abs(merged[1] - kernel[1]).max() > 1e-2


def test_ia3_rescales_the_output_with_its_bias_or_the_input():
    variables, x = {"w": weights(6, 5), "b": weights(5, seed=3)}, weights(4, 6, seed=2)
    sites = lj.find_sites(layer, variables, x)
    for feedforward in ("none", "w"):
        adapter = lj.ia3(targets="w", feedforward=feedforward)
        delta = moved(adapter, adapter.init(jax.random.key(0), variables, sites))
        one = delta["w"]
        y = np.asarray(layer(variables, x))
        expected = y * one.out[None] if feedforward == "none" else layer(variables, x * one.into[None])
        close(run(layer, adapter, delta, variables, x), np.asarray(expected), 1e-5)
        close(layer(adapter.merge(variables, delta), x), np.asarray(expected), 1e-5)


def test_ia3_and_a_trained_bias_in_one_chain():
    """Both orders: the trained bias stands in for the frozen one, and is rescaled."""
    variables, x = {"w": weights(6, 5), "b": weights(5, seed=3)}, weights(4, 6, seed=2)
    sites = lj.find_sites(layer, variables, x)
    parts = lj.ia3(targets="w", feedforward="none"), lj.bitfit()
    for pair in (parts, parts[::-1]):
        chain = lj.chain(*pair)
        delta = moved(chain, chain.init(jax.random.key(0), variables, sites))
        expected = (np.asarray(x @ variables["w"]) + np.asarray(delta["b"].value)) * np.asarray(delta["w"].out)
        close(run(layer, chain, delta, variables, x), np.asarray(expected), 1e-5)


def test_vera_shares_its_projections():
    site = kinds.get("dense")
    adapter = lj.vera(4)
    delta = moved(adapter, adapter.init(jax.random.key(0), site.variables, site.sites))
    shared, one = delta["@vera"], delta["layers_1/kernel"]
    update = (shared.a * one.lambda_d[None]) @ shared.b * one.lambda_b[None]
    merged = adapter.merge(site.variables, delta)["params"]["layers_1"]["kernel"]
    close(merged - site.variables["params"]["layers_1"]["kernel"], np.asarray(update), 1e-5)
    mask = adapter.trainable(delta)
    assert not mask["@vera"].a and not mask["@vera"].b and mask["layers_1/kernel"].lambda_d
    both = lj.chain(lj.vera(4, targets="layers_0/kernel"), lj.vera(3, targets="layers_1/kernel"))
    start = both.init(jax.random.key(0), site.variables, site.sites)
    assert {p: start[p].a.shape for p in start if p.startswith("@")} == {"@0:vera": (8, 4), "@1:vera": (8, 3)}
