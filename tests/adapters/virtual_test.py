"""Virtual tokens on the families that read them: what a prompt and a prefix compute, and who refuses them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.adapters.prefix import from_cache
from lora_jax.generate import generate
from tests.adapters import kinds
from tests.lift.checks import bits_equal, close, furthest, loss, noisy
from tests.models import oracle

FAMILIES = {
    "llama": (oracle.DECODER, None),
    "mistral": (oracle.DECODER | {"model_type": "mistral", "sliding_window": 4}, None),
    "bert": (oracle.ENCODER, None),
    "classifier": (oracle.ENCODER, 3),
}
METHODS = {
    "prompt": functools.partial(lj.prompt, length=3, init="random"),
    "prefix": functools.partial(lj.prefix, length=3, hidden=0),
    "mlp": functools.partial(lj.prefix, length=3, hidden=5),
}
TOKENS, MASK = oracle.padded_batch(lengths=(8, 5, 6))
IDS = [7, 11, 30]


@functools.cache
def get(family):
    config, labels = FAMILIES[family]
    base = lj.from_config(config, num_labels=labels)
    return dataclasses.replace(base, variables=oracle.random_weights(base))


@functools.cache
def lifted(family):
    return oracle.quick(lj.lift(get(family).apply), static_argnames="output")


def start(base, adapter, seed=0):
    return adapter.init(jax.random.key(seed), base.variables, base.sites)


@pytest.mark.parametrize(
    ("family", "method"), [("llama", "prompt"), ("llama", "mlp"), ("classifier", "prompt"), ("classifier", "prefix")]
)
def test_output_gradients_and_vmap(family, method):
    """Random deltas change the output and not its shape; all of a delta has a gradient; the base stays as it was."""
    base, adapter = get(family), METHODS[method]()
    before = jax.tree_util.tree_map(np.array, base.variables)
    deltas = [noisy(start(base, adapter), 0.3, seed) for seed in (1, 2)]

    def step(delta, variables):
        def value(delta):
            return loss(out := lj.lift(base.apply)(adapter.bind(variables, delta), TOKENS, MASK)), out

        return jax.grad(value, has_aux=True)(delta)

    grads, outs = oracle.quick(jax.vmap(step, (0, None)))(
        jax.tree.map(lambda *x: jnp.stack(x), *deltas), base.variables
    )
    plain = oracle.jitted(base)(base.variables, TOKENS, MASK)
    assert outs.shape == (2, *plain.shape) and outs.dtype == plain.dtype
    assert min(furthest(outs[0], plain), furthest(outs[1], plain), furthest(outs[0], outs[1])) > 1e-2
    for i, delta in enumerate(deltas):
        alone = lifted(family)(adapter.bind(base.variables, delta), TOKENS, MASK)
        close(outs[i], alone, 1e-5)
    assert all(float(jnp.abs(g[i]).max()) > 0 for g in jax.tree.leaves(grads) for i in range(2))
    assert jax.tree.structure(adapter.trainable(deltas[0])) == jax.tree.structure(deltas[0])
    assert all(jax.tree.leaves(adapter.trainable(deltas[0]))) and not adapter.starts_as_base
    assert {x.dtype for x in jax.tree.leaves(deltas[0])} == {jnp.dtype("float32")}
    bits_equal(base.variables, before)


@pytest.mark.parametrize("family", ["llama", "mistral", "bert"])
def test_a_prompt_of_tokens_is_those_tokens(family):
    """Embeddings of real tokens before the text: what the base makes of the longer text, the text's part of it."""
    base, adapter = get(family), lj.prompt(length=3, init_tokens=IDS)
    given = lifted(family)(adapter.bind(base.variables, start(base, adapter)), TOKENS, MASK)
    longer = np.concatenate([np.tile(IDS, (len(TOKENS), 1)), TOKENS], axis=1).astype(np.int32)
    expected = base.apply(base.variables, longer, np.pad(MASK, ((0, 0), (3, 0)), constant_values=True))[:, 3:]
    assert oracle.relative_error(given, expected, MASK) < 1e-5


