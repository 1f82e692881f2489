"""Round trips of one PEFT format with the real PEFT on tiny models; what the tests of loha, lokr and oft share."""

import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.errors import UserError
from tests.lift.checks import QUICK

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TOLERANCE = 5e-5
TOKENS = np.arange(3, 15).reshape(2, 6)
# Roles of the modules adapted: square and not, wider out than in and the other way round.
OURS = {
    "llama": "q,v,up,down",
    "bert": [".*/(query|value)/kernel", ".*/intermediate/kernel", ".*layer_./output/kernel"],
}
THEIRS = {
    "llama": ["q_proj", "v_proj", "up_proj", "down_proj"],
    "bert": r".*(query|value|intermediate\.dense|layer\.\d\.output\.dense)",
}


def make(kind: str, folder) -> types.SimpleNamespace:
    """A transformers model with large random weights, saved and read as our base."""
    shape = dict(vocab_size=40, hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=30)
    torch.manual_seed(0)
    if kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**shape))
    else:
        config = transformers.LlamaConfig(**shape, num_key_value_heads=2, tie_word_embeddings=False, pad_token_id=0)
        model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0, 0.1) if "norm" in name.lower() and name.endswith("weight") else p.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    return types.SimpleNamespace(kind=kind, folder=folder, cls=type(model), base=lj.load_pretrained(folder))


def output_of(model) -> np.ndarray:
    with torch.no_grad():
        out = model.eval()(torch.tensor(TOKENS))
    return (out.logits if "logits" in out else out.last_hidden_state).numpy()


def ours(base, adapter, delta) -> np.ndarray:
    apply = jax.jit(lj.lift(base.apply), compiler_options=QUICK)
    return np.asarray(apply(adapter.bind(base.variables, delta), jnp.asarray(TOKENS)))


def error(a, b) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def moved(delta, size, seed=0):
    """The delta with noise on every array; also those that start at zero."""
    rng = np.random.default_rng(seed)
    return jax.tree_util.tree_map(lambda x: x + size * rng.normal(size=x.shape).astype(np.float32), delta)


def check_ours_to_peft(case, adapter, folder, size=0.3) -> None:
    """PEFT gives our outputs from our file; what we read back is what we wrote."""
    base = case.base
    delta = moved(adapter.init(jax.random.key(0), base.variables, base.sites), size)
    lj.save_peft(folder, adapter, delta, base)
    model = case.cls.from_pretrained(case.folder, attn_implementation="eager")
    plain = output_of(model)
    model = peft.PeftModel.from_pretrained(model, folder)
    mine = ours(base, adapter, delta)
    assert error(mine, plain) > 1e-2, "the adapter must change the output"
    assert error(mine, output_of(model)) < TOLERANCE
    again, read = lj.load_peft(folder, base)
    assert jax.tree_util.tree_structure(read) == jax.tree_util.tree_structure(delta)
    for x, y in zip(jax.tree_util.tree_leaves(read), jax.tree_util.tree_leaves(delta), strict=True):
        np.testing.assert_array_equal(x, y)
    assert jax.tree_util.tree_structure(again.init(jax.random.key(0), base.variables, base.sites)) == (
        jax.tree_util.tree_structure(delta)
    )


def check_peft_to_ours(case, config, folder) -> None:
    """Our outputs from PEFT's file are PEFT's, and the parameters are as many."""
    torch.manual_seed(1)
    model = case.cls.from_pretrained(case.folder, attn_implementation="eager")
    plain = output_of(model)
    model = peft.get_peft_model(model, config)
    expected = output_of(model)
    assert error(expected, plain) > 1e-2, "PEFT's adapter must change the output"
    model.save_pretrained(folder)
    adapter, delta = lj.load_peft(folder, case.base)
    assert error(ours(case.base, adapter, delta), expected) < TOLERANCE
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert lj.audit(adapter, delta, case.base.variables, case.base.sites).trainable == trained
    fresh = adapter.init(jax.random.key(0), case.base.variables, case.base.sites)
    assert jax.tree_util.tree_structure(fresh) == jax.tree_util.tree_structure(delta)


def check_strict(case, codec, adapter, config, tensors, message) -> None:
    """A written file, damaged, is refused with a message."""
    base = case.base
    written, arrays = codec.write(adapter, adapter.init(jax.random.key(0), base.variables, base.sites), base)
    with pytest.raises(UserError, match=message):
        codec.read({**written, **config}, tensors(dict(arrays)), base, Path("file"))
