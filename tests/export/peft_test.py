"""PEFT round trip, both ways, with the real PEFT: equal logits, and strictness where PEFT is silent."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peers

TOLERANCE = 5e-5
TOKENS = np.arange(3, 15).reshape(2, 6)


def make(kind, folder):
    """A transformers model with large random weights, saved; returns (folder, how to load it, our num_labels)."""
    shape = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
    torch.manual_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(
            **shape, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        model = transformers.BertForSequenceClassification(config)
    else:
        tied = kind == "tied"
        config = transformers.LlamaConfig(**shape, num_key_value_heads=2, tie_word_embeddings=tied, pad_token_id=0)
        model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0, 0.1) if "norm" in name.lower() and name.endswith("weight") else p.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    return type(model), 3 if kind == "bert" else None


@pytest.fixture(scope="module", params=["bert", "untied", "tied"])
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    cls, labels = make(request.param, folder)
    return request.param, folder, cls, lj.load_pretrained(folder, num_labels=labels)


def randomized(delta, seed=0):
    leaves, tree = jax.tree_util.tree_flatten(delta)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([x + 0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def ours(base, adapter, delta):
    apply = lj.lift(base.apply)
    return np.asarray(apply(adapter.bind(base.variables, delta), jnp.asarray(TOKENS)))


def theirs(cls, folder, adapter_folder, **kwargs):
    model = cls.from_pretrained(folder, attn_implementation="eager", **kwargs)
    model = peft.PeftModel.from_pretrained(model, adapter_folder).eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def error(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


TARGETS = {
    "bert": (
        ".*/(query|value)/kernel",
        [".*layer_1/(query|value|intermediate|output)/kernel", ".*/attention/output/kernel"],
    ),
    "untied": ("q,v", ["q,down", "embed_tokens/embedding", "lm_head/kernel"]),
    "tied": ("q,v", ["o,up", "embed_tokens/embedding"]),
}


@pytest.mark.parametrize("wide", [False, True])
def test_ours_to_peft(case, wide, tmp_path):
    kind, folder, cls, base = case
    targets = TARGETS[kind][wide]
    if kind == "bert" and wide:
        targets = [".*layer_1/attention/(query|value)/kernel", ".*/intermediate/kernel", ".*/attention/output/kernel"]
    adapter = lj.lora(
        rank=[(".*(value|v_proj|intermediate|down_proj|up_proj|output)/kernel", 3), (".*", 2)] if wide else 2,
        alpha=[(".*(intermediate|down_proj|up_proj)/kernel", 5), (".*", 8)] if wide else 8,
        targets=targets,
        scaling="alpha/sqrt(r)" if wide else "alpha/r",
    )
    if kind == "bert":
        adapter = lj.chain(adapter, lj.head())
    delta = randomized(adapter.init(jax.random.key(0), base.variables, base.sites))
    lj.save_peft(tmp_path, adapter, delta, base)
    kwargs = {"num_labels": 3} if kind == "bert" else {}
    mine = ours(base, adapter, delta)
    assert error(mine, theirs(cls, folder, tmp_path, **kwargs)) < TOLERANCE
    plain = np.asarray(base.apply(base.variables, jnp.asarray(TOKENS)))
    assert error(mine, plain) > 1e-2, "the adapter must change the output"
    again, read = lj.load_peft(tmp_path, base)
    assert error(ours(base, again, read), mine) < 1e-6


@pytest.mark.parametrize("variant", ["plain", "patterns", "layers", "regex"])
def test_peft_to_ours(case, variant, tmp_path):
    kind, folder, cls, base = case
    q, v, up = ("query", "value", "intermediate.dense") if kind == "bert" else ("q_proj", "v_proj", "up_proj")
    options = {
        "plain": dict(target_modules=[q, v]),
        "patterns": dict(
            target_modules=[q, v, up],
            rank_pattern={v: 3, rf"layer(s)?\.0\..*{up}": 1},
            alpha_pattern={q: 7},
            use_rslora=True,
        ),
        "layers": dict(target_modules=[q, v], layers_to_transform=[1]),
        "regex": dict(target_modules=rf".*\.1\..*({q}|{up})"),
    }[variant]
    torch.manual_seed(1)
    model = cls.from_pretrained(folder, attn_implementation="eager", **({"num_labels": 3} if kind == "bert" else {}))
    task = "SEQ_CLS" if kind == "bert" else "CAUSAL_LM"
    config = peft.LoraConfig(r=2, lora_alpha=16, init_lora_weights=False, task_type=task, **options)
    model = peft.get_peft_model(model, config).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS)).logits.numpy()
    adapter, delta = lj.load_peft(tmp_path, base)
    mine = ours(base, adapter, delta)
    assert error(mine, expected) < TOLERANCE
    assert error(mine, np.asarray(base.apply(base.variables, jnp.asarray(TOKENS)))) > 1e-3
    fresh = adapter.init(jax.random.key(0), base.variables, base.sites)
    assert jax.tree_util.tree_structure(fresh) == jax.tree_util.tree_structure(delta), (
        "load must rebuild what init makes"
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A base and one adapter written for it, to be damaged by the tests of strictness."""
    source, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("written")
    make("untied", source)
    base = lj.load_pretrained(source)
    adapter = lj.lora(rank=2, targets="q,v")
    lj.save_peft(folder, adapter, randomized(adapter.init(jax.random.key(0), base.variables, base.sites)), base)
    return base, folder