def test_a_prompt_takes_the_first_token_s_place_at_the_pooler():
    base, adapter = get("classifier"), lj.prompt(length=3, init_tokens=IDS)
    bound = adapter.bind(base.variables, start(base, adapter))
    longer = np.concatenate([np.tile(IDS, (len(TOKENS), 1)), TOKENS], axis=1).astype(np.int32)
    mask = np.pad(MASK, ((0, 0), (3, 0)), constant_values=True)
    expected = base.apply(base.variables, longer, mask)
    assert oracle.relative_error(lifted("classifier")(bound, TOKENS, MASK), expected) < 1e-5
    slots = jnp.array([[0, 2]] * 3)
    pooled = lifted("classifier")(bound, TOKENS, MASK, pool_at=slots)
    assert oracle.relative_error(pooled[:, 0], expected) < 1e-5
    other = base.apply(base.variables, longer, mask, pool_at=slots + 3)
    assert oracle.relative_error(pooled[:, 1], other[:, 1]) < 1e-5


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_prefix_from_a_cache_is_the_text_that_it_read(family):
    base, adapter = get(family), lj.prefix(length=3, hidden=0)
    _, cache = base.apply(base.variables, jnp.array([IDS]), cache=base.init_cache(1, 3))
    delta = from_cache(start(base, adapter), cache)
    given = lifted(family)(adapter.bind(base.variables, delta), TOKENS, MASK)
    prompt = lj.prompt(length=3, init_tokens=IDS)
    expected = lifted(family)(prompt.bind(base.variables, start(base, prompt)), TOKENS, MASK)
    assert oracle.relative_error(given, expected, MASK) < 1e-5
    with pytest.raises(lj.UserError, match=r"of 2 virtual tokens, the cache of 1 row\(s\) of 3"):
        from_cache(start(base, lj.prefix(length=2, hidden=0)), cache)
    with pytest.raises(lj.UserError, match=r"use prefix\(hidden=0\)"):
        from_cache(start(base, lj.prefix(length=3)), cache)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("family", ["llama", "mistral", "bert"])
def test_packed_equals_alone(family, method):
    """Every segment of a row sees the virtual tokens, and nothing of its neighbour."""
    base, adapter = get(family), METHODS[method]()
    bound = adapter.bind(base.variables, noisy(start(base, adapter)))
    row = np.concatenate([TOKENS[1, :5], TOKENS[2, :6]])[None]
    segments = np.array([[1] * 5 + [2] * 6], np.int32)
    if (family, method) == ("bert", "prompt"):
        with pytest.raises(lj.UserError, match="packed texts cannot share it.*train.packing=false.*'prefix'"):
            lj.lift(base.apply)(bound, row, segment_ids=segments)
        return
    packed = lifted(family)(bound, row, segment_ids=segments)
    alone = lifted(family)(bound, TOKENS, MASK)
    assert oracle.relative_error(packed[0, :5], alone[1, :5]) < 1e-5
    assert oracle.relative_error(packed[0, 5:], alone[2, :6]) < 1e-5


@pytest.mark.parametrize(("family", "method"), [("llama", "prefix"), ("mistral", "prompt"), ("mistral", "prefix")])
def test_generation_equals_whole_passes(family, method):
    """With the cache, prompts padded on the left: token for token what passes without a cache give."""
    base, adapter = get(family), METHODS[method]()
    bound = adapter.bind(base.variables, noisy(start(base, adapter)))
    apply = lj.lift(base.apply)
    prompts, count = [[5, 9, 33], [7], [11, 12, 13, 14, 15]], 6
    ours = generate(base, bound, prompts, max_new_tokens=count, eos_ids=(), apply=apply)
    for prompt, new in zip(prompts, ours, strict=True):
        tokens = np.zeros((3, 8 + count), np.int32)
        text = [*prompt, *new]
        tokens[0, : len(text)] = text
        logits = lifted(family)(bound, tokens)[0]
        assert new == [int(logits[len(prompt) + i - 1].argmax()) for i in range(count)]


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_cache_read_in_parts(method):
    """Two calls with a cache give what one without gives; a lifted function counts the embeddings as used in both."""
    base, adapter = get("llama"), METHODS[method]()
    bound = adapter.bind(base.variables, noisy(start(base, adapter)))
    apply = oracle.quick(lj.lift(base.apply))
    first, cache = apply(bound, TOKENS[:, :4], cache=base.init_cache(3, 8))
    second, cache = apply(bound, TOKENS[:, 4:], cache=cache)
    whole = lifted("llama")(bound, TOKENS)
    assert oracle.relative_error(jnp.concatenate([first, second], axis=1), whole) < 1e-5
    assert cache.keys[0].shape[2] == 8, "virtual tokens take no slots"


# What they start from.


