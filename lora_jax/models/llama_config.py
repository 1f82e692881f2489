"""The options of the Llama family, read from config.json and written back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax.errors import UserError
from lora_jax.models import layers, options, rotary

# Where the three differ when config.json says nothing (transformers' defaults).
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False, "max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    "qwen2": {
        "sliding_window": 4096,
        "use_sliding_window": False,
        "max_window_layers": 28,
        "max_position_embeddings": 32768,
    },
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and options of one model; hashable. Names are config.json's wherever it has one for the thing.

    `windows` has one entry per layer: how many keys a query sees there, or None for all.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: rotary.Rope
    windows: tuple[int | None, ...]
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    num_labels: int | None = None
    remat: bool = False  # activations inside a layer are computed again in the backward pass

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "Config":
        """Reads the dictionary of a config.json; an option that is not implemented is a UserError."""
        kind = raw.get("model_type", "llama")
        raw = {**DEFAULTS[kind], **raw}
        layer_count = options.integer(raw, "num_hidden_layers")
        options.only(raw, {} if kind == "qwen2" else {"layer_types": (None, ["full_attention"] * layer_count)})
        heads = options.integer(raw, "num_attention_heads")
        width = options.integer(raw, "hidden_size")
        bias = kind == "qwen2" or (kind == "llama" and options.flag(raw, "attention_bias", False))
        config = cls(
            model_type=kind,
            vocab_size=options.integer(raw, "vocab_size"),
            hidden_size=width,
            intermediate_size=options.integer(raw, "intermediate_size"),
            num_hidden_layers=layer_count,
            num_attention_heads=heads,
            num_key_value_heads=options.integer(raw, "num_key_value_heads", heads),
            head_dim=options.integer(raw, "head_dim", max(1, width // heads)),
            max_position_embeddings=options.integer(raw, "max_position_embeddings"),
            rope=rotary.Rope.from_hf(raw),
            windows=_windows(kind, raw, layer_count),
            hidden_act=layers.check_activation(raw.get("hidden_act", "silu")),
            rms_norm_eps=options.number(raw, "rms_norm_eps", 1e-6),
            qkv_bias=bias,
            o_bias=bias and kind == "llama",
            mlp_bias=kind == "llama" and options.flag(raw, "mlp_bias", False),
            tie_word_embeddings=options.flag(raw, "tie_word_embeddings", False),
            attention_dropout=options.number(raw, "attention_dropout", 0.0),
            initializer_range=options.number(raw, "initializer_range", 0.02),
            pad_token_id=raw.get("pad_token_id"),
            eos_token_ids=options.token_ids(raw, "eos_token_id"),
        )
        return config._checked()

    def _checked(self) -> "Config":
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"config.json: num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"config.json: rotary positions need an even head_dim, got {self.head_dim}")
        return self

    def with_dropout(self, rate: float) -> "Config":
        """Every dropout rate replaced."""
        return dataclasses.replace(self, attention_dropout=rate)

    def to_hf(self) -> dict[str, Any]:
        """The dictionary of a config.json that `from_hf` reads back."""
        same = (
            "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
            "num_key_value_heads head_dim max_position_embeddings hidden_act rms_norm_eps tie_word_embeddings "
            "attention_dropout initializer_range pad_token_id"
        )
        out: dict[str, Any] = {name: getattr(self, name) for name in same.split()}
        eos = self.eos_token_ids
        out |= {
            "rope_parameters": self.rope.to_hf(),
            "eos_token_id": list(eos) if len(eos) > 1 else (eos or (None,))[0],
        }
        if self.model_type == "llama":
            out |= {"attention_bias": self.qkv_bias, "mlp_bias": self.mlp_bias}
        if self.model_type == "mistral":
            out["sliding_window"] = self.windows[0]
        if self.model_type == "qwen2":
            used = next((w for w in self.windows if w is not None), None)
            kinds = ["full_attention" if w is None else "sliding_attention" for w in self.windows]
            out |= {"use_sliding_window": used is not None, "sliding_window": used, "layer_types": kinds}
        return out


def _windows(kind: str, raw: Mapping[str, Any], count: int) -> tuple[int | None, ...]:
    """The sliding window of every layer: Mistral's are all alike, Qwen2 names the layers that slide."""
    if kind == "llama" or raw.get("sliding_window") is None:
        return (None,) * count
    window: int | None = options.integer(raw, "sliding_window")
    if kind == "mistral":
        return (window,) * count
    if not options.flag(raw, "use_sliding_window", False):
        window = None
    kinds = raw.get("layer_types")
    if kinds is None:
        start = raw["max_window_layers"]
        return tuple(window if i >= start else None for i in range(count))
    if len(kinds) != count or set(kinds) - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"config.json: layer_types must name full_attention or sliding_attention {count} times, got {kinds!r}"
        )
    return tuple(window if k == "sliding_attention" else None for k in kinds)
