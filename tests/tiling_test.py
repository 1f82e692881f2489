"""Matrices in tiles for writing text: the same products, the same text, and only where it pays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import tiling
from lora_jax.generate import generate
from lora_jax.lift.tiled import TiledWeight, tiled
from lora_jax.models import quantized

MODEL = dict(
    model_type="llama", vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
)  # fmt: skip
PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4]]
LAID_OUT = {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}  # 32 columns of k and v fill no tile


@pytest.fixture(scope="module")
def base():
    return lj.from_config(MODEL, seed=3)


@pytest.fixture(autouse=True, params=["tiles", "rows"])
def in_tiles(request, monkeypatch):
    """As on a CPU where tiles gain something, and as on another."""
    monkeypatch.setattr(tiling, "in_tiles", lambda: request.param == "tiles")
    jax.clear_caches()  # a compiled program knows nothing of it
    return request.param == "tiles"


def adapted(base, adapter):
    delta = adapter.init(jax.random.key(0), base.variables, base.sites)
    draw = np.random.default_rng(0)
    moved = jax.tree.map(lambda x: x + 0.1 * draw.normal(size=x.shape).astype(x.dtype), delta)
    return adapter.bind(base.variables, moved)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_a_tiled_product_is_the_product(lead):
    draw = np.random.default_rng(0)
    weight, x = (jnp.asarray(draw.normal(size=s), jnp.float32) for s in ((5, 192), (*lead, 5)))
    node = tiled(weight, "w")
    assert node.base.shape == (3, 5, 64) and node.shape == (5, 192)
    np.testing.assert_array_equal(node.dense(), weight)
    for use in (
        lambda w, x: x @ w,
        lambda w, x: jnp.einsum("kn,...k->...n", w, x),
        lambda w, x: x @ jnp.tanh(w),
        lambda w, x: x @ w[:, 1:65],
    ):
        np.testing.assert_allclose(lj.lift(use)(node, x), use(weight, x), atol=1e-5)


def test_a_matrix_of_other_columns_stays():
    weight = jnp.ones((4, 96))
    assert tiled(weight, "w") is weight


@pytest.mark.parametrize("method", ["base", "lora", "dora", "bottleneck", "nf4"])
def test_text_is_the_same(base, method, monkeypatch, in_tiles):
    own, variables, apply = base, base.variables, None
    if method == "nf4":
        own = quantized(base, "nf4")
        variables = own.variables
    elif method != "base":
        variables, apply = adapted(base, getattr(lj, method)()), lj.lift(base.apply)
    chosen = tiling.choose(own, variables, len(PROMPTS), 40)
    stays = {"bottleneck": {"o_proj", "down_proj"}, "nf4": LAID_OUT - {"lm_head"}}.get(method, set())
    merged = LAID_OUT | {"k_proj", "v_proj"} if method in ("lora", "dora") else set()
    assert {path.split("/")[-2] for path in chosen} == (LAID_OUT - stays if in_tiles else merged - {"lm_head"})
    given = generate(own, variables, PROMPTS, max_new_tokens=40, apply=apply, eos_ids=())
    monkeypatch.setattr(tiling, "choose", lambda *_: ())
    assert given == generate(own, variables, PROMPTS, max_new_tokens=40, apply=apply, eos_ids=())
    assert method == "base" or given != generate(base, base.variables, PROMPTS, max_new_tokens=40, eos_ids=())


def test_an_update_is_merged_and_what_acts_on_the_output_stays(base, in_tiles):
    variables = adapted(base, lj.lora(targets="q,o"))
    laid_out = tiling.lay_out(variables, tiling.choose(base, variables, 3, 40))["params"]["layers_0"]["self_attn"]
    found = laid_out["q_proj"]["kernel"]
    assert isinstance(found, TiledWeight) == in_tiles
    merged = variables["params"]["layers_0"]["self_attn"]["q_proj"]["kernel"].dense()
    np.testing.assert_array_equal(found.dense() if in_tiles else found, merged)
    kept = {path for path in tiling.choose(base, adapted(base, lj.bottleneck(targets="o")), 3, 40)}
    assert not any("o_proj" in path for path in kept) and any("q_proj" in path for path in kept) == in_tiles


def test_only_where_it_pays(base, monkeypatch, in_tiles):
    variables = adapted(base, lj.lora())
    assert bool(tiling.choose(base, base.variables, 32, 32)) == in_tiles
    assert tiling.choose(base, variables, 32, 32)
    assert not tiling.choose(base, variables, 33, 32), "many rows"
    assert not tiling.choose(base, variables, 3, 31), "few turns"
    half = lj.from_config(MODEL, dtype="bfloat16")
    assert not tiling.choose(half, half.variables, 3, 40), "not float32"
    monkeypatch.setattr(tiling, "LARGEST", 1000)
    assert not tiling.choose(base, variables, 3, 40), "too large to be in memory twice"


def test_the_cpu_decides(monkeypatch, tmp_path):
    monkeypatch.undo()
    cases = {("AuthenticAMD", "25"): True, ("AuthenticAMD", "26"): False, ("GenuineIntel", "26"): True, None: True}
    for case, expected in cases.items():
        file = tmp_path / str(case)
        if case:
            file.write_text("processor\t: 0\nvendor_id\t: {}\ncpu family\t: {}\n\nflags : a\n".format(*case))
        monkeypatch.setattr(tiling, "_CPU", file)
        tiling.in_tiles.cache_clear()
        assert tiling.in_tiles() == expected, case
    tiling.in_tiles.cache_clear()


def test_a_model_over_several_devices_stays(base):
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.device_put(base.variables, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    assert not tiling.choose(base, everywhere, 3, 40)
