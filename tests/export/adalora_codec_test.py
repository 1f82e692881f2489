"""AdaLoRA between PEFT's files and ours: the same outputs both ways, and strictness where PEFT is silent."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.adapters.parts.gated import rank_pattern
from lora_jax.export import peft_save
from lora_jax.export.codecs import adalora as codec

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peers

TOLERANCE = 5e-5
TOKENS = np.arange(3, 15).reshape(2, 6)
PREFIX = "base_model.model."
Q, UP = {"bert": "query", "llama": "q_proj"}, {"bert": "intermediate.dense", "llama": "up_proj"}
OURS = {"bert": ".*/(query|intermediate)/kernel", "llama": "q,up"}


@pytest.fixture(scope="module", params=["bert", "llama"])
def case(request, tmp_path_factory):
    """(kind, how to make transformers' model, our base), weights large enough that everything shows."""
    folder = tmp_path_factory.mktemp(request.param)
    shape = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
    torch.manual_seed(0)
    if request.param == "bert":
        model = transformers.BertModel(transformers.BertConfig(**shape), add_pooling_layer=False)
    else:
        config = transformers.LlamaConfig(**shape, num_key_value_heads=2, tie_word_embeddings=False, pad_token_id=0)
        model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0, 0.1) if "norm" in name.lower() and name.endswith("weight") else p.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    options = {"add_pooling_layer": False} if request.param == "bert" else {}
    fresh = lambda: type(model).from_pretrained(folder, attn_implementation="eager", **options)  # noqa: E731
    return request.param, fresh, lj.load_pretrained(folder)


def theirs(model):
    with torch.no_grad():
        out = model.eval()(torch.tensor(TOKENS))
    return (out.logits if "logits" in out else out.last_hidden_state).numpy()


def ours(base, adapter, delta):
    return np.asarray(lj.lift(base.apply)(adapter.bind(base.variables, delta), jnp.asarray(TOKENS)))


def error(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


def trained(adapter, base, prune=True):
    """A delta as training leaves it: large, with some gates at zero, one site without any open gate."""
    delta = adapter.init(jax.random.key(0), base.variables, base.sites)
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.4, x.shape), jnp.float32), delta)
    shut = lambda i, one: one.e.at[: len(one.e) if i == 0 else i % 3].set(0)  # noqa: E731
    if prune:
        for i, (path, one) in enumerate(moved.items()):
            moved[path] = type(one)(**{**vars(one), "e": shut(i, one)})
    return moved


@pytest.mark.parametrize("variant", ["pruned", "whole", "rules"])
def test_ours_to_peft(case, variant, tmp_path):
    kind, fresh, base = case
    rules = {
        "rank": [(".*(query|q_proj)/kernel", 1), (".*", 2)],
        "init_rank": [(".*(query|q_proj)/kernel", 2), (".*", 4)],
        "alpha": [(".*(query|q_proj)/kernel", 5), (".*", 8)],
    }
    options = rules if variant == "rules" else {"rank": 2, "init_rank": 4, "alpha": 8}
    adapter = lj.adalora(targets=OURS[kind], total_steps=100, **options)
    delta = trained(adapter, base, prune=variant != "whole")
    lj.save_peft(tmp_path, adapter, delta, base)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["rank_pattern"] is None) == (variant == "whole")
    mine = ours(base, adapter, delta)
    assert error(mine, theirs(peft.PeftModel.from_pretrained(fresh(), tmp_path))) < TOLERANCE
    assert error(mine, np.asarray(base.apply(base.variables, jnp.asarray(TOKENS)))) > 1e-2
    again, back = lj.load_peft(tmp_path, base)
    assert error(ours(base, again, back), mine) < 1e-6
    for path, pattern in rank_pattern(delta).items():
        np.testing.assert_array_equal(rank_pattern(back)[path][: pattern.size], pattern)
        assert not np.any(rank_pattern(back)[path][pattern.size :])


