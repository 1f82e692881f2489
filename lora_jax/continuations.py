"""Text that a model writes for the records of a task, and its score: what a loss does not show."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax import data
from lora_jax.errors import UserError
from lora_jax.generate import generate
from lora_jax.models import Base
from lora_jax.settings import Generate
from lora_jax.tasks import Task


class Written(NamedTuple):
    """Attributes:
    texts: one per record, special tokens left out.
    metrics: from `task.score`; empty where no record was given.
    rows: one JSON object per record: id, prompt, text, references.
    """

    texts: list[str]
    metrics: dict[str, float]
    rows: list[dict[str, Any]]


def can_write(task: Task) -> bool:
    """True for a task whose examples have a prompt to continue."""
    return task.prompt is not None


def write(
    base: Base,
    variables: Mapping[str, Any],
    task: Task,
    records: Sequence[data.Record],
    settings: Generate,
    *,
    apply: Callable | None = None,
    seed: int = 0,
) -> Written:
    """Continues the prompt of every record and compares with its references.

    Args:
      base: a decoder.
      variables: its weights, or what `adapter.bind` returned.
      task: one that generates.
      records: of one split.
      settings: length and temperature.
      apply: `lift(base.apply)` where `variables` holds adapted weights.
      seed: of the draws, where the temperature is not 0.

    Raises:
      UserError: a task that does not generate.
    """
    if task.prompt is None or task.references is None or task.score is None:
        raise UserError(f"the task {task.name!r} generates no text; use sft")
    prompts = [task.prompt(record) for record in records]
    tokens = generate(
        base,
        variables,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=seed,
        apply=apply,
    )
    texts = [decode(base, ids) for ids in tokens]
    references = [task.references(record) for record in records]
    rows = [
        {"id": i, "prompt": decode(base, p), "text": t, "references": r}
        for i, (p, t, r) in enumerate(zip(prompts, texts, references, strict=True))
    ]
    return Written(texts, dict(task.score(texts, references)) if rows else {}, rows)


def decode(base: Base, ids: Sequence[int]) -> str:
    """Text of tokens, special ones left out."""
    return base.tokenizer.decode(list(ids), skip_special_tokens=True).strip()
