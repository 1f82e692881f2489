"""Prompt and prefix tuning with the real PEFT, both ways: equal logits, and strictness."""

import json

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import trees
from lora_jax.export import peft_virtual
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


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request):
    """(our base with large weights, PEFT's task type)."""
    config, labels, task = FAMILIES[request.param]
    base = lj.from_config(config, num_labels=labels)
    return base.__class__(**{**base.__dict__, "variables": oracle.random_weights(base)}), task


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


def save(folder, adapter, delta, base):
    """What `save_peft` will do around the codec: heads saved whole, files written."""
    from safetensors.numpy import save_file

    config, tensors = peft_virtual.write(adapter, delta, base)
    leaves = trees.flatten(base.variables)
    if base.num_labels is not None:
        for path, tensor in base.family.tensors(base.config, base.num_labels).items():
            if path.startswith(("classifier", "pooler")):
                value = np.asarray(delta[path].value if path in delta else leaves[path])
                value = value.T if tensor.transpose else value
                tensors[peft_virtual.MODULE_PREFIX + tensor.name] = np.ascontiguousarray(value)
        config["modules_to_save"] = ["bert.pooler.dense", "classifier"]
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


def load(folder, base):
    from safetensors.numpy import load_file

    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    config = json.loads((folder / "adapter_config.json").read_text())
    return *peft_virtual.read(config, tensors, base, file), tensors


@pytest.mark.parametrize("method", METHODS)
def test_ours_to_peft(case, method, tmp_path):
    base, _ = case
    adapter = METHODS[method]()
    if base.num_labels is not None:
        adapter = lj.chain(adapter, lj.head())
    delta = noisy(adapter.init(jax.random.key(0), base.variables, base.sites), 0.3)
    save(tmp_path, adapter, delta, base)
    model = peft.PeftModel.from_pretrained(oracle.in_transformers(base, base.variables), tmp_path).eval()
    mine = ours(base, adapter, delta)
    assert error(base, mine, theirs(model)) < TOLERANCE
    assert error(base, mine, np.asarray(base.apply(base.variables, TOKENS, MASK))) > 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_peft_to_ours(case, method, tmp_path):
    base, task = case
    make = peft.PromptTuningConfig if method == "prompt" else peft.PrefixTuningConfig
    torch.manual_seed(0)
    model = peft.get_peft_model(
        oracle.in_transformers(base, base.variables), make(task_type=task, num_virtual_tokens=3)
    ).eval()
    model.save_pretrained(tmp_path)
    adapter, delta, left = load(tmp_path, base)
    assert set(left) <= {"base_model.classifier.weight", "base_model.classifier.bias"}
    mine = ours(base, adapter, delta)
    assert error(base, mine, theirs(model)) < TOLERANCE
    fresh = adapter.init(jax.random.key(0), base.variables, base.sites)
    assert jax.tree_util.tree_structure(fresh) == jax.tree_util.tree_structure(delta)
    again = peft_virtual.write(adapter, delta, base)[1]
    np.testing.assert_array_equal(again["prompt_embeddings"], model.get_prompt_embedding_to_save("default").numpy())
