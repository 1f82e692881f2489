"""What an adapter is worth: the metrics of a split, and the text that it writes for a split's records."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax import data, evaluate, feed, sharding
from lora_jax.assemble import Parts
from lora_jax.errors import UserError
from lora_jax.generate import generate
from lora_jax.lift import lift
from lora_jax.models import Base
from lora_jax.settings import Config, Generate
from lora_jax.tasks import Task


class Written(NamedTuple):
    """Attributes:
    texts: one per record, special tokens left out.
    metrics: from `task.score`; empty where no record was given.
    rows: one JSON object per record: id, prompt, text, references.
    """

    texts: list[str]
    metrics: dict[str, Any]
    rows: list[dict[str, Any]]


def measure(config: Config, parts: Parts, delta: Any, split: str) -> tuple[evaluate.Evaluation, list[dict[str, Any]]]:
    """Evaluates a delta on one split, every example once.

    Args:
      config: of the run.
      parts: of the run.
      delta: of the adapter; None evaluates the base.
      split: train, dev or test.

    Returns:
      The evaluation, and one JSON object per example.

    Raises:
      UserError: the data has no such split.
    """
    found = parts.splits.get(split)
    if not found:
        raise UserError(f"the data has no split {split!r}; it has {', '.join(k for k, v in parts.splits.items() if v)}")
    records = parts.task.prepare(found)
    base, mesh = parts.base, parts.mesh
    batches = feed.make_batches(
        parts.task, found, config.train, seed=config.seed, max_length=config.data.max_length, mesh=mesh,
        adapter=parts.adapter,
    )  # fmt: skip
    specs = None if mesh is None else sharding.base_specs(base.variables, base.family.sharding, mesh)
    with sharding.use(mesh):
        variables = sharding.place_base(base.variables, specs, mesh)
        step = evaluate.make_eval_step(lift(base.apply), None if delta is None else parts.adapter, parts.task)
        result = evaluate.evaluate(step, variables, delta, parts.task, batches, mesh=mesh)
    assert result is not None  # Nothing asked it to stop.
    return result, evaluate.predictions(parts.task, records, result)


def can_write(task: Task) -> bool:
    """True for a task whose examples have a prompt to continue."""
    return task.prompt is not None


def reply(
    base: Base,
    variables: Mapping[str, Any],
    task: Task,
    records: Sequence[data.Record],
    settings: Generate,
    *,
    apply: Callable | None = None,
    seed: int = 0,
) -> list[str]:
    """Continues the prompt of every record.

    Args:
      base: a decoder.
      variables: its weights, or what `adapter.bind` returned.
      task: one that generates.
      records: with what the task needs of a prompt.
      settings: length and temperature.
      apply: `lift(base.apply)` where `variables` holds adapted weights.
      seed: of the draws, where the temperature is not 0.

    Returns:
      One text per record, special tokens left out.

    Raises:
      UserError: a task that does not generate.
    """
    if task.prompt is None:
        raise UserError(f"the task {task.name!r} generates no text; use sft")
    tokens = generate(
        base,
        variables,
        [task.prompt(record) for record in records],
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=seed,
        apply=apply,
    )
    return [decode(base, ids) for ids in tokens]


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
    """As `reply`, and compares with the records' references."""
    texts = reply(base, variables, task, records, settings, apply=apply, seed=seed)
    if not texts:
        return Written([], {}, [])
    assert task.prompt is not None and task.references is not None and task.score is not None
    references = [task.references(record) for record in records]
    prompts = [decode(base, task.prompt(record)) for record in records]
    rows = [
        {"id": i, "prompt": p, "text": t, "references": r}
        for i, (p, t, r) in enumerate(zip(prompts, texts, references, strict=True))
    ]
    return Written(texts, dict(task.score(texts, references)), rows)


def decode(base: Base, ids: Sequence[int]) -> str:
    """Text of tokens, special ones left out."""
    return base.tokenizer.decode(list(ids), skip_special_tokens=True).strip()
