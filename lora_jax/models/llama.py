"""The Llama family of decoders: Llama, Mistral (sliding window), Qwen2 (biases on q, k, v).

Touvron et al. 2023, LLaMA, arXiv 2302.13971; Jiang et al. 2023, Mistral 7B, arXiv 2310.06825; Yang et al. 2024, Qwen2,
arXiv 2407.10671. Pre-norm blocks of grouped-query attention with rotary positions and a gated MLP.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_jax.models import cache as caches
from lora_jax.models import kernels, layers, linear, masks, rotary, virtual_tokens
from lora_jax.models.attention import attend
from lora_jax.models.cache import Cache, ReadPrompt
from lora_jax.models.llama_config import Config
from lora_jax.models.masks import Mask
from lora_jax.models.tensor import Tensor
from lora_jax.models.virtual_tokens import Beside, Virtual

MODEL_TYPES = ("llama", "mistral", "qwen2")
PREFIX = "model."
HAS_CACHE = True
HAS_TOKEN_TYPES = False

# What a config.json of these families may say about the numbers; `from_config` refuses other keys.
KEYS = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings original_max_position_embeddings hidden_act rms_norm_eps rope_parameters rope_scaling "
    "rope_theta partial_rotary_factor sliding_window use_sliding_window max_window_layers layer_types attention_bias "
    "mlp_bias tie_word_embeddings attention_dropout pretraining_tp".split()
)

buffers = (r"(.*\.)?rotary_emb\.inv_freq", r"lm_head\.weight")  # lm_head: of a tied model, or beside a task head
carried: tuple[str, ...] = ()
renames: tuple[tuple[str, str], ...] = ()

roles = (
    (r"embed_tokens/embedding", "embed"),
    (r".*/self_attn/q_proj/kernel", "q"),
    (r".*/self_attn/k_proj/kernel", "k"),
    (r".*/self_attn/v_proj/kernel", "v"),
    (r".*/self_attn/o_proj/kernel", "o"),
    (r".*/mlp/up_proj/kernel", "up"),
    (r".*/mlp/gate_proj/kernel", "gate"),
    (r".*/mlp/down_proj/kernel", "down"),
    (r"(lm_head|score)/kernel", "head"),
)

sharding = (
    (r"embed_tokens/embedding", ("vocab", "embed")),
    (r"lm_head/kernel", ("embed", "vocab")),
    (r".*/q_proj/kernel", ("embed", "heads")),
    (r".*/[kv]_proj/kernel", ("embed", "kv_heads")),
    (r".*/o_proj/kernel", ("heads", "embed")),
    (r".*/(gate|up)_proj/kernel", ("embed", "mlp")),
    (r".*/down_proj/kernel", ("mlp", "embed")),
    (r".*/q_proj/bias", ("heads",)),
    (r".*/[kv]_proj/bias", ("kv_heads",)),
    (r".*/(gate|up)_proj/bias", ("mlp",)),
    (r"score/kernel", ("embed", "labels")),
    (r".*norm/scale", ("norm",)),
)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; returns the output and the cache's updated keys and values."""

    config: Config

    @nn.compact
    def __call__(self, x_BxTxD, angles, mask, stored, start, deterministic: bool, beside: Beside | None = None):
        c = self.config
        b, t, _ = x_BxTxD.shape

        def heads(name: str, count: int):
            flat = linear.Dense(count * c.head_dim, use_bias=c.qkv_bias, name=name)(x_BxTxD)
            return flat.reshape(b, t, count, c.head_dim)

        q = rotary.rotate(heads("q_proj", c.num_attention_heads), *angles)
        k = rotary.rotate(heads("k_proj", c.num_key_value_heads), *angles).transpose(0, 2, 1, 3)
        v = heads("v_proj", c.num_key_value_heads).transpose(0, 2, 1, 3)
        if stored is not None:
            k, v = caches.write(stored[0], k, start), caches.write(stored[1], v, start)
        dropout = layers.Dropout(c.attention_dropout, deterministic=deterministic)
        out = attend(q, k, v, mask, dropout.drawn(), beside, c.remat)
        return linear.Dense(c.hidden_size, use_bias=c.o_bias, name="o_proj")(out), (k, v)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    config: Config

    @nn.compact
    def __call__(self, x):
        c = self.config
        gate = linear.Dense(c.intermediate_size, use_bias=c.mlp_bias, name="gate_proj")(x)
        up = linear.Dense(c.intermediate_size, use_bias=c.mlp_bias, name="up_proj")(x)
        return linear.Dense(c.hidden_size, use_bias=c.mlp_bias, name="down_proj")(
            layers.ACTIVATIONS[c.hidden_act](gate) * up
        )


