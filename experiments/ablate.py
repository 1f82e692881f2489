"""Runs an ablation: every arm of the grid that has no result yet. The same command again finishes what is missing.

python -m experiments.ablate --config=configs/ablations/rank.py --workdir=runs/rank [--dry_run] [--config.a.b=value ...]
"""

import functools

from absl import flags

from experiments import launch, shown, workdir
from lora_jax import config as config_lib
from lora_jax.ablation import expand, planner, run, survey
from lora_jax.errors import UserError

DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the arms and what they cost, and train nothing.")
TOGETHER = flags.DEFINE_integer("arms_together", planner.MOST, "Arms that train in one program at most; 1 packs none.")
MEMORY = flags.DEFINE_float("memory_gb", None, "Memory for the arms of a pack; half of the machine's unless told.")


def main() -> None:
    cfg, spec = launch.config(), launch.config_file()
    if spec is None:
        raise UserError("--config=FILE is needed: an ablation, such as configs/ablations/rank.py")
    arms = expand(
        launch.load_sweep(spec, cfg),
        functools.partial(config_lib.variant, cfg, overrides=launch.overrides()),
        launch.overrides(),
    )
    if DRY_RUN.value:
        print(survey.table(arms, survey.survey(arms)))
        return
    folder = workdir.path()
    if TOGETHER.value < 1:
        raise UserError(f"--arms_together={TOGETHER.value}: expected at least 1, which trains each arm by itself")
    shown.banner(folder)
    rows = run.run(
        arms, folder, most=TOGETHER.value, memory=None if MEMORY.value is None else MEMORY.value * 1e9, echo=say
    )
    failed = sum(row["status"] == "failed" for row in rows)
    print(f"\n{len(rows) - failed} arms done, {failed} failed; {folder / run.RESULTS}")


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    launch.run(main)