def edit(folder, tmp_path, config=None, tensors=None):
    from safetensors.numpy import load_file, save_file

    new = tmp_path / "edited"
    shutil.copytree(folder, new)
    if config:
        old = json.loads((new / "adapter_config.json").read_text())
        (new / "adapter_config.json").write_text(json.dumps({**old, **config}))
    if tensors:
        save_file(tensors(load_file(new / "adapter_model.safetensors")), new / "adapter_model.safetensors")
    return new


def without_one(t):
    return {k: v for k, v in t.items() if "layers.1.self_attn.v_proj.lora_B" not in k}


def one_more(t):
    return {**t, "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": np.zeros((2, 16), np.float32)}


def without_prefix(t):
    return {k.replace("base_model.model.", "base_model."): v for k, v in t.items()}


@pytest.mark.parametrize(
    "config, tensors, message",
    [
        (None, without_one, "lacks the tensor .*layers.1.self_attn.v_proj.lora_B.weight"),
        (None, one_more, "no place for.*layers.9"),
        (None, without_prefix, "lacks the tensor"),
        ({"r": 4}, None, r"has the shape \[2, 16\], expected \[4, 16\]"),
        ({"use_dora": True}, None, "lacks the tensor .*lora_magnitude_vector"),
        ({"lora_bias": True}, None, "lora_bias=True is not supported"),
        ({"bias": "some"}, None, "bias='some': expected 'none', 'all' or 'lora_only'"),
        ({"peft_type": "BOFT"}, None, "peft_type 'BOFT' is not supported; did you mean 'OFT'|peft_type 'BOFT' is not"),
        ({"target_modules": ["c_attn"]}, None, "selects no module"),
    ],
)
def test_strict(written, tmp_path, config, tensors, message):
    base, folder = written
    with pytest.raises(lj.UserError, match=message):
        lj.load_peft(edit(folder, tmp_path, config, tensors), base)


def test_a_truncated_file_is_an_error(written, tmp_path):
    base, folder = written
    new = edit(folder, tmp_path)
    file = new / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(lj.UserError, match="truncated"):
        lj.load_peft(new, base)


def test_a_method_without_a_peft_format_says_so(written, tmp_path):
    base, _ = written
    adapter = lj.layers("last:1")
    delta = adapter.init(jax.random.key(0), base.variables, base.sites)
    with pytest.raises(lj.UserError, match="PEFT has no format for 'layers'.*lora_jax.save"):
        lj.save_peft(tmp_path, adapter, delta, base)
