"""The BERT family of encoders: BERT and MiniLM, with a classification head when `num_labels` asks for one.

Devlin et al. 2018, BERT, arXiv 1810.04805; Wang et al. 2020, MiniLM, arXiv 2002.10957. Post-norm blocks with learned
absolute positions. Without a head the pooler is not part of the model: nothing reads it.

With a prompt of virtual tokens the head pools at the first of them, which has taken the place of the text's first
token: so does PEFT, whose prompts for sequence classification are trained that way. `pool_at` 0 means that token, too.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp

from lora_jax.errors import UserError
from lora_jax.models import kernels, layers, linear, masks, virtual_tokens
from lora_jax.models.attention import attend
from lora_jax.models.bert_config import Config
from lora_jax.models.tensor import Tensor
from lora_jax.models.virtual_tokens import Beside, Virtual

MODEL_TYPES = ("bert",)
PREFIX = "bert."
HAS_CACHE = False
HAS_TOKEN_TYPES = True

# What a config.json of this family may say about the numbers; `from_config` refuses other keys.
KEYS = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings "
    "type_vocab_size hidden_act layer_norm_eps hidden_dropout_prob attention_probs_dropout_prob classifier_dropout "
    "position_embedding_type is_decoder add_cross_attention tie_word_embeddings".split()
)

# The heads of pretraining and of other tasks, and index buffers that older files hold.
buffers = (r"embeddings\.(position|token_type)_ids", r"cls\..*", r"classifier\..*", r"pooler\..*")
carried = (r"pooler\..*",)
# Files converted from TensorFlow, bert-base-uncased among them.
renames = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))

roles = (
    (r"embeddings/word_embeddings/embedding", "embed"),
    (r".*/attention/query/kernel", "q"),
    (r".*/attention/key/kernel", "k"),
    (r".*/attention/value/kernel", "v"),
    (r".*/attention/output/kernel", "o"),
    (r".*/intermediate/kernel", "up"),
    (r"encoder/layer_\d+/output/kernel", "down"),
    (r"(pooler|classifier)/kernel", "head"),
)

sharding = (
    (r"embeddings/word_embeddings/embedding", ("vocab", "embed")),
    (r"embeddings/(position|token_type)_embeddings/embedding", ("length", "embed")),
    (r".*/attention/(query|key|value)/kernel", ("embed", "heads")),
    (r".*/attention/(query|key|value)/bias", ("heads",)),
    (r".*/attention/output/kernel", ("heads", "embed")),
    (r".*/intermediate/kernel", ("embed", "mlp")),
    (r".*/intermediate/bias", ("mlp",)),
    (r"encoder/layer_\d+/output/kernel", ("mlp", "embed")),
    (r"pooler/kernel", ("embed", None)),
    (r"classifier/kernel", ("embed", "labels")),
    (r".*/(scale|bias)", ("norm",)),
)


class Embeddings(nn.Module):
    """Word, token type and position embeddings, summed and normalized."""

    config: Config

    @nn.compact
    def __call__(self, tokens, token_types, positions, deterministic: bool, prompt_NxD=None):
        c = self.config
        x = linear.Embed(c.vocab_size, c.hidden_size, name="word_embeddings")(tokens)
        if prompt_NxD is not None:
            rows = jnp.broadcast_to(prompt_NxD.astype(x.dtype)[None], (x.shape[0], *prompt_NxD.shape))
            x = jnp.concatenate([rows, x], axis=1)
        x = x + linear.Embed(c.type_vocab_size, c.hidden_size, name="token_type_embeddings")(token_types)
        x = x + linear.Embed(c.max_position_embeddings, c.hidden_size, name="position_embeddings")(positions)
        x = layers.LayerNorm(c.layer_norm_eps, name="norm")(x)
        return layers.Dropout(c.hidden_dropout_prob, deterministic=deterministic)(x)


class Attention(nn.Module):
    """Self-attention with its output product, residual and norm; of all slots, or of those that are asked for."""

    config: Config

    @nn.compact
    def __call__(self, x_BxTxD, mask, deterministic: bool, beside: Beside | None = None, at_BxS=None):
        c = self.config
        width, count = x_BxTxD.shape[-1], c.num_attention_heads

        def heads(name: str, x):
            return linear.Dense(width, name=name)(x).reshape(*x.shape[:2], count, width // count)

        k, v = (heads(name, x_BxTxD).transpose(0, 2, 1, 3) for name in ("key", "value"))
        asking = x_BxTxD
        if at_BxS is not None:
            asking, mask = layers.take(x_BxTxD, at_BxS), masks.take_queries(mask, at_BxS)
            beside = beside and beside._replace(mask_BxTxN=masks.take_queries(beside.mask_BxTxN, at_BxS))
        dropout = layers.Dropout(c.attention_probs_dropout_prob, deterministic=deterministic).drawn()
        out = attend(heads("query", asking), k, v, mask, dropout, beside, c.remat)
        out = linear.Dense(width, name="output")(out)
        out = layers.Dropout(c.hidden_dropout_prob, deterministic=deterministic)(out)
        return layers.LayerNorm(c.layer_norm_eps, name="output_norm")(asking + out)


class Block(nn.Module):
    """One encoder layer; with `at` (B, S) its output at these slots alone."""

    config: Config

    @nn.compact
    def __call__(self, x, mask, deterministic: bool, beside: Beside | None = None, at=None):
        c = self.config
        x = Attention(c, name="attention")(x, mask, deterministic, beside, at)
        h = layers.ACTIVATIONS[c.hidden_act](linear.Dense(c.intermediate_size, name="intermediate")(x))
        h = linear.Dense(c.hidden_size, name="output")(h)
        h = layers.Dropout(c.hidden_dropout_prob, deterministic=deterministic)(h)
        return layers.LayerNorm(c.layer_norm_eps, name="output_norm")(x + h)


class Encoder(nn.Module):
    """The stack of layers. Nobody looks at the last one beside the slots `at`, so it computes no others."""

    config: Config

    @nn.compact
    def __call__(self, x, mask, deterministic: bool, prefix: Mapping[int, Beside], at=None):
        last = self.config.num_hidden_layers - 1
        block = nn.remat(Block, static_argnums=(3,)) if self.config.remat else Block
        for i in range(last + 1):
            x = block(self.config, name=f"layer_{i}")(x, mask, deterministic, prefix.get(i), at if i == last else None)
        return x


class Model(nn.Module):
    """Tokens to hidden states or class logits; see `make_apply` for the arguments."""

    config: Config

    @nn.compact
    def __call__(
        self,
        tokens,
        attention_mask=None,
        *,
        token_type_ids=None,
        positions=None,
        segment_ids=None,
        pool_at=None,
        deterministic: bool = True,
        output: str | None = None,
    ):
        c = self.config
        virtual = self._virtual(segment_ids)
        if positions is None:
            _check_length(c, tokens.shape[1], segment_ids, virtual.length)
            positions = layers.default_positions(tokens, segment_ids)
        types = jnp.zeros((1, tokens.shape[1]), jnp.int32) if token_type_ids is None else token_type_ids
        if virtual.length:
            positions = positions + virtual.length
        before = 0 if virtual.prompt_NxD is None else virtual.length
        if before:
            positions, types, attention_mask = _with_prompt(before, positions, types, attention_mask)
        x = Embeddings(c, name="embeddings")(tokens, types, positions, deterministic, virtual.prompt_NxD)
        length, head_dim = x.shape[1], c.hidden_size // c.num_attention_heads
        kernel = kernels.kernel_for(kernels.device(), x.dtype, length, head_dim)
        mask = masks.among(length, kernel, key_mask_BxT=attention_mask, segments_BxT=segment_ids)
        encoder = Encoder(c, name="encoder")
        if output == "hidden" or c.num_labels is None:
            return encoder(x, mask, deterministic, virtual.prefix)[:, before:]
        at = jnp.zeros((x.shape[0], 1), jnp.int32) if pool_at is None else pool_at
        if before:
            at = jnp.where(at == 0, 0, at + before)
        pooled = encoder(x, mask, deterministic, virtual.prefix, at)
        if pool_at is None:
            pooled = pooled[:, 0]
        pooled = jnp.tanh(linear.Dense(c.hidden_size, name="pooler")(pooled))
        rate = c.hidden_dropout_prob if c.classifier_dropout is None else c.classifier_dropout
        pooled = layers.Dropout(rate, deterministic=deterministic)(pooled)
        return linear.Dense(c.num_labels, name="classifier")(pooled)

    def _virtual(self, segment_ids) -> Virtual:
        """The call's virtual tokens; of length 0 where there are none."""
        c = self.config
        sizes = {"layers": c.num_hidden_layers, "width": c.hidden_size}
        heads = c.num_attention_heads
        virtual = virtual_tokens.read(self, **sizes, kv_heads=heads, head_dim=c.hidden_size // heads)
        if virtual is not None and virtual.prompt_NxD is not None and segment_ids is not None:
            raise UserError(
                "a prompt of virtual tokens in an encoder sees the text, so packed texts cannot share it: train and "
                "evaluate without packing (train.packing=false; attention_mask instead of segment_ids), or choose "
                "the method 'prefix'"
            )
        return virtual or Virtual(0, None, {})


def _check_length(config: Config, length: int, segment_ids, virtual: int) -> None:
    """Learned positions end; a lookup beyond them would be NaN."""
    if segment_ids is None and length + virtual > config.max_position_embeddings:
        more = f" after {virtual} virtual tokens" if virtual else ""
        raise UserError(
            f"{length} tokens{more}, but the model has {config.max_position_embeddings} positions; "
            "shorten the text (max_length)"
        )


def _with_prompt(count: int, positions, types, attention_mask) -> tuple:
    """Positions, token types and mask of a text with virtual tokens before it; these have the type 0 and are seen."""
    first = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32)[None], (positions.shape[0], count))
    positions = jnp.concatenate([first, positions], axis=1)
    types = jnp.pad(types, ((0, 0), (count, 0)))
    if attention_mask is not None:
        attention_mask = jnp.pad(attention_mask.astype(bool), ((0, 0), (count, 0)), constant_values=True)
    return positions, types, attention_mask


