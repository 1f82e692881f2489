"""Quantized variables on disk: back as they were, or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import lora_jax as lj
from lora_jax import quant
from lora_jax.lift import is_adapted
from tests.adapters import kinds
from tests.lift.checks import bits_equal, weights


def quantized(kind, name="nf4", **options):
    site = kinds.get(kind)
    return lj.quantize(site.variables, site.sites, name, site.weights, **options)


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [("dense", n, {}) for n in quant.formats()]
    + [("scan", "nf4", {}), ("tied embedding", "fp4", {}), ("conv", "int4", {"double": False}), ("experts", "nf4", {})],
)
def test_round_trip(kind, name, options, tmp_path):
    small = quantized(kind, name, **options)
    quant.save(tmp_path / "new" / "base.safetensors", small)
    again = quant.load(tmp_path / "new" / "base.safetensors")
    assert jax.tree.structure(again) == jax.tree.structure(small)
    bits_equal(again, small)
    bits_equal(quant.dequantize(again), quant.dequantize(small))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["base.safetensors"]


def test_a_batch_axis_in_the_middle_and_bfloat16(tmp_path):
    function = lambda v, x: jnp.einsum("ebd,def->ebf", x, v["w"])  # noqa: E731
    variables = {"w": weights(8, 2, 4).astype(jnp.bfloat16)}
    small = lj.quantize(variables, lj.find_sites(function, variables, weights(2, 3, 8)), "nf4")
    assert small["w"].order is not None
    quant.save(tmp_path / "w", small)
    again = quant.load(tmp_path / "w")
    bits_equal(lj.lift(function)(again, weights(2, 3, 8)), lj.lift(function)(small, weights(2, 3, 8)))


def edited(file, change):
    """The file with its tensors and metadata changed."""
    with safe_open(str(file), "numpy") as opened:
        metadata, tensors = dict(opened.metadata()), {name: opened.get_tensor(name) for name in opened.keys()}
    change(tensors, metadata)
    save_file(tensors, str(file), metadata=metadata)


def cut(name, stop):
    return lambda t, m: t.update({name: np.ascontiguousarray(t[name][:stop])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("layers_0/kernel:c"), "lacks the tensor 'layers_0/kernel:c'"),
        (lambda t, m: t.update({"x:q": t["layers_0/kernel:q"]}), "holds unexpected tensors: x:q"),
        (cut("layers_0/kernel:q", 0), "tensors of 'layers_0/kernel' do not fit together .*; the file is damaged"),
        (cut("layers_0/kernel:l", 1), "tensors of 'layers_0/kernel' do not fit together"),
        (
            lambda t, m: t.update({"layers_0/kernel:c": t["layers_0/kernel:c"].astype(np.float32)}),
            "do not fit together",
        ),
        (lambda t, m: m.update(format="other"), "has the format 'other'; this version reads 'lora_jax.quant/1'"),
        (lambda t, m: m.update(quant=m["quant"].replace("nf4", "nf3")), "in the format 'nf3', which this version"),
        (lambda t, m: m.update(quant=m["quant"].replace('["nf4"', '[[["nf4"')), "metadata .* cannot be read"),
    ],
)
def test_a_damaged_file_is_refused(change, message, tmp_path):
    file = tmp_path / "base.safetensors"
    quant.save(file, quantized("dense"))
    edited(file, change)
    with pytest.raises(lj.UserError, match=message):
        quant.load(file)


def test_what_is_no_file_of_ours(tmp_path):
    with pytest.raises(lj.UserError, match="there is no file .*; expected what quant.save wrote"):
        quant.load(tmp_path / "nothing")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(lj.UserError, match="text cannot be read .* truncated or not safetensors"):
        quant.load(tmp_path / "text")


def test_what_cannot_be_saved(tmp_path):
    small = quantized("dense")
    site = kinds.get("dense")
    adapter = kinds.make("lora", site)
    bound = adapter.bind(small, adapter.init(jax.random.key(0), small, site.sites))
    cast = jax.tree.map(lambda n: n.astype("bfloat16"), small, is_leaf=is_adapted)
    for variables, message in [
        (bound, "an adapter is bound at 'layers_0/kernel'"),
        (cast, "was reshaped or cast since it was quantized"),
        ({**small, "batch_stats": {}}, "only the collection 'params' can be saved"),
        ({"a": [weights(2)]}, "'a' is a list; only nested dictionaries"),
        ({"a/b": weights(2)}, "the key 'a/b' at '' is no name"),
    ]:
        with pytest.raises(lj.UserError, match=message):
            quant.save(tmp_path / "x", variables)
    assert not list(tmp_path.iterdir())
