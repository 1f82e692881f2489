"""The kernels against the plain attention, on a CPU: numbers, masks, derivatives, transforms, fallbacks, programs.

No accelerator was at hand, so no kernel has run as compiled for one. Splash runs in Pallas's interpreter: the very
kernel, without its compiler. cuDNN cannot: what is shown is that its call, with these masks and layouts, means the same
(JAX's own implementation of that call is taken), and that programs lowered for CUDA and TPU hold the kernels.
"""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import recompute, sharding
from lora_jax.lift import split
from lora_jax.models import attention, kernels, masks

KERNELS = ("splash", "cudnn")
GPU = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
TPU = types.SimpleNamespace(platform="tpu")
ROWS, LENGTH = 2, 300  # two blocks and a part
SEGMENTS = np.array([[1] * 60 + [2] * 170 + [3] * 45 + [0] * 25, [1] * 280 + [2] * 6 + [0] * 14])
PADDED = np.array([[0] * 9 + [1] * 291, [1] * 140 + [0] * 160])  # on the left, on the right
LLAMA = {
    "model_type": "mistral", "vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "attention_dropout": 0.1,
}  # fmt: skip
BERT = {
    "model_type": "bert", "vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 512, "type_vocab_size": 2,
}  # fmt: skip
MODELS = {"llama": LLAMA, "bert": BERT}
# Compiling is most of what these tests cost, and each program runs once.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture
def taking(monkeypatch):
    """A function after which every model takes one kernel, wherever it may. It returns a list that counts the calls."""
    attend = kernels.attend

    def take(kernel):
        calls = []
        monkeypatch.setattr(kernels, "kernel_for", lambda *_: kernel)
        monkeypatch.setattr(kernels, "attend", lambda *args: calls.append(kernel) or attend(*args))
        return calls

    return take


def arrays(dtype="float32", heads=4, kv_heads=2, size=8):
    rng = np.random.default_rng(0)
    shapes = (ROWS, LENGTH, heads, size), (ROWS, kv_heads, LENGTH, size), (ROWS, kv_heads, LENGTH, size)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def close(found, expected, tolerance):
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


CASES = {
    "packed, causal": {"segments_BxT": SEGMENTS, "causal": True},
    "packed": {"segments_BxT": SEGMENTS},
    "padded, causal": {"key_mask_BxT": PADDED, "causal": True},
    "packed and a window": {"segments_BxT": SEGMENTS, "causal": True, "window": 7},
    "causal": {"causal": True},
    "a window": {"causal": True, "window": 7},
    "all": {},
}


@pytest.mark.parametrize(("kernel", "case"), [*itertools.product(KERNELS, CASES), ("plain", "packed, causal")])
def test_a_kernel_is_the_plain_attention(kernel, case):
    """Real tokens: outputs and gradients. Padding: finite numbers, and nothing of it reaches a real token."""
    given = {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in CASES[case].items()}
    real = next((x > 0 for x in given.values() if isinstance(x, jax.Array)), jnp.ones((ROWS, LENGTH), bool))

    def run(kernel, *qkv):
        out = attention.attend(*qkv, masks.among(LENGTH, kernel, **given))
        return jnp.sum(jnp.where(real[..., None], jnp.sin(out), 0)), out

    both = [jit(jax.value_and_grad(run, (1, 2, 3), has_aux=True), static_argnums=0) for _ in range(2)]
    ((_, found), d_found), ((_, expected), d_expected) = both[0](kernel, *arrays()), both[1](None, *arrays())
    close(found, jnp.where(real[..., None], expected, found), 1e-5)
    for one, other in zip(d_found, d_expected, strict=True):
        close(one, other, 1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_in_bfloat16(kernel):
    """As near to the plain attention in float32 as the plain one in bfloat16, about."""

    @functools.partial(jit, static_argnums=0)
    def run(kernel, *qkv):
        return attention.attend(*qkv, masks.among(LENGTH, kernel, segments_BxT=jnp.asarray(SEGMENTS), causal=True))

    out = run(kernel, *arrays("bfloat16", size=16))
    assert out.dtype == jnp.bfloat16
    close(out, run(None, *arrays("float32", size=16)), 1e-2)


def packed(base):
    """An adapter, its parameters, which change the output, and packed rows."""
    tokens, rng = jnp.asarray(np.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % 23), np.random.default_rng(0)
    adapter = lj.lora(rank=2)
    start = jax.eval_shape(lambda: adapter.init(jax.random.key(1), base.variables, base.sites))
    delta = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), start)
    return adapter, delta, {"tokens": tokens, "segment_ids": jnp.asarray(SEGMENTS)}


