"""Runs an ablation: every arm of the grid that has no result yet. The same command again finishes what is missing.

python -m experiments.ablate --config=configs/ablations/rank.py --workdir=runs/rank [--dry_run] [--config.a.b=value ...]
    [--launcher=local|ray|slurm] [--launcher_options=name=value,...]  (options: ablation/running/launchers/)

Exit code 0 once every arm has an end: an arm that failed is a row with its reason, and as much a result as the others.
2 where no arm has a result at all.
"""

from experiments import environment

environment.prepare(__name__)  # before the imports: it may start the process again

import functools
import shlex
import sys

from absl import flags

from experiments import launch, shown, workdir
from lora_jax import config as config_lib
from lora_jax.ablation import expand, survey
from lora_jax.ablation.reporting import report
from lora_jax.ablation.running import describe, launchers, planner, run
from lora_jax.errors import UserError

DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the arms and what they cost, and train nothing.")
TOGETHER = flags.DEFINE_integer("arms_together", planner.MOST, "Arms that train in one program at most; 1 packs none.")
MEMORY = flags.DEFINE_float(
    "memory_gb",
    None,
    "Memory for the arms of a pack; unless told half of the machine's, and at most 3 where its CPU trains.",
)
LAUNCHER = flags.DEFINE_string("launcher", "local", f"Where arms train: {', '.join(launchers.launchers())}.")
OPTIONS = flags.DEFINE_list("launcher_options", [], "Its own options: gpus=1,cpus=4.")
RETRY = flags.DEFINE_bool("retry_failed", False, "Train arms that failed again.")


def main() -> None:
    cfg, file = launch.config(), launch.config_file()
    if file is None:
        raise UserError("--config=FILE is needed: an ablation, such as configs/ablations/rank.py")
    if TOGETHER.value < 1:
        raise UserError(f"--arms_together={TOGETHER.value}: expected at least 1, which trains each arm by itself")
    variant = functools.partial(config_lib.variant, cfg, overrides=launch.overrides())
    arms = expand(launch.load_sweep(file, cfg), variant, launch.overrides())
    if DRY_RUN.value:
        print(survey.table(arms, survey.survey(arms)))
        return
    launcher = launchers.make(LAUNCHER.value, OPTIONS.value)
    folder, config, shapes = workdir.path(), variant({})[1], run.Shapes()
    shown.banner(folder)
    described = describe.describe(
        arms, config, *shapes.task(config), question=launch.docstring(file),
        command=shlex.join(["python", "-m", "experiments.ablate", *sys.argv[1:]]),
    )  # fmt: skip
    memory = run.usual_memory(here=LAUNCHER.value == "local") if MEMORY.value is None else MEMORY.value * 1e9
    rows = run.run(
        arms, folder, described, launch=launcher, most=TOGETHER.value, memory=memory, shapes=shapes, retry=RETRY.value
    )
    failed = shown.failed_arms(rows)
    written = report.write(folder)
    print(f"\n{len(rows) - failed} arms done, {failed} failed: {folder / 'results.csv'}\nopen {written[0]}")


if __name__ == "__main__":
    launch.run(main)
