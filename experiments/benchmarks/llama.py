"""The work of the rows on Llama: sizes, random weights, random tokens through the real task and the real batches.

Random weights and tokens cost what trained ones do, and both sides can make them. Everything goes through the library's
own stations (task, batches, optimizer, step), so that what a run gains is gained here.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

import lora_jax as lj
from lora_jax import optim, tasks
from lora_jax.data import Batches, Record
from lora_jax.models import quantized
from lora_jax.step import init_state, make_train_step

SMALL = dict(
    model_type="llama", vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
    num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=2048,
)  # fmt: skip
# The sizes of Llama-3.2-1B.
BILLION = dict(
    model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
    num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=8192, rope_theta=500000.0,
    tie_word_embeddings=True,
)  # fmt: skip
TOY = dict(
    model_type="llama", vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip
LINEARS = "q,k,v,o,gate,up,down"
DISTINCT = 4  # batches that the steps take in turn
RATE = 1e-3


class Numbers:
    """A tokenizer for texts that are token ids."""

    bos_token_id = eos_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split() if word.isdigit()]}


class Work(NamedTuple):
    """One LoRA run on random weights.

    Attributes:
      base, adapter, task: of the library.
      batches: to index with a step.
      settings: as given.
    """

    base: Any
    adapter: Any
    task: Any
    batches: Batches
    settings: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.settings["batch"] * self.settings["length"]

    @property
    def matrix_params(self) -> int:
        """Weights that are multiplied with every token: all matrices, and an embedding only if it is the head too."""
        tied = self.base.config.tie_word_embeddings
        sites = self.base.sites.values()
        return sum(int(np.prod(s.shape)) for s in sites if s.is_matrix and (tied or "embedding" not in s.uses))

    @property
    def weight_bytes(self) -> int:
        """Of the frozen base."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.base.variables))


def work(settings: dict[str, Any]) -> Work:
    """Makes the run that some settings describe: model, batch, length, rank, dtype, quant."""
    base = lj.from_config(settings["model"], dtype=settings["dtype"], remat=settings.get("remat", False))
    base = quantized(base, settings["quant"]) if settings.get("quant") else base
    adapter = lj.lora(rank=settings["rank"], alpha=2 * settings["rank"], targets=LINEARS)
    task, batches = texts(base.config.vocab_size, settings["batch"], settings["length"])
    return Work(base, adapter, task, batches, settings)


def texts(vocabulary: int, batch: int, length: int) -> tuple[Any, Batches]:
    """The task of language modelling, and batches of random tokens whose every row is full."""
    draw = np.random.default_rng(0).integers(1, vocabulary, DISTINCT * batch * length + 1)
    splits = {"train": [Record({"text": " ".join(map(str, draw))})]}
    task = tasks.get("language_modeling")(
        tokenizer=Numbers(), max_length=length, splits=splits, chunks="contiguous", separator=" "
    )
    examples = [task.encode(record) for record in task.prepare(splits["train"])]
    return task, Batches(examples, batch_size=batch, max_length=length)


def starts(given: Work, rank: int | None = None, seed: int = 0) -> tuple[Any, Any]:
    """(adapter, first delta); of another rank or seed if told."""
    adapter = given.adapter if rank is None else lj.lora(rank=rank, alpha=2 * rank, targets=LINEARS)
    return adapter, adapter.init(jax.random.key(seed), given.base.variables, given.base.sites)


def stepper(given: Work, accumulate: int = 1, form: str = "auto") -> tuple[Any, Any]:
    """(the jitted step, its first state): AdamW on the factors alone, the batch in so many micro-batches; `form` as of
    `lift`."""
    adapter, delta = starts(given)
    mask, tx = adapter.trainable(delta), optim.make_optimizer(RATE)
    step = make_train_step(lj.lift(given.base.apply, form=form), adapter, given.task, tx, mask, accumulate=accumulate)
    return step, init_state(delta, mask, tx)


def placed(given: Work) -> list[Any]:
    """The distinct batches, on the device."""
    return [jax.device_put(given.batches[i]) for i in range(DISTINCT)]