class Block(nn.Module):
    """One decoder layer."""

    config: Config

    @nn.compact
    def __call__(self, x, angles, mask, stored, start, deterministic: bool, beside: Beside | None = None):
        eps = self.config.rms_norm_eps
        h = layers.RMSNorm(eps, name="input_layernorm")(x)
        h, stored = Attention(self.config, name="self_attn")(h, angles, mask, stored, start, deterministic, beside)
        x = x + h
        h = layers.RMSNorm(eps, name="post_attention_layernorm")(x)
        return x + MLP(self.config, name="mlp")(h), stored


class Model(nn.Module):
    """Tokens to next-token logits, hidden states or class logits; see `Base.apply` for the arguments."""

    config: Config

    @nn.compact
    def __call__(
        self,
        tokens,
        attention_mask=None,
        *,
        positions=None,
        segment_ids=None,
        pool_at=None,
        targets=None,
        cache: Cache | None = None,
        deterministic: bool = True,
        output: str | None = None,
    ):
        c = self.config
        embed = linear.Embed(c.vocab_size, c.hidden_size, name="embed_tokens")
        x = embed(tokens)
        start = None
        if cache is not None:
            start = cache.filled
            real = jnp.ones(tokens.shape, bool) if attention_mask is None else attention_mask
            cache, found = caches.admit(cache, real)
            positions = found if positions is None else positions
        elif positions is None:
            positions = layers.default_positions(tokens, segment_ids)
        virtual = self._virtual(cache)
        if virtual is not None:
            positions = positions + virtual.length
        angles = rotary.tables(c.rope, c.head_dim, positions)
        kernel = kernels.kernel_for(kernels.device(), x.dtype, x.shape[1], c.head_dim)
        seen = {w: _mask(tokens, attention_mask, segment_ids, cache, start, w, kernel) for w in set(c.windows)}
        block = nn.remat(Block, static_argnums=(6,)) if c.remat else Block
        blocks = [block(c, name=f"layers_{i}") for i in range(c.num_hidden_layers)]
        beside = {} if virtual is None else self._beside(blocks, virtual, positions, x.dtype, deterministic)
        stores = []
        for i, window in enumerate(c.windows):
            stored = None if cache is None else (cache.keys[i], cache.values[i])
            x, stored = blocks[i](x, angles, seen[window], stored, start, deterministic, beside.get(i))
            stores.append(stored)
        x = layers.RMSNorm(c.rms_norm_eps, name="norm")(x)
        out = x if output == "hidden" else self._head(x, embed, tokens, attention_mask, segment_ids, pool_at, targets)
        if cache is None:
            return out
        keys, values = zip(*stores, strict=True)
        if virtual is not None and virtual.prompt_NxD is not None:
            # At every call, so that a lifted function counts the embeddings as used by a call that has its cache.
            pairs = tuple((own.keys_KxNxD, own.values_KxNxD) for own in beside.values())
            cache = cache._replace(prompt=ReadPrompt(virtual.prompt_NxD, pairs))
        return out, cache._replace(keys=keys, values=values)

    def _virtual(self, cache: Cache | None) -> Virtual | None:
        """The call's virtual tokens. A prompt enters with the first tokens of a cache, which then holds it."""
        c = self.config
        sizes = {"layers": c.num_hidden_layers, "width": c.hidden_size}
        virtual = virtual_tokens.read(self, **sizes, kv_heads=c.num_key_value_heads, head_dim=c.head_dim)
        if cache is None or cache.prompt is None:
            return virtual
        held = {i: Beside(*pair) for i, pair in enumerate(cache.prompt.layers)}
        embeddings = cache.prompt.embeddings_NxD if virtual is None else virtual.prompt_NxD
        return Virtual(cache.prompt.embeddings_NxD.shape[0], embeddings, held)

    def _beside(self, blocks, virtual: Virtual, positions, dtype, deterministic: bool) -> dict[int, Beside]:
        """Keys and values of the virtual tokens, for every layer that has some.

        No token sees a later one, so a prompt's hidden states do not depend on the text: they are computed once for all
        rows and all packed segments, and from there on a prompt is a prefix.
        """
        c, out = self.config, dict(virtual.prefix)
        if virtual.prompt_NxD is not None and not out:
            slots = jnp.arange(virtual.length, dtype=jnp.int32)
            angles = rotary.tables(c.rope, c.head_dim, slots[None])
            x = virtual.prompt_NxD.astype(dtype)[None]
            for i, window in enumerate(c.windows):
                mask = masks.visible(slots, slots, causal=True, window=window)
                x, (k, v) = blocks[i](x, angles, mask, None, None, deterministic)
                out[i] = Beside(k[0], v[0])
        seen = {w: virtual_tokens.in_window(positions, virtual.length, w) for w in set(c.windows)}
        return {i: own._replace(mask_BxTxN=seen[c.windows[i]]) for i, own in out.items()}

    def _head(self, x, embed, tokens, attention_mask, segment_ids, pool_at, targets):
        """Class logits at the pooled slots, or next-token logits, at all slots unless `pool_at` names some; all of
        these, or what they say of targets."""
        c = self.config
        if c.num_labels is None:
            x = x if pool_at is None else layers.take(x, pool_at)
            if c.tie_word_embeddings:
                return embed.attend(x, targets)
            return linear.Head(c.vocab_size, name="lm_head")(x, targets)
        at = pool_at if pool_at is not None else self._last(tokens, attention_mask, segment_ids)[:, None]
        logits = linear.Dense(c.num_labels, use_bias=False, name="score")(layers.take(x, at))
        return logits if pool_at is not None else logits[:, 0]

    def _last(self, tokens, attention_mask, segment_ids):
        """The last real token: by the mask if there is one, else by the padding id, else the last slot."""
        if attention_mask is not None:
            return layers.last_real(attention_mask)
        if segment_ids is not None:
            return layers.last_real(segment_ids > 0)
        if self.config.pad_token_id is not None:
            return layers.last_real(tokens != self.config.pad_token_id)
        return jnp.full((tokens.shape[0],), tokens.shape[1] - 1, jnp.int32)