def test_prompt_inits():
    base = get("llama")
    table = np.asarray(base.variables["params"]["embed_tokens"]["embedding"])
    make = lambda **options: start(base, lj.prompt(**options))["@prompt"].embedding  # noqa: E731
    np.testing.assert_array_equal(make(length=5, init_tokens=IDS), table[[*IDS, *IDS[:2]]])
    np.testing.assert_array_equal(make(length=2, init_tokens=IDS), table[IDS[:2]])
    rows = np.asarray(make(length=40))
    found = [int(np.abs(table - row).sum(1).argmin()) for row in rows]
    np.testing.assert_array_equal(rows, table[found])
    assert len(set(found)) > 15
    normal, uniform = make(length=40, init="random"), make(length=40, init="uniform")
    assert 0.9 < float(normal.std()) < 1.1 and float(jnp.abs(normal).max()) > 2
    assert 0.45 < float(jnp.abs(uniform).max()) <= 0.5 and 0.26 < float(uniform.std()) < 0.31
    for init, whole in (("random", normal), ("uniform", uniform)):
        np.testing.assert_array_equal(make(length=5, init=init), whole[:5])
    np.testing.assert_array_equal(make(length=5, init="vocab"), rows[:5])
    assert furthest(start(base, lj.prompt(length=40), 1)["@prompt"].embedding, rows) > 0


def test_prefix_inits():
    base = get("llama")
    make = lambda **options: start(base, lj.prefix(**options))["@prefix"]  # noqa: E731
    direct = make(length=9, hidden=0)
    assert direct.pairs.shape == (2, 2, 9, 16) and direct.layers == (0, 1)
    assert 0.9 < float(direct.pairs.std()) < 1.1
    np.testing.assert_array_equal(make(length=5, hidden=0).pairs, direct.pairs[:, :, :5])
    last = make(length=9, hidden=0, layers="last:1")
    assert last.layers == (1,)
    np.testing.assert_array_equal(last.pairs, direct.pairs[1:])
    for hidden in (0, 7):
        assert not np.any(make(length=4, hidden=hidden, init="zero").collapsed().pairs)
        assert np.any(make(length=4, hidden=hidden).collapsed().pairs)
    mlp = make(length=9, hidden=7)
    width, layers = 16, 2
    assert sum(x.size for x in jax.tree.leaves(mlp)) == (9 * width + width * 7 + 7 + layers * 2 * (7 * width + width))
    last = make(length=9, hidden=7, layers=[1])
    np.testing.assert_array_equal(last.collapsed().pairs, mlp.collapsed().pairs[1:])
    one = np.tanh(np.asarray(mlp.embedding[4] @ mlp.inner_kernel) + mlp.inner_bias)
    value = one @ mlp.outer_kernel[1, 0] + mlp.outer_bias[1, 0]
    np.testing.assert_allclose(mlp.collapsed().pairs[1, 0, 4], value, rtol=1e-5, atol=1e-6)


def test_a_prefix_on_some_layers():
    """Only those attend to it, and every layer counts."""
    base = get("llama")
    outs = {}
    for layers in ("all", [0], [1]):
        adapter = lj.prefix(length=3, hidden=0, layers=layers)
        outs[str(layers)] = lifted("llama")(adapter.bind(base.variables, start(base, adapter)), TOKENS, MASK)
    assert furthest(outs["all"], outs["[0]"]) > 1e-2 and furthest(outs["all"], outs["[1]"]) > 1e-2
    with pytest.raises(lj.UserError, match="the model has layers 0 to 1"):
        start(base, lj.prefix(layers=[2]))


@pytest.mark.parametrize("method", METHODS)
def test_spec_and_files(method, tmp_path):
    base, adapter = get("llama"), METHODS[method]()
    delta = noisy(start(base, adapter))
    lj.save(tmp_path, adapter, delta, base.variables)
    again, read = lj.load(tmp_path, base.variables)
    assert again.spec == adapter.spec and jax.tree.structure(read) == jax.tree.structure(delta)
    bits_equal(read, delta)
    bits_equal(start(base, lj.from_spec(adapter.spec)), start(base, adapter))


def test_beside_other_adapters():
    """In a chain with lora and a head; a run's keys and scales pass through; two adapters with virtual tokens not."""
    base = get("classifier")
    whole = lj.chain(METHODS["prompt"](), lj.lora(2, targets="q,v"), lj.head())
    assert not whole.starts_as_base and lj.chain(lj.lora(2), lj.head()).starts_as_base
    delta = noisy(start(base, whole))
    lora = lj.chain(lj.lora(2, targets="q,v"), lj.head())
    prompt = METHODS["prompt"]()
    given = lifted("classifier")(whole.bind(base.variables, delta), TOKENS, MASK)
    parts = [{}, {}]
    for path, one in delta.items():
        head, _, rest = one.member.partition(".")
        parts[head != "0"]["@prompt" if head == "0" else path] = dataclasses.replace(
            one, member=rest if head == "0" else str(int(head) - 1)
        )
    bound = prompt.bind(lora.merge(base.variables, parts[1]), parts[0], key=jax.random.key(1), scale=3.0)
    close(given, lifted("classifier")(bound, TOKENS, MASK), 1e-4)
    with pytest.raises(lj.UserError, match=r"virtual tokens \(prompt\) already"):
        METHODS["prefix"]().bind(bound, start(base, METHODS["prefix"]()))


