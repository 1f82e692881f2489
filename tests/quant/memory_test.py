"""What a product with a quantized weight holds and computes, read from the compiled program.

One weight is dense at a time, forward and backward; nothing of the size of the weights is kept between the two, and no
gradient of a weight is formed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import quant
from tests.lift.no_dw_test import BATCH, LAYERS, flops, forward_flops, loop, remat_loop, remat_scan, scan, temporaries


def compiled(function, size, quantized=True, backward=True):
    """Value, or value and gradient of the delta, of lora over nf4 or over its dense values."""
    draw = np.random.default_rng(0).normal(size=(LAYERS, size, size)).astype(np.float32)
    stacked = "scan" in function.__name__
    variables = {"layers": draw} if stacked else {f"layers_{i}": draw[i] for i in range(LAYERS)}
    x = jax.ShapeDtypeStruct((BATCH, size), jnp.float32)
    sites = lj.find_sites(function, variables, x)
    variables = lj.quantize(variables, sites, "nf4") if quantized else variables
    adapter, apply = lj.lora(rank=2), lj.lift(function)
    delta = jax.eval_shape(lambda v: adapter.init(jax.random.key(0), v, sites), variables)

    def loss(delta, variables, x):
        return jnp.sum(apply(adapter.bind(variables, delta), x))

    return jax.jit(jax.value_and_grad(loss) if backward else loss).lower(delta, variables, x).compile()


# In layers of float32, activations included. Measured: forward 1.1, backward 1.25 (loop), 2.5 (remat), 1.5 (scan); and
# all of them where nothing ties the weights to the activations.
@pytest.mark.parametrize(
    ("function", "backward", "most"),
    [(loop, False, 1.3), (loop, True, 1.5), (remat_loop, True, 2.6), (scan, True, 1.8), (remat_scan, True, 1.8)],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_one_layer_is_dense_at_a_time(function, backward, most):
    size = 512
    held = temporaries(compiled(function, size, backward=backward)) / (4 * size**2)
    assert held < most, f"{held:.2f} dense layers of {LAYERS} held at once"


def test_no_gradient_of_a_weight_is_formed():
    """Two forward passes and what reading the weights costs, a few operations for each of them."""
    size = 256
    given = flops(compiled(loop, size)) / forward_flops(loop, size)
    dense = flops(compiled(loop, size, quantized=False)) / forward_flops(loop, size)
    # Reading: some 4 operations an entry and pass, against 2 * 16 of the product.
    assert dense < 2.0 and given < dense + 2 * 5 / (2 * BATCH)


def test_the_packed_weights_are_what_the_program_takes():
    size = 256
    arguments = lambda quantized: compiled(loop, size, quantized).memory_analysis().argument_size_in_bytes  # noqa: E731
    saved = arguments(False) - arguments(True)
    assert saved == pytest.approx(LAYERS * size**2 * (32 - 4.13) / 8, rel=1e-3)


def test_only_packed_arrays_go_from_forward_to_backward():
    """The residuals of the derivative rule, by their shapes: not the activation, not the dense weight."""
    variables = {"w": np.ones((64, 48), np.float32)}
    sites = lj.find_sites(lambda v, x: x @ v["w"], variables, jnp.zeros((5, 64)))
    small = lj.quantize(variables, sites, "nf4")
    back = jax.vjp(lambda x: lj.lift(lambda v, x: x @ v["w"])(small, x), jnp.ones((5, 64)))[1]
    kept = {x.shape for x in jax.tree.leaves(back) if hasattr(x, "shape")}
    assert kept <= {x.shape for x in small["w"].arrays().values()} | {(), (5, 48)}
    assert quant.bits_per_weight(small["w"]) < 5
