"""Ours and the peers side by side on the same work: one command, one table.

python -m experiments.benchmark --suite=cpu [--rows=step,sst2] [--repeats=3] [--out=runs/benchmark] [--toy]
    [--data=DIR/sst2] [--peer_arms=6] [--docs=docs/benchmarks.md]

Every side is a process of its own; they take turns (A B A B), with the same cores and the same environment
(--nohuge_pages is for all of them, the peers too). --out gets SUITE.csv, a line for each number, and SUITE.md, the
table. Rows that the CSV has from earlier stay unless they are measured again; `--rows=` (none) only writes the table.
docs/benchmarks.md has the method.
"""

import os
import signal
from pathlib import Path

import jax
from absl import flags

from experiments import launch
from experiments.benchmarks import running, table
from experiments.benchmarks.processes import Machine
from experiments.benchmarks.row import module, names, suites
from lora_jax.errors import UserError, did_you_mean

SUITE = flags.DEFINE_string("suite", "cpu", "cpu or gpu.")
ROWS = flags.DEFINE_list("rows", None, "Which rows; all of the suite unless told.")
SIDES = flags.DEFINE_list("sides", None, "Which sides of them, such as ours; all unless told.")
REPEATS = flags.DEFINE_integer("repeats", 3, "How often each side runs.")
TOY = flags.DEFINE_bool("toy", False, "Tiny sizes, on CPU: everything runs, no number means anything.")
DATA = flags.DEFINE_string("data", None, "Directory of sst2's train/dev/test.jsonl; $LORA_JAX_DATA/sst2 unless told.")
PEER_ARMS = flags.DEFINE_integer("peer_arms", 0, "Arms of the grid that the peer trains; 0 = all, else in proportion.")
THREADS = flags.DEFINE_integer("threads", 0, "Cores and threads of every side; 0 = all that there are.")
MINUTES = flags.DEFINE_float("minutes", 60, "After so long a process is stopped and counts as failed.")
DOCS = flags.DEFINE_string("docs", None, "A page that the table is written into, between its two markers.")


def main() -> None:
    _check()
    jax.config.update("jax_platforms", "cpu")  # this process only starts others, and must hold no accelerator
    out = Path(launch.OUT.value or "runs/benchmark")
    out.mkdir(parents=True, exist_ok=True)
    chosen = names(SUITE.value) if ROWS.value is None else [row for row in ROWS.value if row]
    plan = running.plan(out, TOY.value, DATA.value, PEER_ARMS.value)
    rows = {name: module(name).row(plan) for name in names(SUITE.value)}
    bench = running.Bench(
        rows, _machine(out), out / f"{SUITE.value}{'-toy' * TOY.value}.csv", REPEATS.value, SIDES.value, plan
    )
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no process is left behind
    try:
        bench.run(chosen)
    except KeyboardInterrupt:
        print(f"stopped; {bench.csv} has what was measured, and --rows= with the same --out writes its table")
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    said, lines = bench.said(), bench.table()
    print(f"\n{table.text(lines)}\n\n" + "\n".join(said))
    content = table.markdown(lines, said)
    bench.csv.with_suffix(".md").write_text(content, encoding="utf-8")
    if DOCS.value:
        table.fill(Path(DOCS.value), SUITE.value, content)
    print(f"\n{bench.csv}, {bench.csv.with_suffix('.md')}")
    if bench.failed:
        raise UserError(f"{len(bench.failed)} processes failed; first: {bench.failed[0]}")


def _machine(out: Path) -> Machine:
    available = len(os.sched_getaffinity(0))
    gpu = SUITE.value == "gpu" and not TOY.value
    cache = out.resolve() / "work" / "toy" / "cache" if TOY.value else None
    return Machine(THREADS.value or available, flags.FLAGS.huge_pages, gpu, MINUTES.value, cache)


def _check() -> None:
    """Raises UserError for flags that cannot be."""
    if launch.config_file() or launch.overrides() or flags.FLAGS.workdir:
        raise UserError(
            "experiments.benchmark takes no --config and no --workdir: its work is fixed, and --out is its directory"
        )
    if SUITE.value not in suites():
        raise UserError(f"--suite={SUITE.value}: {did_you_mean(SUITE.value, suites())}")
    known = names(SUITE.value)
    for row in filter(None, ROWS.value or ()):
        if row not in known:
            raise UserError(f"--rows={row}: the suite {SUITE.value} has no such row; {did_you_mean(row, known)}")
    available = len(os.sched_getaffinity(0))
    if not 0 <= THREADS.value <= available:
        raise UserError(f"--threads={THREADS.value}: expected 0 (all) to {available}, the cores that there are")
    if REPEATS.value < 1 or MINUTES.value <= 0:
        raise UserError(f"--repeats={REPEATS.value}, --minutes={MINUTES.value:g}: expected 1 or more, and above 0")
    if DOCS.value and TOY.value:
        raise UserError("--docs with --toy: numbers of toy sizes mean nothing, so they go into no page")


if __name__ == "__main__":
    launch.run(main)