def test_the_model_s_own_dropout():
    base = lj.from_config(oracle.ENCODER, num_labels=3, dropout=0.5)
    adapter = METHODS["prefix"]()
    bound = adapter.bind(base.variables, start(base, adapter))
    run = oracle.quick(lambda v, key: lj.lift(base.apply)(v, TOKENS, MASK, dropout_key=key))
    outs = [run(bound, jax.random.key(i)) for i in (1, 1, 2)]
    bits_equal(outs[0], outs[1])
    assert furthest(outs[0], outs[2]) > 1e-3


# Who refuses them.


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("kind", kinds.NAMES)
def test_a_model_that_does_not_read_them(kind, method):
    site, base = kinds.get(kind), get("llama")
    adapter = METHODS[method]()
    with pytest.raises(lj.UserError, match=f"the method '{method}' finds no .*work with lora_jax's own model families"):
        adapter.init(jax.random.key(0), site.variables, site.sites)
    delta = start(base, adapter)
    if "params" not in site.variables:
        with pytest.raises(lj.UserError, match="needs variables with the collection 'params'"):
            adapter.bind(site.variables, delta)
        return
    bound = adapter.bind(site.variables, delta)
    for function in (site.function, jax.jit(site.function)):
        with pytest.raises(lj.UserError, match=f"never used by the function.*@{method}.*does not read them"):
            jax.eval_shape(lj.lift(function), bound, *site.args)


@pytest.mark.parametrize("method", METHODS)
def test_they_cannot_be_merged(method):
    base, adapter = get("llama"), METHODS[method]()
    with pytest.raises(lj.UserError, match="cannot be merged: virtual tokens are inputs of the model"):
        adapter.merge(base.variables, start(base, adapter))


def test_a_delta_of_another_base_is_refused():
    base = get("llama")
    wide = lj.from_config(oracle.DECODER | {"hidden_size": 40, "head_dim": 4, "num_hidden_layers": 3})
    for method, message in (("prompt", r"the prompt has width \(40,\), this model \(32,\)"), ("prefix", "has layer 2")):
        adapter = METHODS[method]()
        with pytest.raises(lj.UserError, match=message + ".*another base"):
            lj.lift(base.apply)(adapter.bind(base.variables, start(wide, adapter)), TOKENS)
    last = lj.prefix(hidden=0, layers=[0])
    with pytest.raises(lj.UserError, match="keys of width 8, this model 2 key heads of 8"):
        lj.lift(base.apply)(last.bind(base.variables, start(wide, last)), TOKENS)


def test_positions_end():
    base = get("bert")
    text = np.ones((1, 38), np.int32)
    for method in ("prompt", "prefix"):
        adapter = METHODS[method]()
        bound = adapter.bind(base.variables, start(base, adapter))
        with pytest.raises(lj.UserError, match="38 tokens after 3 virtual tokens, but the model has 40 positions"):
            jax.eval_shape(lj.lift(base.apply), bound, text)
        assert np.isfinite(lj.lift(base.apply)(bound, text[:, :37])).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: lj.prompt(length=0), r"prompt\(length=0\): expected the number of virtual tokens, 1 or more"),
        (lambda: lj.prompt(init="vocabulary"), r"prompt\(init='vocabulary'\): did you mean 'vocab'\?"),
        (lambda: lj.prompt(init="tokens"), r"needs init_tokens=\[ids\]"),
        (lambda: lj.prompt(init="random", init_tokens=[1]), "would ignore init_tokens"),
        (lambda: lj.prompt(init_tokens="a text"), "expected token ids"),
        (lambda: lj.prompt(init_tokens=[]), "expected token ids"),
        (lambda: start(get("llama"), lj.prompt(init_tokens=[61])), "the id 61 is outside the vocabulary of 61"),
        (lambda: lj.prefix(length=2.0), r"prefix\(length=2.0\): expected a whole number, 1 or more"),
        (lambda: lj.prefix(hidden=-1), r"prefix\(hidden=-1\): expected a whole number, 0 or more"),
        (lambda: lj.prefix(init="ones"), r"prefix\(init='ones'\): did you mean .*known: random, zero"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(lj.UserError, match=message):
        call()
