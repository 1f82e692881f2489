"""Tiny models of transformers with large random weights, and how an adapter is run by PEFT and by us."""

import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj

TOLERANCE = 5e-5  # relative to the largest logit
TOKENS = np.arange(3, 15).reshape(2, 6)


@functools.cache
def made(kind):
    """(folder, class of transformers, base) of `bert` (3 labels), `llama`, `tied` or `qwen2` (q, k, v have biases)."""
    import torch
    import transformers

    shape = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
    torch.manual_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(
            **shape, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        model = transformers.BertForSequenceClassification(config)
    else:
        make = transformers.Qwen2Config if kind == "qwen2" else transformers.LlamaConfig
        config = make(**shape, num_key_value_heads=2, tie_word_embeddings=kind == "tied", pad_token_id=0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0, 0.1) if "norm" in name.lower() and name.endswith("weight") else p.normal_(0.0, 0.3)
    folder = Path(tempfile.mkdtemp())
    model.save_pretrained(folder)
    return folder, type(model), lj.load_pretrained(folder, num_labels=3 if kind == "bert" else None)


def randomized(adapter, delta, seed=0):
    """The delta with noise on all that trains."""
    mask = adapter.trainable(delta)
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda on, x: x + 0.3 * jnp.asarray(rng.normal(size=x.shape), x.dtype) if on else x, mask, delta
    )


def ours(base, adapter, delta):
    """Logits of the lifted model."""
    apply = jax.jit(lambda v, d, x: lj.lift(base.apply)(adapter.bind(v, d), x))
    return np.asarray(apply(base.variables, delta, jnp.asarray(TOKENS)))


def plain(base):
    """Logits of the base."""
    return np.asarray(base.apply(base.variables, jnp.asarray(TOKENS)))


def model_of(kind):
    """The torch model, fresh from its folder."""
    folder, cls, _ = made(kind)
    return cls.from_pretrained(folder, attn_implementation="eager", **({"num_labels": 3} if kind == "bert" else {}))


def theirs(kind, adapter_folder):
    """Logits of PEFT with the adapter in a folder."""
    import peft
    import torch

    model = peft.PeftModel.from_pretrained(model_of(kind), adapter_folder).eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def written_by_peft(kind, config, folder, seed=1):
    """Makes a PEFT adapter of random values, saves it into the folder, returns its logits."""
    import peft
    import torch

    torch.manual_seed(seed)
    model = peft.get_peft_model(model_of(kind), config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    model.save_pretrained(folder)
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def error(a, b):
    """Largest difference relative to the largest entry."""
    return np.abs(a - b).max() / np.abs(b).max()