@pytest.mark.parametrize("pruned", [False, True])
def test_peft_to_ours(case, pruned, tmp_path):
    kind, fresh, base = case
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=6, total_step=9, tfinal=2, target_modules=[Q[kind], UP[kind]]
    )
    torch.manual_seed(1)
    model = peft.get_peft_model(fresh(), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(0.0, 0.4)
    if pruned:  # PEFT's own allocation, from gradients of no meaning
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for step in range(1, 8):
            model.base_model.update_and_allocate(step)
    model.save_pretrained(tmp_path)
    expected = theirs(model)
    adapter, delta = lj.load_peft(tmp_path, base)
    assert error(ours(base, adapter, delta), expected) < TOLERANCE
    assert error(expected, np.asarray(base.apply(base.variables, jnp.asarray(TOKENS)))) > 1e-2
    live = sum(int(p.sum()) for p in rank_pattern(delta).values())
    assert live == (4 * 2 if pruned else 4 * 4)
    first = adapter.init(jax.random.key(0), base.variables, base.sites)
    assert jax.tree.structure(first) == jax.tree.structure(delta), "reading must rebuild what init makes"
    spec = adapter.spec
    assert (spec["rank"], spec["init_rank"], spec["tfinal"], spec["total_steps"]) == (2, 4, 2, 9)


def test_an_untrained_adapter_keeps_its_triplets(case):
    kind, _, base = case
    adapter = lj.adalora(rank=2, targets=OURS[kind])
    config, tensors = peft_save.render(adapter, adapter.init(jax.random.key(0), base.variables, base.sites), base)
    assert config["rank_pattern"] is None and {t.shape[0] for k, t in tensors.items() if k.endswith("lora_A")} == {3}
    peft.AdaLoraConfig(**{k: v for k, v in config.items() if k != "peft_type"})  # PEFT takes its schedule


def test_the_budget_of_the_whole_is_pefts_target(case):
    kind, _, base = case
    adapter = lj.adalora(rank=3, targets=OURS[kind], total_steps=200, tinit=0.1, tfinal=50)
    config, _ = peft_save.render(adapter, trained(adapter, base), base)
    found = {k: config[k] for k in ("init_r", "target_r", "tinit", "tfinal", "total_step", "deltaT", "lora_alpha")}
    assert list(found.values()) == [5, 3, 20, 50, 200, 10, 16]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: t.pop(next(k for k in t if k.endswith("lora_E"))), "lacks the tensor .*lora_E"),
        (lambda c, t: c.update(init_r=5), r"must be 5 booleans \(init_r\)"),
        (lambda c, t: c.update(rank_pattern=None), r"has the shape \[\d, \d+\], expected \[4, \d+\]"),
        (lambda c, t: c.update(target_modules=["c_attn"]), r"target_modules=\['c_attn'\] selects no module"),
        (lambda c, t: c["rank_pattern"].update({"h.9.lora_E": [True] * 4}), "rank_pattern names 'h.9.lora_E'"),
        (lambda c, t: c.pop("init_r"), "lacks 'init_r'"),
    ],
)
def test_strict(case, change, message, tmp_path):
    kind, _, base = case
    adapter = lj.adalora(rank=2, init_rank=4, targets=OURS[kind])
    config, tensors = peft_save.render(adapter, trained(adapter, base), base)
    change(config, tensors)
    with pytest.raises(lj.UserError, match=message):
        codec.read(config, tensors, base, tmp_path / "adapter_model.safetensors")


def test_an_embedding_is_refused(case):
    _, _, base = case
    path = next(p for p, s in base.sites.items() if s.uses[:1] == ("embedding",))
    adapter = lj.adalora(rank=2, targets=path)
    with pytest.raises(lj.UserError, match=f"PEFT's AdaLoRA has no embeddings, and '{path}' is one"):
        peft_save.render(adapter, trained(adapter, base), base)