def architecture(config: Config, num_labels: int | None) -> str:
    """The class of transformers that reads what `save_pretrained` writes."""
    return "BertModel" if num_labels is None else "BertForSequenceClassification"


def tensors(config: Config, num_labels: int | None) -> dict[str, Tensor]:
    """Our paths -> the tensors of a checkpoint in Hugging Face layout."""
    prefix = "" if num_labels is None else PREFIX
    out = {}
    for name in ("word", "position", "token_type"):
        out[f"embeddings/{name}_embeddings/embedding"] = Tensor(f"{prefix}embeddings.{name}_embeddings.weight")
    out |= _norm("embeddings/norm", f"{prefix}embeddings.LayerNorm")
    for i in range(config.num_hidden_layers):
        out |= _layer_tensors(f"encoder/layer_{i}", f"{prefix}encoder.layer.{i}")
    if num_labels is not None:
        out |= _dense("pooler", f"{prefix}pooler.dense") | _dense("classifier", "classifier")
    return out


def _layer_tensors(ours: str, theirs: str) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name in ("query", "key", "value"):
        out |= _dense(f"{ours}/attention/{name}", f"{theirs}.attention.self.{name}")
    out |= _dense(f"{ours}/attention/output", f"{theirs}.attention.output.dense")
    out |= _norm(f"{ours}/attention/output_norm", f"{theirs}.attention.output.LayerNorm")
    out |= _dense(f"{ours}/intermediate", f"{theirs}.intermediate.dense")
    out |= _dense(f"{ours}/output", f"{theirs}.output.dense")
    return out | _norm(f"{ours}/output_norm", f"{theirs}.output.LayerNorm")


def _dense(ours: str, theirs: str) -> dict[str, Tensor]:
    return {f"{ours}/kernel": Tensor(f"{theirs}.weight", transpose=True), f"{ours}/bias": Tensor(f"{theirs}.bias")}


def _norm(ours: str, theirs: str) -> dict[str, Tensor]:
    return {f"{ours}/scale": Tensor(f"{theirs}.weight"), f"{ours}/bias": Tensor(f"{theirs}.bias")}
