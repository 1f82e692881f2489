"""A side that is our own code, in a process of its own: `python -m experiments.benchmarks.worker ROW SETTINGS`.

Writes {name: number} as JSON to the file that the variable BENCHMARK_RESULT names.
"""

import json
import os
import sys
from pathlib import Path

import jax

from experiments.benchmarks import measure, row
from experiments.benchmarks.processes import ABSENT


def main(name: str, settings: str) -> None:
    module = row.module(name)
    started = measure.since_spawned()
    if os.environ["BENCHMARK_ACCELERATOR"] == "1" and jax.default_backend() == "cpu":
        print("JAX finds no accelerator here")
        sys.exit(ABSENT)
    values = {"start_seconds": started, **module.ours(json.loads(settings))}
    values["peak_rss_bytes"] = measure.peak_rss()
    Path(os.environ["BENCHMARK_RESULT"]).write_text(json.dumps(values))


if __name__ == "__main__":
    main(*sys.argv[1:])
