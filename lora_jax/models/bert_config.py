"""The options of the BERT family, read from config.json and written back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax.errors import UserError
from lora_jax.models import layers, options


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and options of one model; hashable. Names are config.json's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    num_labels: int | None = None
    remat: bool = False  # activations inside a layer are computed again in the backward pass
    model_type: str = "bert"

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """An encoder makes no text."""
        return ()

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "Config":
        """Reads the dictionary of a config.json; an option that is not implemented is a UserError."""
        off = (None, False)
        absolute = (None, "absolute")
        options.only(raw, {"position_embedding_type": absolute, "is_decoder": off, "add_cross_attention": off})
        head = raw.get("classifier_dropout")
        config = cls(
            vocab_size=options.integer(raw, "vocab_size"),
            hidden_size=options.integer(raw, "hidden_size"),
            intermediate_size=options.integer(raw, "intermediate_size"),
            num_hidden_layers=options.integer(raw, "num_hidden_layers"),
            num_attention_heads=options.integer(raw, "num_attention_heads"),
            max_position_embeddings=options.integer(raw, "max_position_embeddings", 512),
            type_vocab_size=options.integer(raw, "type_vocab_size", 2),
            hidden_act=layers.check_activation(raw.get("hidden_act", "gelu")),
            layer_norm_eps=options.number(raw, "layer_norm_eps", 1e-12),
            hidden_dropout_prob=options.number(raw, "hidden_dropout_prob", 0.1),
            attention_probs_dropout_prob=options.number(raw, "attention_probs_dropout_prob", 0.1),
            classifier_dropout=None if head is None else options.number(raw, "classifier_dropout", 0.0),
            initializer_range=options.number(raw, "initializer_range", 0.02),
            pad_token_id=raw.get("pad_token_id", 0),
        )
        if config.hidden_size % config.num_attention_heads:
            raise UserError(
                f"config.json: hidden_size={config.hidden_size} is not a multiple of "
                f"num_attention_heads={config.num_attention_heads}"
            )
        return config

    def with_dropout(self, rate: float) -> "Config":
        """Every dropout rate replaced."""
        return dataclasses.replace(
            self, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate, classifier_dropout=rate
        )

    def to_hf(self) -> dict[str, Any]:
        """The dictionary of a config.json that `from_hf` reads back."""
        out = dataclasses.asdict(self)
        del out["num_labels"], out["remat"]
        return out
