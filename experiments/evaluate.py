"""Evaluates a finished run on one split: the task's metrics, and for a task that generates the score of its text.

python -m experiments.evaluate --workdir=runs/quickstart --split=test [--config.data.limit=100]
"""

from experiments import environment

environment.prepare(__name__)  # before the imports: it may start the process again

from absl import flags

from experiments import launch, shown, workdir
from lora_jax import assess, records
from lora_jax import config as config_lib
from lora_jax.assemble import assemble, load_adapter
from lora_jax.errors import UserError, did_you_mean
from lora_jax.lift import lift

SPLITS = ("train", "dev", "test")
SPLIT = flags.DEFINE_string("split", "test", "train, dev or test.")


def main() -> None:
    folder, split = workdir.path(), SPLIT.value
    if split not in SPLITS:
        raise UserError(f"--split={split}: {did_you_mean(split, SPLITS)}")
    cfg = launch.config()
    workdir.check_finished(folder, cfg)
    config = config_lib.resolve(cfg)
    shown.banner(folder)
    parts = assemble(config)
    adapter, delta = load_adapter(folder / workdir.ADAPTER, parts.base)
    parts = parts._replace(adapter=adapter)
    result, rows = assess.measure(config, parts, delta, split)
    metrics = dict(result.metrics)
    if assess.can_write(parts.task):
        bound = adapter.bind(parts.base.variables, delta)
        found = parts.splits[split]
        apply = lift(parts.base.apply)
        written = assess.write(parts.base, bound, parts.task, found, config.generate, apply=apply, seed=config.seed)
        rows = [{**row, **new} for row, new in zip(rows, written.rows, strict=True)]
        metrics |= written.metrics
        shown.generations(written, config.generate.show)
    records.write_jsonl(folder / "evaluation" / f"{split}.jsonl", rows)
    records.write_json(folder / "evaluation" / f"{split}.json", {"split": split, "examples": len(rows), **metrics})
    print(f"{split}: {shown.scores(metrics)} ({len(rows)} examples; {folder / 'evaluation' / split}.jsonl)")


if __name__ == "__main__":
    launch.run(main, base=workdir.read)
