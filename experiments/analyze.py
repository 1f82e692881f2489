"""What the adapter of a finished run did to each weight: norms, ranks, amplification; and how like another run's it is.

python -m experiments.analyze --workdir=runs/a [--references] [--against=runs/b]
"""

import dataclasses
from pathlib import Path

from absl import flags

import lora_jax as lj
from experiments import launch, shown, workdir
from lora_jax import config as config_lib
from lora_jax import records
from lora_jax.assemble import assemble, load_adapter

AGAINST = flags.DEFINE_string("against", None, "The directory of another finished run on the same base.")
REFERENCES = flags.DEFINE_bool("references", False, "Also the base along its own and along random directions (slower).")


def main() -> None:
    folder = workdir.path()
    if AGAINST.value:
        workdir.read_from(Path(AGAINST.value), "--against")
    cfg = launch.config()
    workdir.check_finished(folder, cfg)
    base = assemble(config_lib.resolve(cfg)).base
    adapter, delta = load_adapter(folder / workdir.ADAPTER, base)
    other = load_adapter(Path(AGAINST.value) / workdir.ADAPTER, base) if AGAINST.value else None
    report = lj.analyze(adapter, delta, base.variables, base.sites, references=REFERENCES.value)
    out = folder / "analysis"
    shown.title(f"updates of {folder}")
    print(report)
    records.write_jsonl(out / "updates.jsonl", map(dataclasses.asdict, report.rows))
    if other is not None:
        found = lj.compare((adapter, delta), other, base.variables, base.sites)
        shown.title(f"directions shared with {AGAINST.value}")
        print(found)
        print("phi of the strongest direction (1st) and of all: 1 = the same; chance = random directions")
        records.write_jsonl(out / "against.jsonl", map(dataclasses.asdict, found.rows))
    print(f"\nrows in {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")


if __name__ == "__main__":
    launch.run(main, base=workdir.read)
