"""What a step keeps for its backward pass: less than without, for no more products and no more draws."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj
from experiments.benchmarks import llama, measure
from lora_jax import recompute

MODEL = {**llama.TOY, "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 176}


def compiled(monkeypatch, off=False, **more):
    given = {"model": MODEL, "batch": 4, "length": 32, "rank": 2, "dtype": "float32", **more}
    with monkeypatch.context() as patch:
        if off:
            patch.setattr(recompute, "between_products", lambda function: function)
        work = llama.work(given)
        step, state = llama.stepper(work)
        return step.lower(state, work.base.variables, work.batches[0]).compile()


@pytest.mark.parametrize(("quant", "share"), [("", 0.7), ("nf4", 0.85)])
def test_less_memory_for_the_same_products(monkeypatch, quant, share):
    ours, all_kept = (compiled(monkeypatch, off, quant=quant) for off in (False, True))
    assert measure.temporaries(ours) < share * measure.temporaries(all_kept)
    # XLA counts what is computed again between the products, of which there is much in so small a model.
    assert measure.flops(ours) < 1.06 * measure.flops(all_kept)


def test_who_asks_for_remat_gets_it(monkeypatch):
    """Around it nothing is kept that it gave up, and nothing is computed three times."""
    ours, alone = (compiled(monkeypatch, off, remat=True) for off in (False, True))
    assert measure.flops(ours) == measure.flops(alone)
    assert measure.temporaries(ours) == measure.temporaries(alone) < 0.85 * measure.temporaries(compiled(monkeypatch))


def test_no_merged_weight_waits_to_be_computed_again():
    """What a layer more takes under remat is its input and its factors, not its merged weights."""

    def taken(layers):
        model = {**MODEL, "num_hidden_layers": layers}
        work = llama.work({"model": model, "batch": 1, "length": 8, "rank": 2, "dtype": "float32", "remat": True})
        step, state = llama.stepper(work, form="merged")
        return measure.temporaries(step.lower(state, work.base.variables, work.batches[0]).compile())

    weights = 4 * (4 * 64 * 64 + 3 * 64 * 176)
    assert taken(8) - taken(4) < 4 * 0.25 * weights


def test_scores_of_long_attention_are_not_kept(monkeypatch):
    long = {"model": {**MODEL, "max_position_embeddings": 1024}, "length": 600}
    ours, all_kept = (compiled(monkeypatch, off, **long) for off in (False, True))
    assert measure.temporaries(ours) < 0.85 * measure.temporaries(all_kept)
    assert measure.flops(ours) < 1.06 * measure.flops(all_kept)


def test_nothing_is_drawn_twice():
    def function(x, key):
        return jnp.sum(jnp.where(jax.random.bernoulli(key, 0.5, x.shape), jnp.sin(x @ x), 0.0))

    def draws(f):
        return str(jax.make_jaxpr(jax.grad(f))(jnp.ones((4, 4)), jax.random.key(0))).count("random_bits[")

    assert draws(recompute.between_products(function)) == draws(function) == 1
    assert draws(jax.checkpoint(function)) == 2, "the measure sees a second draw"


PROGRAM = """
import ctypes, sys
import jax
from lora_jax import recompute

def held():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmRSS:")) // 1024

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks = [libc.malloc(60_000) for _ in range(4000)]
for block in blocks:
    ctypes.memset(block, 1, 60_000)
for block in blocks[:-1]:  # the last one holds the end of the heap where it is
    libc.free(block)
full = held()
recompute.trim_after_compiling()
recompute.trim_after_compiling()
jax.monitoring.record_event_duration_secs(recompute.COMPILED, 0.1)
print(full - held())
jax.monitoring.record_event_duration_secs(recompute.COMPILED, 2.0)
print(full - held())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_what_a_compiler_leaves_behind_is_given_back():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    short, long = map(int, done.stdout.split())
    assert short < 20 and long > 150, "megabytes, of 240"


def test_the_event_is_the_one_that_jax_sends():
    seen = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, duration_secs, **_: seen.append(event))
    jax.jit(lambda x: jnp.sin(x) + 0.1234567)(jnp.ones(3))
    assert recompute.COMPILED in seen


def test_the_rotation_is_computed_once_for_all_layers():
    base = lj.from_config(MODEL)
    tokens = jnp.ones((2, 8), jnp.int32)
    program = jax.jit(base.apply).lower(base.variables, tokens).compile().as_text()
    assert program.count("cosine(") == 1, "XLA would compute it anew in every layer"