def measured(base, inputs, real=SEGMENTS > 0, **more):
    """A function of adapted variables: a loss over real tokens, and the output there."""

    def loss(variables):
        out = lj.lift(base.apply, form="factored")(variables, **inputs, **more)
        out = jnp.where(jnp.asarray(real)[..., None], out, 0)
        return jnp.sum(jnp.sin(out)), out

    return loss


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", MODELS)
def test_a_whole_adapted_model_with_packed_rows(taking, name, kernel):
    """Lifted LoRA: output and gradients; Llama with a sliding window, and once with layers that are computed again."""
    raw = MODELS[name] | ({"sliding_window": 50} if name == "llama" else {})
    base = lj.from_config(raw, remat=kernel == "cudnn")
    adapter, delta, inputs = packed(base)
    found = []
    for taken in (None, kernel):
        calls = taking(taken)
        loss = measured(base, inputs)
        step = jit(jax.value_and_grad(lambda d, f=loss: f(adapter.bind(base.variables, d)), has_aux=True))
        found.append(step(delta))
    jax.tree.map(lambda one, other: close(one, other, 1e-3), found[1], found[0])
    assert calls


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_pack_of_arms(taking, kernel):
    """`vmap` over adapters of q alone: in the first layer keys, values and masks have no axis over the arms."""
    base = lj.from_config(LLAMA)
    inputs = packed(base)[2]
    adapter = lj.lora(rank=2, targets="q")
    start = adapter.init(jax.random.key(0), base.variables, base.sites)
    deltas = [jax.tree.map(lambda x, i=i: x + i, start) for i in (0.1, 0.2, 0.3)]
    step = lambda d: jax.value_and_grad(lambda d: measured(base, inputs)(adapter.bind(base.variables, d))[0])(d)  # noqa: E731
    taking(None)
    alone = jit(lambda d: step(d))
    expected = [alone(delta) for delta in deltas]
    calls = taking(kernel)
    found = jit(jax.vmap(step))(jax.tree.map(lambda *x: jnp.stack(x), *deltas))
    jax.tree.map(lambda one, *other: close(one, np.stack(other), 1e-3), found, *expected)
    assert calls


@pytest.mark.parametrize("what", ["dropout", "virtual tokens", "cache"])
def test_what_no_kernel_does_is_plain(taking, what):
    base = lj.from_config(LLAMA)
    inputs = packed(base)[2]
    variables, more = base.variables, {}
    if what == "dropout":
        more = {"dropout_key": jax.random.key(3)}
    elif what == "virtual tokens":
        adapter = lj.prefix(length=3, hidden=0)
        variables = adapter.bind(variables, adapter.init(jax.random.key(1), variables, base.sites))
    else:
        inputs = {"tokens": inputs["tokens"]}
        more = {"cache": base.init_cache(ROWS, LENGTH)}
    run = lambda: jax.tree.leaves(jit(lj.lift(base.apply))(variables, **inputs, **more))[0]  # noqa: E731
    expected = run()
    calls = taking("splash")
    np.testing.assert_array_equal(run(), expected)
    assert not calls


def test_a_classifier_pools_by_the_plain_attention(taking):
    """The last layer of BERT asks for few queries; the others take the kernel."""
    base = lj.from_config(BERT | {"num_hidden_layers": 2}, num_labels=3, dropout=0.0)
    inputs = packed(base)[2]
    inputs["pool_at"] = jnp.asarray([[0, 60, 230], [0, 280, 0]])
    run = lambda: jit(lambda variables: base.apply(variables, **inputs))(base.variables)  # noqa: E731
    expected = run()
    calls = taking("cudnn")
    close(run(), expected, 1e-4)
    assert len(calls) == 1


def test_one_split_serves_lengths_with_and_without_a_kernel(monkeypatch):
    """What lies below an adapter is computed once for rows of all lengths, so their traces have the same steps."""
    monkeypatch.setattr(kernels, "kernel_for", lambda _, dtype, length, size: "cudnn" if length > 8 else "plain")
    base = lj.from_config(LLAMA | {"num_hidden_layers": 2})
    paths = [path for path in base.sites if "layers_1" in path]
    inputs = packed(base)[2]
    short = {key: array[:, :8] for key, array in inputs.items()}
    parts = split(base.apply, base.variables, paths, **short)
    for given in (short, inputs):
        both = jit(lambda v, x: (parts.suffix(v, parts.prefix(v, **x), **x), base.apply(v, **x)))
        close(*both(base.variables, given), 1e-5)


@pytest.mark.parametrize(
    ("device", "dtype", "length", "head_dim", "expected"),
    [
        (TPU, "bfloat16", 512, 64, "splash"),
        (TPU, "float32", 130, 80, "splash"),
        (TPU, "float32", 127, 64, "plain"),
        (TPU, "float16", 512, 64, "plain"),
        (GPU, "bfloat16", 512, 256, "cudnn"),
        (GPU, "float16", 130, 64, "cudnn"),
        (GPU, "float32", 512, 64, "plain"),
        (GPU, "bfloat16", 131, 64, "plain"),
        (GPU, "bfloat16", 512, 60, "plain"),
        (types.SimpleNamespace(platform="gpu", compute_capability="8.6"), "bfloat16", 512, 256, "plain"),
        (types.SimpleNamespace(platform="gpu", compute_capability="7.5"), "bfloat16", 512, 64, "plain"),
        (types.SimpleNamespace(platform="gpu", compute_capability="gfx942"), "bfloat16", 512, 64, "plain"),
        (types.SimpleNamespace(platform="cpu"), "bfloat16", 512, 64, None),
        (None, "bfloat16", 512, 64, None),
    ],
)
def test_the_choice(device, dtype, length, head_dim, expected):
    assert kernels.kernel_for(device, jnp.dtype(dtype), length, head_dim) == expected


