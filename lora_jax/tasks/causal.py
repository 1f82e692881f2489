"""What the objectives of language models share: next-token loss, perplexity, loss per example.

An example holds `tokens` (T,), `targets` (T,): the token that follows each, and `weights` (T,): 1 where the target is
learned.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.data.records import Record
from lora_jax.tasks import base


def example(ids: Sequence[int], learned: Sequence[bool]) -> base.Example:
    """Makes an example.

    Args:
      ids: N tokens; the row holds N - 1 of them, since the last is only a target.
      learned: N flags; the first one is never used, since nothing precedes the first token.

    Returns:
      tokens, targets int32 and weights float32, (N - 1,) each.
    """
    tokens = np.asarray(ids, np.int32)
    return {"tokens": tokens[:-1], "targets": tokens[1:], "weights": np.asarray(learned, np.float32)[1:]}


def start(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token where the tokenizer puts one before every text, else nothing."""
    first = list(tokenizer("a")["input_ids"])[:1]
    return first if first and first[0] == tokenizer.bos_token_id else []


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text without any special token that the text does not spell."""
    return list(tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"])


def inputs(batch):
    """As of `base`, with the targets: the model then returns likelihoods, and no logits of the whole batch."""
    return {**base.inputs(batch), "targets": batch["targets"]}


def loss(outputs, batch):
    """(sum, weight) of the next-token loss; outputs (B,T), the negative log likelihood of each target."""
    return jnp.sum(base.weighted(outputs, batch["weights"])), jnp.sum(batch["weights"])


def sums(outputs, batch):
    """What `summary` needs, additive over batches."""
    total, weight = loss(outputs, batch)
    return {"loss": total, "weight": weight}


def summary(totals: Mapping[str, Any]) -> dict[str, float]:
    """Mean loss per target token, in nats, and its exponential."""
    mean = base.ratio(totals["loss"], totals["weight"])
    return {"loss": mean, "perplexity": math.exp(mean) if mean < 700 else math.inf if mean == mean else mean}


def per_example(outputs, batch):
    """Summed loss and number of target tokens of each segment, (B,S) each."""
    nll_BxT = base.weighted(outputs, batch["weights"])
    numbers_S = jnp.arange(1, batch["ids"].shape[1] + 1)
    own_BxTxS = (batch["segment_ids"][:, :, None] == numbers_S[None, None, :]).astype(jnp.float32)
    return {
        "loss": jnp.einsum("bt,bts->bs", nll_BxT, own_BxTxS),
        "tokens": jnp.einsum("bt,bts->bs", batch["weights"], own_BxTxS),
    }


def prediction(record: Record, values: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the predictions file: the mean loss of the example and the tokens it is over."""
    mean = base.ratio(values["loss"], values["tokens"])
    return {"where": record.where, "loss": mean if math.isfinite(mean) else None, "tokens": int(values["tokens"])}
