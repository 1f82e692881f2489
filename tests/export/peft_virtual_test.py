"""Prompt and prefix tuning with the real PEFT, both ways: equal logits, and strictness."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.export import codecs, has_format
from lora_jax.export.peft_save import render
from lora_jax.generate import generate
from tests.lift.checks import noisy
from tests.models import oracle

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peers

TOLERANCE = 5e-5
TOKENS, MASK = oracle.padded_batch(lengths=(8, 5, 6))
FAMILIES = {
    "bert": (oracle.ENCODER | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, 3, "SEQ_CLS"),
    "llama": (oracle.DECODER, None, "CAUSAL_LM"),
    "mistral": (oracle.DECODER | {"model_type": "mistral", "sliding_window": 4}, None, "CAUSAL_LM"),
}
METHODS = {"prompt": lambda: lj.prompt(length=3), "prefix": lambda: lj.prefix(length=3, hidden=0)}


def make(family):
    """(our base with large weights, PEFT's task type)."""
    config, labels, task = FAMILIES[family]
    base = lj.from_config(config, num_labels=labels)
    return dataclasses.replace(base, variables=oracle.random_weights(base)), task


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request):
    return make(request.param)


def ours(base, adapter, delta, mask=MASK):
    apply = oracle.quick(lj.lift(base.apply))
    return np.asarray(apply(adapter.bind(base.variables, delta), TOKENS, mask))


def theirs(model, mask=MASK):
    """Logits of the text: PEFT returns those of a decoder's prompt too."""
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor(TOKENS, dtype=torch.long), attention_mask=torch.tensor(mask, dtype=torch.long)
        ).logits.numpy()
    return logits if logits.ndim == 2 else logits[:, -TOKENS.shape[1] :]


def error(base, a, b):
    return oracle.relative_error(a, b, None if a.ndim == 2 else MASK)


@pytest.mark.parametrize("method", METHODS)
def test_ours_to_peft(case, method, tmp_path):
    base, _ = case
    adapter = METHODS[method]()
    if base.num_labels is not None:
        adapter = lj.chain(adapter, lj.head())
    delta = noisy(adapter.init(jax.random.key(0), base.variables, base.sites), 0.3)
    lj.save_peft(tmp_path, adapter, delta, base)
    model = peft.PeftModel.from_pretrained(oracle.in_transformers(base, base.variables), tmp_path).eval()
    mine = ours(base, adapter, delta)
    assert error(base, mine, theirs(model)) < TOLERANCE
    assert error(base, mine, np.asarray(base.apply(base.variables, TOKENS, MASK))) > 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_peft_to_ours(case, method, tmp_path):
    base, task = case
    kind = peft.PromptTuningConfig if method == "prompt" else peft.PrefixTuningConfig
    torch.manual_seed(0)
    model = peft.get_peft_model(
        oracle.in_transformers(base, base.variables), kind(task_type=task, num_virtual_tokens=3)
    ).eval()
    model.save_pretrained(tmp_path)
    adapter, delta = lj.load_peft(tmp_path, base)
    mine = ours(base, adapter, delta)
    assert error(base, mine, theirs(model)) < TOLERANCE
    fresh = adapter.init(jax.random.key(0), base.variables, base.sites)
    assert jax.tree_util.tree_structure(fresh) == jax.tree_util.tree_structure(delta)
    _, again = render(adapter, delta, base)
    np.testing.assert_array_equal(again["prompt_embeddings"], model.get_prompt_embedding_to_save("default").numpy())


def test_generation_equals_peft_s():
    """Greedy text with a sliding window, ours from prompts padded on the left, PEFT's from one prompt at a time."""
    base, task = make("mistral")
    texts, count = [[5, 9, 33, 4], [11, 12]], 5
    for method, config in (("prompt", peft.PromptTuningConfig), ("prefix", peft.PrefixTuningConfig)):
        adapter = METHODS[method]()
        delta = noisy(adapter.init(jax.random.key(0), base.variables, base.sites), 0.3)
        model = peft.get_peft_model(
            oracle.in_transformers(base, base.variables), config(task_type=task, num_virtual_tokens=3)
        ).eval()
        _, tensors = render(adapter, delta, base)
        with torch.no_grad():
            model.prompt_encoder["default"].embedding.weight.copy_(torch.tensor(tensors["prompt_embeddings"]))
        options = dict(max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
        expected = [
            model.generate(
                input_ids=torch.tensor([t]), attention_mask=torch.ones(1, len(t), dtype=torch.long), **options
            )[0, len(t) :].tolist()
            for t in texts
        ]
        bound = adapter.bind(base.variables, delta)
        got = generate(base, bound, texts, max_new_tokens=count, eos_ids=(), apply=lj.lift(base.apply))
        assert got == expected, method


@pytest.fixture(scope="module")
def decoder():
    return lj.from_config(oracle.DECODER)


def start(base, adapter):
    return adapter.init(jax.random.key(0), base.variables, base.sites)


def written(base, adapter):
    delta = noisy(start(base, adapter), 0.3)
    return delta, *render(adapter, delta, base)


def test_a_reparametrized_prefix_is_written_as_what_it_makes(decoder):
    delta, config, tensors = written(decoder, lj.prefix(length=3, hidden=5))
    adapter, read = codecs.by_type(config["peft_type"], "").read(config, tensors, decoder, Path("file"))
    assert not tensors and adapter.spec["hidden"] == 0
    np.testing.assert_allclose(read["@prefix"].pairs, delta["@prefix"].collapsed().pairs, atol=1e-6)


@pytest.mark.parametrize(
    "method, config, shape, message",
    [
        ("prompt", {}, None, "file lacks the tensor 'prompt_embeddings'"),
        ("prompt", {}, (3, 16), r"has the shape \[3, 16\], expected \[3, 32\]"),
        ("prompt", {"num_virtual_tokens": 4}, (3, 32), r"has the shape \[3, 32\], expected \[4, 32\]"),
        ("prompt", {"num_virtual_tokens": 0}, (3, 32), "num_virtual_tokens=0, expected 1 or more"),
        ("prompt", {"token_dim": 16}, (3, 32), "token_dim=16, but this base has 32; was the adapter made for another"),
        ("prefix", {"num_layers": 4}, (3, 64), "num_layers=4, but this base has 2"),
        ("prefix", {"num_attention_heads": 4}, (3, 64), "num_attention_heads=4, but this base has 2"),
        ("prefix", {"num_transformer_submodules": 2}, (3, 64), "num_transformer_submodules=2, but this base has 1"),
        ("prefix", {}, (3, 32), r"has the shape \[3, 32\], expected \[3, 64\]"),
    ],
)
def test_strict(decoder, method, config, shape, message):
    _, good, _ = written(decoder, METHODS[method]())
    tensors = {} if shape is None else {"prompt_embeddings": np.zeros(shape, np.float32)}
    with pytest.raises(lj.UserError, match=message):
        codecs.by_type(good["peft_type"], "").read(good | config, tensors, decoder, Path("file"))


def test_a_prefix_on_some_layers_has_no_format(decoder):
    whole, part = lj.prefix(length=3), lj.prefix(length=3, layers="last:1")
    assert has_format(whole, start(decoder, whole), decoder)
    assert not has_format(part, start(decoder, part), decoder)
    with pytest.raises(lj.UserError, match=r"on the layers \[1\]; PEFT's format has prefixes on all 2 layers only"):
        written(decoder, lj.prefix(length=3, hidden=0, layers="last:1"))
