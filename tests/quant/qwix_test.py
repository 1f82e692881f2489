"""Against qwix 0.1.8, another implementation: the same values where the two mean the same format."""

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import quant
from tests.lift.checks import weights

pytestmark = pytest.mark.peers
qwix = pytest.importorskip("qwix")


def ours(weight, name, **options):
    function = lambda v, x: x @ v["w"]  # noqa: E731
    sites = lj.find_sites(function, {"w": weight}, jnp.zeros((1, weight.shape[0])))
    return quant.dequantize(lj.quantize({"w": weight}, sites, name, **options))["w"]


def theirs(weight, kind, tiles):
    return qwix.dequantize(qwix.quantize(weight, kind, channelwise_axes=(1,), tiled_axes=tiles))


def test_nf4_in_blocks_is_theirs():
    weight = weights(256, 48)
    expected = theirs(weight, "nf4", {0: 64})
    got = ours(weight, "nf4", double=False)
    # A number half way between two levels may go to either.
    same = np.isclose(got, expected, rtol=1e-6, atol=0)
    assert same.mean() > 0.9999


@pytest.mark.parametrize(("name", "kind", "block"), [("int8", jnp.int8, None), ("int4", jnp.int4, 64)])
def test_integers_are_theirs_up_to_the_width_of_the_last_step(name, kind, block):
    """qwix scales by 127.5 and 7.5 steps and we by 127 and 7, so that the largest weight is kept: both round to the
    nearest multiple of their own step."""
    weight = weights(256, 48)
    most = 127 if name == "int8" else 7
    options = {"block": block, "double": False}
    expected, got = theirs(weight, kind, {} if block is None else {0: block}), ours(weight, name, **options)
    cut = np.asarray(weight).reshape(-1, block or 256, 48)
    step = np.repeat(np.abs(cut).max(1) / most, block or 256, axis=0)
    assert (np.abs(got - expected) <= 1.5 * step).all()
    assert (np.abs(got - weight) <= 0.5001 * step).all()
    error = [float(jnp.mean((x - weight) ** 2)) for x in (got, expected)]
    assert error[0] == pytest.approx(error[1], rel=0.15)
