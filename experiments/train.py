"""Trains one run: what a config says, from data to a saved adapter. The same command again resumes it.

python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart [--config.adapter.rank=4 ...]
"""

from experiments import environment

environment.prepare(__name__)  # before the imports: it may start the process again

import sys
from pathlib import Path
from typing import Any

from experiments import launch, shown, workdir
from lora_jax import assess, records
from lora_jax import config as config_lib
from lora_jax.assemble import PEFT_CONFIG, Parts, assemble, save_adapter, start_data
from lora_jax.lift import lift
from lora_jax.settings import Config
from lora_jax.train import fit, init_delta


def main() -> None:
    folder = workdir.path()
    cfg = launch.config()
    config = config_lib.resolve(cfg, launch.overrides())
    workdir.check(folder, cfg)
    shown.banner(folder)
    parts = assemble(config)
    start = init_delta(parts.base, parts.adapter, config.seed, start_data(config, parts))
    shown.selection(config, parts, start)
    fresh = not (folder / workdir.SUMMARY).exists()
    compare = fresh and config.generate.score > 0 and assess.can_write(parts.task)
    apply = lift(parts.base.apply)
    before = look(config, parts, start, apply, "before training") if compare else {}
    workdir.claim(folder, cfg)

    shown.title("training")
    names = [name for name in ("tensorboard", "wandb") if getattr(config.log, name)]
    summary = fit(
        parts.base,
        parts.adapter,
        parts.task,
        parts.splits,
        config.train,
        folder,
        seed=config.seed,
        mesh=parts.mesh,
        max_length=config.data.max_length,
        writers=records.make_writers(names, folder, cfg.to_dict()) if fresh else (),
        about={"config": cfg.to_dict(), "overrides": launch.overrides()},
        save=lambda where, delta: save_adapter(where, parts, delta),
        start=start,
    )
    if compare:
        after = look(config, parts, summary.delta, apply, "after training")
        shown.title("dev, before -> after")
        shown.comparison(before, after)
    shown.ending(folder, summary, following(folder, parts))


def look(config: Config, parts: Parts, delta: Any, apply: Any, when: str) -> dict[str, Any]:
    """Dev loss and scored generations of a delta, some of them shown."""
    shown.title(when)
    metrics = assess.measure(config, parts, delta, "dev")[0].metrics
    written = assess.write(
        parts.base,
        parts.adapter.bind(parts.base.variables, delta),
        parts.task,
        parts.splits["dev"][: config.generate.score],
        config.generate,
        apply=apply,
        seed=config.seed,
    )
    shown.generations(written, config.generate.show)
    print(f"dev: {shown.scores({**metrics, **written.metrics})} ({len(written.rows)} generations)", flush=True)
    return {**metrics, **written.metrics}


def following(folder: Path, parts: Parts) -> list[str]:
    """Commands that make sense after this run."""
    here, cwd = Path(sys.executable), Path.cwd()
    python = here.relative_to(cwd) if here.is_relative_to(cwd) else "python"  # `make quickstart` leaves .venv inactive
    commands = [f"{python} -m experiments.evaluate --workdir={folder} --split=test"]
    if assess.can_write(parts.task):
        prompt = parts.splits["dev"][0].values.get("prompt") or "..."
        commands.append(f"{python} -m experiments.generate --workdir={folder} --prompt={prompt!r}")
    if (folder / workdir.ADAPTER / PEFT_CONFIG).exists():
        commands.append(f"{python} -m experiments.export --workdir={folder} --format=peft --out={folder}/peft")
    return commands


if __name__ == "__main__":
    launch.run(main)
