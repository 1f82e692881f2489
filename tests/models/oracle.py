"""Tiny models, weights large enough that every option shows, and the same model in transformers."""

import copy

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import trees

DECODER = dict(
    model_type="llama",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
ENCODER = dict(
    model_type="bert",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=40,
    type_vocab_size=2,
    layer_norm_eps=1e-12,
    pad_token_id=0,
)
LLAMA3 = dict(
    rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
LENGTHS = (12, 7, 9)


def random_weights(base, seed=0):
    """N(0, 0.3), norms 1 + N(0, 0.1): a wrong rope scaling passes unseen at the usual 0.02."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path.endswith("scale"):
            return jnp.asarray(1 + 0.1 * rng.standard_normal(leaf.shape), leaf.dtype)
        return jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype)

    return trees.map_with_path(draw, base.variables)


def padded_batch(seed=0, lengths=LENGTHS, vocab=61):
    """Tokens (B, T) without special ids, padded on the right with 0, and their mask."""
    rng = np.random.default_rng(seed)
    mask = np.arange(max(lengths))[None] < np.asarray(lengths)[:, None]
    return np.where(mask, rng.integers(3, vocab, mask.shape), 0).astype(np.int32), mask


def in_transformers(base, variables):
    """The same model in transformers, strictly loaded; attention in its plain form."""
    import torch
    import transformers

    raw = copy.deepcopy(base.hf_config)  # transformers writes into the dictionaries it is given
    labels = {} if base.num_labels is None else {"num_labels": base.num_labels}
    config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw, **labels)
    config._attn_implementation = "eager"
    model = getattr(transformers, base.family.architecture(base.config, base.num_labels))(config)
    weights = {}
    tensors = base.family.tensors(base.config, base.num_labels)
    for path, leaf in trees.flatten(variables).items():
        array = np.array(leaf, np.float32)
        weights[tensors[path].name] = torch.tensor(array.T.copy() if tensors[path].transpose else array)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    # BertModel has a pooler that our headless encoder has not; a tied head is no weight of its own.
    assert not unexpected and all(m.startswith("pooler.") or m == "lm_head.weight" for m in missing), missing
    if "lm_head.weight" in missing:
        model.tie_weights()
    return model.eval()


def relative_error(ours, theirs, where=None):
    """Largest difference over the largest value, at chosen places."""
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    if where is not None:
        ours, theirs = ours[where], theirs[where]
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def quick(function, **options):
    """`jax.jit`, compiled quickly rather than well: a test runs it once or twice."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **options)


def jitted(base):
    """`base.apply` compiled."""
    return quick(base.apply, static_argnames="output")
