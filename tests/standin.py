"""A small world to train in: a Linen model of two products, a task on token sequences, records that can be learned."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import trees
from lora_jax.data import Record
from lora_jax.lift import find_sites
from lora_jax.likelihood import cross_entropy
from lora_jax.tasks import base as tasks

VOCAB, WIDTH = 12, 8


class Model(nn.Module):
    """Embedding, one hidden layer, logits. Predicts the next token from the current one alone."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, tokens, deterministic=True):
        x = nn.Embed(VOCAB, WIDTH, name="embed")(tokens)
        x = nn.tanh(nn.Dense(2 * WIDTH, name="up")(x))
        x = nn.Dropout(self.dropout, deterministic=deterministic)(x)
        return nn.Dense(VOCAB, name="down")(x)


@dataclasses.dataclass(frozen=True, eq=False)
class Base:
    """What `fit` uses of a base."""

    apply: Any
    variables: Any

    @property
    def family(self):
        return SimpleNamespace(sharding=((r"up/kernel", ("embed", "mlp")), (r"down/kernel", ("mlp", "embed"))))

    @functools.cached_property
    def sites(self):
        return find_sites(self.apply, self.variables, jnp.zeros((2, 3), jnp.int32))

    @functools.cached_property
    def fingerprint(self):
        return trees.fingerprint(self.variables)


@functools.cache
def make_base(dropout: float = 0.0) -> Base:
    model = Model(dropout)

    def apply(variables, tokens, attention_mask=None, *, dropout_key=None):
        del attention_mask  # no token sees another
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        return model.apply(variables, tokens, dropout_key is None, rngs=rngs)

    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(0, 0.5, shape).astype(np.float32))  # noqa: E731
    params = {
        "embed": {"embedding": draw(VOCAB, WIDTH)},
        "up": {"kernel": draw(WIDTH, 2 * WIDTH), "bias": draw(2 * WIDTH)},
        "down": {"kernel": draw(2 * WIDTH, VOCAB), "bias": draw(VOCAB)},
    }
    return Base(apply, {"params": params})


def make_records(count: int, seed: int = 0) -> list[Record]:
    """Sequences of 2 to 6 tokens in which each token is the last one plus 3, modulo the vocabulary."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        start = 1 + int(rng.integers(VOCAB - 1))
        length = 2 + int(rng.integers(5))
        out.append(Record({"tokens": [(start + 3 * j) % VOCAB for j in range(length)]}, f"made line {i + 1}"))
    return out


def make_splits(train: int = 24, dev: int = 10, test: int = 7) -> dict[str, list[Record]]:
    return {"train": make_records(train, 0), "dev": make_records(dev, 1), "test": make_records(test, 2)}


def _encode(record):
    tokens = np.asarray(record.values["tokens"], np.int32)
    weights = np.ones(len(tokens), np.float32)
    weights[-1] = 0
    return {"tokens": tokens, "targets": np.roll(tokens, -1), "weights": weights}


def _nll(outputs, batch):
    return tasks.weighted(cross_entropy(outputs, batch["targets"]), batch["weights"])


def _hits(outputs, batch):
    return tasks.weighted((jnp.argmax(outputs, -1) == batch["targets"]).astype(jnp.float32), batch["weights"])


def _by_segment(values_BxT, batch):
    """(B, S): the sum over each segment of a row."""
    number = jnp.arange(1, batch["ids"].shape[1] + 1, dtype=jnp.int32)
    inside_BxTxS = batch["segment_ids"][:, :, None] == number[None, None, :]
    return jnp.sum(jnp.where(inside_BxTxS, values_BxT[:, :, None], 0.0), axis=1)


def make_task() -> tasks.Task:
    return tasks.Task(
        name="standin",
        options={},
        encode=_encode,
        inputs=tasks.inputs,
        loss=lambda o, b: (jnp.sum(_nll(o, b)), jnp.sum(b["weights"])),
        sums=lambda o, b: {
            "nll": jnp.sum(_nll(o, b)),
            "hits": jnp.sum(_hits(o, b)),
            "weight": jnp.sum(b["weights"]),
        },  # fmt: skip
        summary=lambda s: {"loss": tasks.ratio(s["nll"], s["weight"]), "accuracy": tasks.ratio(s["hits"], s["weight"])},
        per_example=lambda o, b: {"loss": _by_segment(_nll(o, b), b)},
        prediction=lambda record, values: {"tokens": record.values["tokens"], **values},
        preview=lambda example: str(example),
        better=("loss", "min"),
    )


def same(a: Any, b: Any) -> bool:
    """Bit for bit equal trees."""
    flat_a, flat_b = jax.tree.leaves(a), jax.tree.leaves(b)
    same_shape = jax.tree.structure(a) == jax.tree.structure(b)
    return same_shape and all(trees.leaf_hash(x) == trees.leaf_hash(y) for x, y in zip(flat_a, flat_b, strict=True))