def test_the_device_that_a_program_is_for():
    first, second = jax.devices()[:2]
    assert kernels.device() == first
    with sharding.use(sharding.make_mesh(data=2)):
        assert kernels.device() is None, "no kernel is split over devices"
    with jax.default_device(second):
        assert kernels.device() == second


def test_a_lifted_function_is_traced_anew_for_another_device():
    traced = []
    double = lj.lift(lambda variables, x: traced.append(kernels.device()) or x @ variables["params"]["w"])
    variables, x = {"params": {"w": jnp.ones((4, 4))}}, jnp.ones((2, 4))
    adapter = lj.lora(rank=1)
    sites = lj.find_sites(lambda variables, x: x @ variables["params"]["w"], variables, x)
    bound = adapter.bind(variables, adapter.init(jax.random.key(0), variables, sites))
    second = jax.devices()[1]
    for _ in range(2):
        double(bound, x)
        with jax.default_device(second):
            double(bound, x)
    assert traced == [jax.devices()[0], second]


@pytest.fixture
def program(monkeypatch):
    """`(device, wrap) -> (loss of a Llama on packed rows, its arguments)`, to be traced as on that device."""
    # Only what asks for cuDNN's version: a CPU has none. Private, since nothing else stands between here and the call.
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)

    def make(device, wrap):
        monkeypatch.setattr(kernels, "device", lambda: device)
        base = lj.from_config(LLAMA | {"num_hidden_layers": 2, "hidden_size": 32}, dtype="bfloat16")
        adapter, delta, inputs = packed(base)
        loss = lambda d, base_: measured(base, inputs)(adapter.bind(base_, d))[0].astype(jnp.float32)  # noqa: E731
        return wrap(loss), (delta, base.variables)

    return make


def gradient(loss, arguments):
    return jax.jit(jax.grad(loss)).trace(*arguments)


def test_a_program_for_cuda_calls_cudnn(program):
    """Two layers: forward, forward again, backward. The mask is one for all heads; no head has scores."""
    text = gradient(*program(GPU, recompute.between_products)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaScaleBiasSoftmax(") == 4
    assert text.count("@__cudnn$fmhaScaleBiasSoftmaxBackward(") == 2
    assert f"<{ROWS}x1x{LENGTH}x{LENGTH}xbf16>" in text, "the packing mask"
    assert f"x4x{LENGTH}x{LENGTH}x" not in text and f"x2x2x{LENGTH}x{LENGTH}x" not in text


def test_a_pack_for_cuda_is_one_longer_batch(program):
    """By JAX's own rule for `vmap` (0.10.2) rows of all arms would meet a mask of one arm's rows, without an error."""
    loss, (delta, base) = program(GPU, recompute.between_products)
    arms = jax.tree.map(lambda x: jnp.stack([x] * 3), delta)
    together = lambda arms, base: jnp.sum(jax.vmap(loss, (0, None))(arms, base))  # noqa: E731
    text = gradient(together, (arms, base)).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "@__cudnn$" in line]
    assert len(calls) == 6 and all(f"<{3 * ROWS}x1x{LENGTH}x{LENGTH}xbf16>" in line for line in calls)


def test_a_program_for_a_tpu_calls_splash(program):
    """One kernel each for output, d keys and values, d queries; segments go in, and no (T, T) array is anywhere."""
    text = gradient(*program(TPU, recompute.between_products)).lower(lowering_platforms=("tpu",)).as_text()
    for name in ("splash_mqa_fwd_segmented", "splash_mqa_dkv_segmented", "splash_mqa_dq_segmented"):
        assert text.count(f'kernel_name = "{name}') == 1
    assert f"{LENGTH}x{LENGTH}x" not in text and "384x384x" not in text


def count(jaxpr, name):
    inner = [x for eqn in jaxpr.eqns for x in jax.tree.leaves(eqn.params) if hasattr(x, "eqns") or hasattr(x, "jaxpr")]
    own = sum(eqn.primitive.name == name for eqn in jaxpr.eqns)
    return own + sum(count(getattr(x, "jaxpr", x), name) for x in inner)


def test_the_forward_kernel_of_splash_runs_once(program):
    """Its output and the softmax's sums are kept for the backward pass: three calls a layer, not four."""
    loss, arguments = program(TPU, recompute.between_products)
    assert count(gradient(loss, arguments).jaxpr, "pallas_call") == 2 * 3
    remat = gradient(*program(TPU, jax.checkpoint))
    assert count(remat.jaxpr, "pallas_call") == 2 * 4, "the measure sees a second forward"
    kept = jax.eval_shape(lambda delta, base: jax.vjp(lambda d: loss(d, base), delta)[1], *arguments)
    sums = [x.shape for x in jax.tree.leaves(kept) if x.dtype == jnp.float32 and 384 in x.shape]
    assert sums == [(ROWS, 2, 2, 384)] * 2, "one number a query and head, where the kernel writes 128"
