"""No dW: neither FLOPs nor temporary memory of the backward hold a term of the size of the frozen weights.

Read from the compiled program. A forward pass costs 2 FLOPs per weight and token, the backward through frozen weights
as many, dW as many again: value and gradient of the delta must cost about 2 forward passes, with dW it would be 3.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj

LAYERS, BATCH, RANK = 4, 16, 2


def loop(v, x):
    for i in range(LAYERS):
        x = jnp.tanh(x @ v[f"layers_{i}"])
    return x


def remat_loop(v, x):
    for i in range(LAYERS):
        x = jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(v[f"layers_{i}"], x)
    return x


def scan(v, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, v["layers"])[0]


def remat_scan(v, x):
    step = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None), prevent_cse=False)
    return jax.lax.scan(step, x, v["layers"])[0]


def accumulated(v, x):
    """Microbatches one after the other; their gradients are summed in a scan."""
    return jax.lax.map(functools.partial(loop, v), x.reshape(4, BATCH // 4, -1))


def variables_for(function, size):
    if "scan" in function.__name__:
        return {"layers": jax.ShapeDtypeStruct((LAYERS, size, size), jnp.float32)}
    return {f"layers_{i}": jax.ShapeDtypeStruct((size, size), jnp.float32) for i in range(LAYERS)}


def compiled(function, size, of_base=False, form="lifted"):
    """The compiled value and gradient of the delta (or, to see it red, of the base) at one size."""
    variables, x = variables_for(function, size), jax.ShapeDtypeStruct((BATCH, size), jnp.float32)
    adapter = lj.lora(rank=RANK)
    sites = lj.find_sites(function, variables, x)
    delta = jax.eval_shape(lambda v: adapter.init(jax.random.key(0), v, sites), variables)
    apply = lj.lift(function)

    def loss(delta, variables, x):
        if form == "merged":
            return jnp.sum(function(adapter.merge(variables, delta), x))
        return jnp.sum(apply(adapter.bind(variables, delta), x))

    program = jax.value_and_grad(loss, argnums=1 if of_base else 0)
    return jax.jit(program).lower(delta, variables, x).compile()


def flops(program):
    cost = program.cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]


def temporaries(program):
    return program.memory_analysis().temp_size_in_bytes


def forward_flops(function, size):
    variables, x = variables_for(function, size), jax.ShapeDtypeStruct((BATCH, size), jnp.float32)
    return flops(jax.jit(function).lower(variables, x).compile())


def test_flops_of_a_step_are_two_forward_passes():
    ratio = flops(compiled(loop, 256)) / forward_flops(loop, 256)
    # The first layer's input needs no gradient: (4 + 3) / 4 passes; the rest are the factors.
    assert 1.7 < ratio < 2.0
    wrong = flops(compiled(loop, 256, form="merged")) / forward_flops(loop, 256)
    assert wrong > 2.5, "plain autodiff through merged weights forms dW: the measure would see it"


def test_flops_of_a_scanned_step():
    """XLA counts the body of a loop once, so a scan's forward and backward bodies weigh as one layer each."""
    assert flops(compiled(scan, 256)) / forward_flops(scan, 256) < 2.2
    assert flops(compiled(remat_scan, 256)) / forward_flops(scan, 256) < 3.2, "one more forward pass, no dW"


@pytest.mark.parametrize("function", [loop, remat_loop, scan, remat_scan, accumulated], ids=lambda f: f.__name__)
def test_memory_has_no_term_of_the_size_of_the_weights(function):
    """The batch is fixed: activations and factors grow with the size, weights with its square.

    A scan copies the layer at hand out of its stack, forward as well as backward: one layer, however many there are.
    """
    small, large = (temporaries(compiled(function, n)) for n in (256, 512))
    # What is proportional to the size cancels; of `c * size**2` half remains.
    quadratic = 2 * (large - 2 * small) / 512**2
    held = 4.0 if "scan" in function.__name__ else 0.0  # bytes of a float32
    assert abs(quadratic - held) < 0.3, f"{quadratic:.2f} bytes of temporaries for every element of one weight"


@pytest.mark.parametrize("function", [loop, scan], ids=lambda f: f.__name__)
def test_the_measure_sees_a_gradient_of_the_base(function):
    """Red on purpose: differentiate the base and both measures jump."""
    right, wrong = (compiled(function, 256, of_base=base) for base in (False, True))
    held = lambda p: temporaries(p) + p.memory_analysis().output_size_in_bytes  # noqa: E731
    assert held(wrong) - held(right) > 0.9 * 4 * LAYERS * 256**2
    assert flops(wrong) / flops(right) > 1.3
