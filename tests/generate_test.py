"""Generation: greedy equals transformers' token for token; draws follow the distribution; nothing compiles twice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import trees
from lora_jax.errors import UserError
from lora_jax.generate import _likeliest, _rounded, generate
from lora_jax.models import from_config
from tests.models import oracle

PROMPTS = [[5, 9, 33], [7], [11, 12, 13, 14, 15, 16, 17, 3, 4], [60, 3, 8, 8, 21]]


def make(**change):
    base = from_config(oracle.DECODER | change)
    return dataclasses.replace(base, variables=oracle.random_weights(base))


@pytest.fixture(scope="module")
def base():
    return make()


def one_at_a_time(base, prompt, count, ends=()):
    """Greedy text by whole forward passes over a fixed length: no cache, no padding on the left, no loop."""
    apply = oracle.jitted(base)
    tokens = np.zeros((1, 48), np.int32)
    tokens[0, : len(prompt)] = prompt
    new = []
    for i in range(len(prompt), len(prompt) + count):
        token = int(np.argmax(apply(base.variables, tokens)[0, i - 1]))
        if token in ends:
            break
        new.append(token)
        tokens[0, i] = token
    return new


def test_greedy_equals_whole_passes(base):
    ours = generate(base, base.variables, PROMPTS, max_new_tokens=12, eos_ids=())
    assert ours == [one_at_a_time(base, p, 12) for p in PROMPTS]
    assert len(set(map(tuple, ours))) == len(PROMPTS)


def test_stops_at_the_end_token(base):
    free = generate(base, base.variables, PROMPTS, max_new_tokens=12, eos_ids=())
    end = free[2][4]
    stopped = generate(base, base.variables, PROMPTS, max_new_tokens=12, eos_ids=[end])
    cut = [t[: t.index(end)] if end in t else t for t in free]
    assert stopped == cut and len(stopped[2]) < 12


def test_second_call_traces_nothing(base):
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return base.apply(*args, **kwargs)

    generate(base, base.variables, PROMPTS, max_new_tokens=9, apply=counted)
    first = len(calls)
    assert first >= 2
    # Other lengths, another limit, another number of rows of the same sizes; other ends and seeds are data too.
    other = [[3] * 12, [4] * 2, [5]]
    generate(base, base.variables, other, max_new_tokens=14, apply=counted, seed=5)
    assert len(calls) == first


def test_limit_is_kept(base):
    assert [len(t) for t in generate(base, base.variables, PROMPTS, max_new_tokens=3, eos_ids=())] == [3] * 4


def test_batches_and_order_do_not_matter(base):
    options = dict(max_new_tokens=8, temperature=1.0, top_p=0.9, seed=3, eos_ids=())
    together = generate(base, base.variables, PROMPTS, **options)
    apart = generate(base, base.variables, PROMPTS, **options, batch_size=2)
    assert together == apart
    assert together[0] == generate(base, base.variables, PROMPTS[:1] + [[60]], **options)[0]
    assert together != generate(base, base.variables, PROMPTS, **options | {"seed": 4})


def test_draws_follow_the_distribution(base):
    """512 draws of one token against softmax(logits / temperature) cut at top_p."""
    prompt, temperature, top_p = [5, 9, 33], 2.0, 0.8
    drawn = generate(
        base,
        base.variables,
        [prompt] * 512,
        max_new_tokens=1,
        temperature=temperature,
        top_p=top_p,
        eos_ids=(),
        batch_size=512,
    )
    logits = np.asarray(base.apply(base.variables, np.array([prompt], np.int32))[0, -1], np.float64) / temperature
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    order = np.argsort(-probs)
    kept = order[: int(np.searchsorted(np.cumsum(probs[order]), top_p)) + 1]
    expected = np.zeros(61)
    expected[kept] = probs[kept] / probs[kept].sum()
    found = np.bincount([t[0] for t in drawn], minlength=61) / 512
    assert 1 < len(kept) < 61 and not found[expected == 0].any()
    # Total variation of 512 draws from a law on about 20 tokens is 0.05 to 0.1; at temperature 1 it is above 0.3.
    assert np.abs(found - expected).sum() / 2 < 0.15


def test_every_draw_is_a_new_one(base):
    """Where all tokens are equally likely at every step, steps and rows differ only by their random numbers."""
    flat = trees.map_with_path(lambda path, x: x * 0 if path == "lm_head/kernel" else x, base.variables)
    options = dict(max_new_tokens=12, temperature=1.0, top_p=0.9, eos_ids=())
    first, second, *_ = generate(base, flat, [PROMPTS[0]] * 4, **options)
    assert len(set(first)) > 6 and first != second


def test_tiny_nucleus_is_greedy(base):
    drawn = generate(base, base.variables, PROMPTS, max_new_tokens=6, temperature=1.0, top_p=1e-6, eos_ids=())
    assert drawn == generate(base, base.variables, PROMPTS, max_new_tokens=6, eos_ids=())


def test_sizes_are_few():
    assert [_rounded(n) for n in (1, 16, 17, 24, 25, 33, 49, 97)] == [16, 16, 24, 24, 32, 48, 64, 128]
    assert all(_rounded(n) >= n for n in range(1, 500)) and len({_rounded(n) for n in range(1, 1025)}) == 13


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": [[5], []]}, "prompt 1 is empty"),
        ({"prompts": [[61]]}, "prompt 0 has a token outside the vocabulary of 61"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a positive integer, got 0"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"top_p": 0.0}, "top_p must lie in"),
    ],
)
def test_bad_arguments(base, change, message):
    arguments = {"prompts": PROMPTS, "max_new_tokens": 4} | change
    with pytest.raises(UserError, match=message):
        generate(base, base.variables, arguments.pop("prompts"), **arguments)


def test_only_decoders_make_text():
    encoder = from_config(oracle.ENCODER)
    with pytest.raises(UserError, match="only a decoder without a task head makes text"):
        generate(encoder, encoder.variables, PROMPTS, max_new_tokens=4)


def test_adapted_weights(base):
    """The lifted function with a bound adapter writes what the merged weights write."""
    import lora_jax as lj

    adapter = lj.lora(rank=2, alpha=4)
    delta = adapter.init(jax.random.key(0), base.variables, base.sites)
    rng = np.random.default_rng(0)
    delta = jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape).astype(x.dtype), delta)
    bound = adapter.bind(base.variables, delta)
    ours = generate(base, bound, PROMPTS, max_new_tokens=8, apply=lj.lift(base.apply), eos_ids=())
    dense = adapter.merge(base.variables, delta)
    assert ours == generate(base, dense, PROMPTS, max_new_tokens=8, eos_ids=())
    assert ours != generate(base, base.variables, PROMPTS, max_new_tokens=8, eos_ids=())


@pytest.mark.peers
@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": oracle.LLAMA3 | {"rope_theta": 500.0}},
        {"model_type": "mistral", "sliding_window": 4},
        {"model_type": "qwen2", "tie_word_embeddings": True},
    ],
    ids=["llama", "mistral", "qwen2"],
)
def test_greedy_equals_transformers(change):
    torch = pytest.importorskip("torch")
    base = make(**change)
    model = oracle.in_transformers(base, base.variables)
    length = max(map(len, PROMPTS))
    tokens = torch.tensor([[0] * (length - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in PROMPTS])
    free = generate(base, base.variables, PROMPTS, max_new_tokens=20, eos_ids=())
    end = free[0][7]  # a token that does come up, so that rows end at different places
    theirs = model.generate(
        tokens, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=end, pad_token_id=0
    )[:, length:].tolist()
    expected = [t[: t.index(end)] if end in t else t for t in theirs]
    ours = generate(base, base.variables, PROMPTS, max_new_tokens=20, eos_ids=[end])
    assert ours == expected and len({len(t) for t in ours}) > 1


def test_the_likeliest_token():
    """The first of equals, as argmax has it; of what is no number some token of the vocabulary."""
    logits = jnp.asarray(np.random.default_rng(0).integers(0, 5, (20, 7)), jnp.float32)
    np.testing.assert_array_equal(_likeliest(logits), jnp.argmax(logits, axis=-1))
    assert _likeliest(jnp.full((1, 7), jnp.nan)).tolist() == [6]