def _mask(
    tokens, attention_mask, segment_ids, cache: Cache | None, start, window: int | None, kernel: str | None
) -> jax.Array | Mask | None:
    length = tokens.shape[1]
    if cache is None:
        own = {"key_mask_BxT": attention_mask, "segments_BxT": segment_ids}
        return masks.among(length, kernel, **own, causal=True, window=window)
    slots, keys = (jnp.arange(n, dtype=jnp.int32) for n in (length, cache.valid.shape[1]))
    return masks.visible(slots + start, keys, key_mask_BxS=cache.valid, causal=True, window=window)


def init_cache(config: Config, batch: int, length: int, dtype: Any) -> Cache:
    """An empty cache for `batch` rows of up to `length` tokens."""
    return caches.empty(config.num_hidden_layers, batch, config.num_key_value_heads, length, config.head_dim, dtype)


def architecture(config: Config, num_labels: int | None) -> str:
    """The class of transformers that reads what `save_pretrained` writes."""
    stem = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[config.model_type]
    return stem + ("ForCausalLM" if num_labels is None else "ForSequenceClassification")


def tensors(config: Config, num_labels: int | None) -> dict[str, Tensor]:
    """Our paths -> the tensors of a checkpoint in Hugging Face layout."""
    out = {"embed_tokens/embedding": Tensor("model.embed_tokens.weight")}
    for i in range(config.num_hidden_layers):
        out |= _layer_tensors(config, f"layers_{i}", f"model.layers.{i}")
    out["norm/scale"] = Tensor("model.norm.weight")
    if num_labels is not None:
        out["score/kernel"] = Tensor("score.weight", transpose=True)
    elif not config.tie_word_embeddings:
        out["lm_head/kernel"] = Tensor("lm_head.weight", transpose=True)
    return out


def _layer_tensors(config: Config, ours: str, theirs: str) -> dict[str, Tensor]:
    out = {}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        out[f"{ours}/{norm}/scale"] = Tensor(f"{theirs}.{norm}.weight")
    biased = {f"self_attn/{p}_proj": config.qkv_bias for p in "qkv"} | {"self_attn/o_proj": config.o_bias}
    biased |= {f"mlp/{p}_proj": config.mlp_bias for p in ("gate", "up", "down")}
    for module, bias in biased.items():
        name = f"{theirs}.{module.replace('/', '.')}"
        out[f"{ours}/{module}/kernel"] = Tensor(f"{name}.weight", transpose=True)
        if bias:
            out[f"{ours}/{module}/bias"] = Tensor(f"{name}.bias")
    return out
