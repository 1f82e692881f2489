"""The report of a grid, of a finished one or as far as it is: groups.csv, plots/, report.html, report.md.

python -m experiments.report --workdir=runs/rank [--metric=test.accuracy] [--baseline=adapter.rank=8]
"""

from pathlib import Path
from typing import Any

from absl import flags

from experiments import launch, workdir
from lora_jax import config as config_lib
from lora_jax.ablation import results
from lora_jax.ablation.reporting import report
from lora_jax.errors import UserError, did_you_mean

METRIC = flags.DEFINE_string("metric", None, "The column of results.csv that answers the question.")
BASELINE = flags.DEFINE_multi_string("baseline", None, "What to compare with: dotted=value, once for each axis.")


def main() -> None:
    folder = workdir.path()
    if launch.config().to_dict() != config_lib.default().to_dict():
        raise UserError("experiments.report reads a finished grid and takes no --config; leave it out")
    written = report.write(folder, metric=METRIC.value, baseline=baseline(folder, BASELINE.value or []))
    print((folder / "report.md").read_text(encoding="utf-8"))
    print(f"wrote {len(written)} files to {folder}; open {written[0]}")


def baseline(folder: Path, given: list[str]) -> dict[str, Any] | None:
    """['adapter.rank=8'] -> {'adapter.rank': 8}."""
    axes = [name for name in results.columns(results.read_results(folder / "results.csv")) if results.is_axis(name)]
    out = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or name not in axes:
            raise UserError(
                f"--baseline={one}: expected AXIS=VALUE with an axis of the grid; {did_you_mean(name, axes)}"
            )
        out[name] = results.decode(value)
    return out or None


if __name__ == "__main__":
    launch.run(main)
