"""The formats themselves: their levels, what they cost, what they lose, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import quant, trees
from lora_jax.lift import is_adapted
from lora_jax.quant import blocks
from tests.lift.checks import bits_equal, weights

FORMATS = quant.formats()
# Dettmers et al. (2023), appendix E.
PAPER = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def product(v, x):
    return x @ v["layers_0"]["kernel"]


def on(weight):
    """(variables, sites) of one matrix."""
    variables = {"layers_0": {"kernel": jnp.asarray(weight)}}
    return variables, lj.find_sites(product, variables, jnp.zeros((1, weight.shape[0])))


def there_and_back(weight, name, **options):
    variables, sites = on(weight)
    return quant.dequantize(lj.quantize(variables, sites, name, **options))["layers_0"]["kernel"]


@pytest.fixture(scope="module")
def gaussian():
    return np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32)


def levels(name):
    """Every value that a format has, told by its own decoder."""
    form = quant.get(name)()
    return np.asarray(form.decode(jnp.arange(2**form.bits, dtype=jnp.uint8)))


def test_nf4_has_the_levels_of_the_paper():
    np.testing.assert_array_equal(levels("nf4"), np.float32(PAPER))


def test_fp4_has_the_levels_of_e2m1():
    import ml_dtypes

    e2m1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(np.unique(levels("fp4")[:15]), np.unique(e2m1 / 6))


@pytest.mark.parametrize("name", FORMATS)
def test_levels_are_kept_and_everything_else_goes_to_the_nearest(name):
    own = np.unique(levels(name)[1 if name.startswith("int") else 0 :])
    own = own[np.abs(own) <= 1]
    form = quant.get(name)()
    read = lambda x: np.asarray(form.decode(jnp.asarray(form.encode(np.float32(x)))))  # noqa: E731
    np.testing.assert_array_equal(read(own), own)
    x = np.linspace(-1, 1, 4001, dtype=np.float32)
    nearest = np.abs(x[:, None] - own).min(1)
    np.testing.assert_allclose(np.abs(read(x) - x), nearest, atol=1e-6)


def test_error_on_gaussian_weights_has_the_order_of_the_paper(gaussian):
    """NF4 < FP4 < Int4 in mean squared error (Dettmers et al. 2023, table 2 has this order in perplexity)."""
    error = {name: float(jnp.mean((there_and_back(gaussian, name) - gaussian) ** 2)) for name in FORMATS}
    assert error["int8"] < 0.02 * error["nf4"]
    assert 1.2 * error["nf4"] < error["fp4"] < 0.98 * error["int4"]
    # Measured in NumPy on the levels alone, blocks of 64, without double quantization: 0.0085, 0.0112, 0.0116.
    assert [round(error[n], 3) for n in ("nf4", "fp4", "int4")] == [0.008, 0.011, 0.012]


@pytest.mark.parametrize(("name", "most"), [("nf4", 4.13), ("fp4", 4.13), ("int4", 4.13), ("int8", 8.04)])
def test_bits_a_weight_in_memory_and_on_disk(gaussian, tmp_path, name, most):
    variables, sites = on(gaussian)
    small = lj.quantize(variables, sites, name)
    node = small["layers_0"]["kernel"]
    stored = sum(x.nbytes for x in jax.tree.leaves(small))
    assert quant.bits_per_weight(node) == 8 * stored / gaussian.size <= most
    assert node.base.dtype == jnp.uint8
    file = tmp_path / "base.safetensors"
    quant.save(file, small)
    assert 8 * file.stat().st_size / gaussian.size <= most


def test_double_quantization_costs_and_loses_little(gaussian):
    variables, sites = on(gaussian)
    single = lj.quantize(variables, sites, "nf4", double=False)["layers_0"]["kernel"]
    double = lj.quantize(variables, sites, "nf4")["layers_0"]["kernel"]
    assert quant.bits_per_weight(single) == 4.5
    # 8/64 + 32/(64 * 256), and the mean.
    assert quant.bits_per_weight(double) == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)
    error = [float(jnp.mean((n.dense() - gaussian) ** 2)) for n in (single, double)]
    assert error[0] < error[1] < 1.01 * error[0]


@pytest.mark.parametrize("shape", [(3, 5), (257,), (4, 16, 16), (1,)])
def test_constants_in_eight_bits(shape):
    """To half a step of the widest constant of their group, for each leading index by itself."""
    given = np.abs(np.random.default_rng(1).normal(3, 1, size=(2, *shape))).astype(np.float32)
    codes, own = blocks.squeeze(given, 1)
    assert codes.shape == given.shape and codes.dtype == np.uint8
    back = np.asarray(blocks.widen(jnp.asarray(codes), jnp.asarray(own)))
    assert np.abs(back - given).max() <= own[..., :-1].max() * 0.5001
    alone = blocks.squeeze(given[1:], 1)
    np.testing.assert_array_equal(alone[0][0], codes[1])
    np.testing.assert_array_equal(alone[1][0], own[1])


def test_blocks_are_along_fan_in():
    """A large row entry spoils its own block of its own column and nothing else."""
    clean = weights(128, 4)
    spoilt = clean.at[70, 2].set(100.0)
    options = {"double": False}
    moved = np.asarray(there_and_back(spoilt, "nf4", **options) != there_and_back(clean, "nf4", **options))
    assert moved[64:, 2].sum() > 32 and moved[:64].sum() == 0 and moved[:, [0, 1, 3]].sum() == 0


@pytest.mark.parametrize(
    ("rows", "expected"), [(64, (1, 64)), (80, (2, 40)), (27, (1, 28)), (130, (3, 44)), (1, (1, 2))]
)
def test_sizes_that_do_not_divide_are_evened_out(rows, expected):
    weight = weights(rows, 3)
    variables, sites = on(weight)
    node = lj.quantize(variables, sites, "int4")["layers_0"]["kernel"]
    assert (node.base.shape[0], 2 * node.base.shape[1]) == expected
    assert node.dense().shape == node.shape == (rows, 3)
    step = float(jnp.abs(weight).max()) / 7
    assert float(jnp.abs(node.dense() - weight).max()) < 0.52 * step


def test_zeros_stay_zeros():
    for name in FORMATS:
        bits_equal(there_and_back(np.zeros((70, 3), np.float32), name), jnp.zeros((70, 3)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_comes_back(dtype):
    weight = weights(64, 8).astype(dtype)
    back = there_and_back(weight, "int8")
    assert back.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(np.float32(back), np.float32(weight), atol=0.02)


def test_options_change_what_is_stored():
    variables, sites = on(weights(256, 8))
    small = {b: lj.quantize(variables, sites, "nf4", block=b)["layers_0"]["kernel"] for b in (32, 64, None)}
    assert [n.base.shape for n in small.values()] == [(8, 16, 8), (4, 32, 8), (1, 128, 8)]


def test_targets_are_chosen_as_by_adapters():
    def function(v, tokens):
        x = v["embed"]["embedding"][tokens] @ v["layers_0"]["kernel"] + v["layers_0"]["bias"][None]
        return x @ v["layers_1"]["kernel"]

    variables = {
        "embed": {"embedding": weights(8, 16)},
        "layers_0": {"kernel": weights(16, 16), "bias": weights(16)},
        "layers_1": {"kernel": weights(16, 16, seed=1)},
    }
    sites = lj.find_sites(function, variables, jnp.arange(3))

    def chosen(targets):
        small = lj.quantize(variables, sites, "nf4", targets)
        return {p for p, x in trees.flatten(small, is_adapted).items() if is_adapted(x)}

    assert chosen(None) == {"layers_0/kernel", "layers_1/kernel"}
    assert chosen("layers_1/.*") == {"layers_1/kernel"}
    assert chosen("embed/.*") == {"embed/embedding"}
    with pytest.raises(lj.UserError, match="'layers_9/.*' matches none of the 4 sites"):
        lj.quantize(variables, sites, "nf4", "layers_9/.*")
    with pytest.raises(lj.UserError, match="nf4 is for weights that a product uses; 'layers_0/bias' of shape"):
        lj.quantize(variables, sites, "nf4", "layers_0/.*")


def test_mistakes_are_told():
    variables, sites = on(weights(64, 8))
    small = lj.quantize(variables, sites, "nf4")
    for call, message in [
        (lambda: lj.quantize(variables, sites, "nf5"), "no number format 'nf5'; did you mean 'nf4'"),
        (lambda: lj.quantize(variables, sites, "nf4", blok=3), "'nf4' has no option 'blok'; did you mean 'block'"),
        (lambda: lj.quantize(variables, sites, "nf4", block=1), "block=1; expected an integer of at least 2"),
        (lambda: lj.quantize(variables, sites, "nf4", double="no"), "double='no'; expected True or False"),
        (lambda: lj.quantize(small, sites, "int4"), "'layers_0/kernel' is in nf4 already"),
        (lambda: lj.quantize({"a": weights(3)}, sites, "nf4"), "no weight 'layers_0/kernel'"),
        (lambda: lj.quantize({"layers_0": {"kernel": weights(8, 8)}}, sites, "nf4"), r"the shape \(8, 8\), its site"),
        (lambda: lj.quantize({"layers_0": {"kernel": weights(64, 8) / 0}}, sites, "nf4"), "that are not finite"),
        (lambda: jax.jit(lambda v: lj.quantize(v, sites, "nf4"))(variables), "inside jit there are none"),
    ]:
        with pytest.raises(lj.UserError, match=message):
            call()
    adapter = lj.lora(rank=2)
    delta = adapter.init(jax.random.key(0), small, sites)
    with pytest.raises(lj.UserError, match="adapter is bound at 'layers_0/kernel': use `adapter.merge"):
        quant.dequantize(adapter.bind(small, delta))


def test_formats_are_found_by_folder(monkeypatch, tmp_path):
    assert FORMATS == ["fp4", "int4", "int8", "nf4"]
    (tmp_path / "ternary.py").write_text("def ternary(block=64):\n    return block\n")
    monkeypatch.setattr(quant, "__path__", [*quant.__path__, str(tmp_path)])
    assert quant.formats() == [*FORMATS, "ternary"] and quant.options("ternary") == {"block": 64}
