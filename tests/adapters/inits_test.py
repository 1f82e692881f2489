"""LoRA's inits: what they start from, that the output starts as the base's, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import quant
from lora_jax.errors import UserError
from tests.adapters import kinds
from tests.lift.checks import close, furthest, weights

STARTS = ("pissa", "olora", "orthogonal")


def start(kind, init, rank=2, **options):
    site = kinds.get(kind)
    adapter = lj.lora(rank, 3, targets=site.weights, init=init, **options)
    return site, adapter, adapter.init(jax.random.key(0), site.variables, site.sites)


@pytest.mark.parametrize("kind", ["dense", "heads in", "conv", "embedding", "scan", "experts"])
@pytest.mark.parametrize("init", STARTS)
def test_starts_as_the_base_with_factors_that_are_not_zero(init, kind):
    site, adapter, delta = start(kind, init)
    assert all(float(jnp.abs(f).max()) > 1e-2 for one in delta.values() for f in (one.a, one.b))
    first = jax.jit(lambda v, d: lj.lift(site.function)(adapter.bind(v, d), *site.args))(site.variables, delta)
    close(first, site.function(site.variables, *site.args), 1e-5)
    close(adapter.merge(site.variables, delta), site.variables, 1e-5)


def test_pissa_is_the_principal_part():
    site, adapter, delta = start("dense", "pissa", rank=3)
    one = delta["layers_0/kernel"]
    u, s, vt = np.linalg.svd(np.float64(site.variables["params"]["layers_0"]["kernel"]))
    close(one.scales[0] * one.a @ one.b, ((u[:, :3] * s[:3]) @ vt[:3]).astype(np.float32), 1e-5)
    mask = adapter.trainable(delta)["layers_0/kernel"]
    assert mask.a and mask.b and not mask.a0 and not mask.b0


def test_olora_has_orthonormal_columns():
    one = start("dense", "olora", rank=3)[2]["layers_0/kernel"]
    close(one.b @ one.b.T, np.eye(3, dtype=np.float32), 1e-5)


def test_orthogonal_needs_an_even_rank():
    with pytest.raises(UserError, match=r"init='orthogonal' needs an even rank.*\[3\]"):
        start("dense", "orthogonal", rank=3)


def test_frozen_a_stays_frozen():
    adapter, delta = start("dense", "default", freeze_a=True)[1:]
    mask = adapter.trainable(delta)["layers_0/kernel"]
    assert mask.b and not mask.a


def mlp(v, x):
    return jnp.tanh(x @ v["layers_0"]["kernel"]) @ v["layers_1"]["kernel"]


VARIABLES = {"layers_0": {"kernel": weights(6, 5)}, "layers_1": {"kernel": weights(5, 6, seed=1)}}
# The first layer's input lies in two directions; the second's is spread by the nonlinearity.
X = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32) @ np.asarray(weights(2, 6, seed=2)) * 2


def test_input_moments_are_those_of_the_inputs():
    sites = lj.find_sites(mlp, VARIABLES, X)
    found = lj.input_moments(mlp, VARIABLES, sites, sites, X)
    hidden = np.tanh(X @ np.asarray(VARIABLES["layers_0"]["kernel"]))
    close(found, {"layers_0/kernel": X.T @ X, "layers_1/kernel": hidden.T @ hidden}, 1e-5)


def test_eva_starts_from_the_data_and_shares_out_the_ranks():
    sites = lj.find_sites(mlp, VARIABLES, X)
    moments = lj.input_moments(mlp, VARIABLES, sites, sites, X)
    adapter = lj.lora(3, 6, init="eva")
    delta = adapter.init(jax.random.key(0), VARIABLES, sites, batch=moments)
    ranks = {path: one.ranks[0] for path, one in delta.items()}
    assert sum(ranks.values()) == 6 and ranks["layers_0/kernel"] == 2, "two directions explain all of the first input"
    directions = np.asarray(delta["layers_0/kernel"].a)
    close(X @ directions @ directions.T, X, 1e-4)
    assert delta["layers_0/kernel"].scales == (6 / 2,)
    assert furthest(lj.lift(mlp)(adapter.bind(VARIABLES, delta), X), mlp(VARIABLES, X)) < 1e-6
    with pytest.raises(UserError, match=r"starts from the inputs of its sites: init\(..., batch=lj.input_moments"):
        adapter.init(jax.random.key(0), VARIABLES, sites)


def test_moments_inside_a_scan_are_refused():
    site = kinds.get("remat")
    with pytest.raises(UserError, match="cannot look inside a scan or a remat"):
        lj.input_moments(site.function, site.variables, site.sites, ["layers_0/dense/kernel"], *site.args)


def test_loftq_makes_up_for_quantization():
    """With one step the error left is that of the residual beyond the rank (singular values in its tail)."""
    variables = {"layers_0": {"kernel": weights(64, 32)}, "layers_1": {"kernel": weights(32, 64, seed=1)}}
    x = weights(3, 64, seed=2)
    sites = lj.find_sites(mlp, variables, x)
    small = lj.quantize(variables, sites, "nf4")
    lost = quant.residuals(variables, small)
    adapter = lj.lora(4, 6, init="loftq")
    delta = adapter.init(jax.random.key(0), small, sites, batch=lost)
    merged = adapter.merge(small, delta)
    for path, one in (("layers_0/kernel", "layers_0"), ("layers_1/kernel", "layers_1")):
        tail = np.linalg.svd(np.float64(lost[path]), compute_uv=False)[4:]
        left = np.linalg.norm(np.float64(merged[one]["kernel"]) - variables[one]["kernel"])
        np.testing.assert_allclose(left, np.linalg.norm(tail), rtol=1e-4)
    assert not adapter.starts_as_base
    with pytest.raises(UserError, match="starts from what quantization took away"):
        adapter.init(jax.random.key(0), small, sites)
