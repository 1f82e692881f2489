"""The benchmark itself: sides take turns, every number goes into the CSV at once, and what was off is said."""

import dataclasses
import datetime
import os
import platform
from collections.abc import Sequence
from pathlib import Path

from configs import minilm
from experiments.benchmarks import processes, sentences, table
from experiments.benchmarks.processes import Machine
from experiments.benchmarks.row import Plan, Row, Side
from lora_jax.errors import UserError, did_you_mean


def plan(out: Path, toy: bool, data: str | None, peer_arms: int) -> Plan:
    """Where model and data are.

    Args:
      out: of the benchmark; a toy's model and data are made below it.
      toy, peer_arms: of the command.
      data: the directory that was named, if one was.
    """
    if toy:
        model, data = sentences.make_toy(out.resolve() / "work" / "toy")
        return Plan(True, data, model, peer_arms)
    shared = os.environ.get("LORA_JAX_DATA")
    return Plan(
        False, str(Path(data or (Path(shared) / "sst2" if shared else "data/sst2")).resolve()), minilm.path(), peer_arms
    )


@dataclasses.dataclass
class Bench:
    """One call of the command.

    Attributes:
      rows: all of the suite, by name.
      machine: what every process gets.
      csv: the file with all measurements; what it holds already stays unless measured again.
      repeats: of every side.
      sides: names of sides, or None for all.
      plan: sizes, model, data.
      failed: what went wrong, as lines.
      absent: sides that could not be measured here, and why.
    """

    rows: dict[str, Row]
    machine: Machine
    csv: Path
    repeats: int
    sides: Sequence[str] | None
    plan: Plan
    failed: list[str] = dataclasses.field(default_factory=list)
    absent: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.found = table.read(self.csv)
        known = {side.name for row in self.rows.values() for side in row.sides}
        for name in self.sides or ():
            if name not in known:
                raise UserError(f"--sides={name}: no row has such a side; {did_you_mean(name, sorted(known))}")

    def run(self, names: Sequence[str]) -> None:
        """Measures rows, one after the other."""
        self._check_data(names)
        for name in names:
            sides = [side for side in self.rows[name].sides if self.sides is None or side.name in self.sides]
            again = {(name, side.name) for side in sides}
            self.found = [one for one in self.found if (one.row, one.side) not in again]
            self._measure(name, [side for side in sides if self._there(name, side)])

    def table(self) -> list[tuple[str, ...]]:
        """The claims of all rows that have numbers."""
        return table.table(self.rows, self.found, judge=not self.plan.toy)

    def said(self) -> list[str]:
        """What belongs below the table."""
        dates = sorted({one.date[:10] for one in self.found})
        loads = [one.value for one in self.found if one.name == "load_average"]
        used = sorted({one.versions for one in self.found})
        out = [
            f"measured {' to '.join(dict.fromkeys((dates[0], dates[-1])))}" if dates else "nothing is measured yet",
            f"{_processor()}, {self.machine.threads} threads, huge pages "
            f"{'on' if self.machine.huge_pages else 'off'}, Python {platform.python_version()}",
            f"load average of the machine when processes were started: {_span(loads)}; with more than "
            f"{self.machine.threads} something else ran beside them",
            *(f"versions: {text.strip('{}').replace(chr(34), '')}" for text in used),
            "ratio: of the medians; range: of the pairs measured in one repeat, or of the value itself",
        ]
        if self.plan.toy:
            out.insert(0, "TOY SIZES: these numbers say that everything runs, and nothing else")
        measured = {one.row for one in self.found}
        out += [note for name, row in self.rows.items() if name in measured for note in row.notes]
        return out + [f"not measured: {line}" for line in self.absent] + [f"FAILED: {line}" for line in self.failed]

    def _measure(self, name: str, sides: Sequence[Side]) -> None:
        dropped: set[str] = set()
        for repeat in range(self.repeats + 1):
            for side in sides:
                if side.name in dropped or (repeat == 0 and not side.warm):
                    continue
                ended = processes.run(side, repeat, self.csv.parent.resolve() / "work" / name / side.name, self.machine)
                if ended.failure:
                    dropped.add(side.name)
                    (self.absent if ended.absent else self.failed).append(f"{name}, {side.name}: {ended.failure}")
                self._keep(name, side, repeat, ended.values)
                print(_progress(name, side, repeat, self.repeats, ended), flush=True)

    def _keep(self, name: str, side: Side, repeat: int, values: dict[str, float]) -> None:
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        settings = {**side.settings, **self.machine.settings(), "toy": self.plan.toy}
        versions = processes.versions(side)
        self.found += table.measurements(name, side.name, repeat, values, settings, versions, now)
        table.write(self.csv, self.found)

    def _there(self, name: str, side: Side) -> bool:
        missing = side.missing()
        if missing:
            self.absent.append(f"{name}, {side.name}: {', '.join(missing)} not installed (the extra `peers`)")
        return not missing

    def _check_data(self, names: Sequence[str]) -> None:
        needs = [name for name in names if any(self.plan.data in str(side.settings) for side in self.rows[name].sides)]
        if needs and not (Path(self.plan.data) / "train.jsonl").is_file():
            raise UserError(
                f"the rows {', '.join(needs)} need sst2, and {self.plan.data} has no train.jsonl: give --data=DIR, or "
                "leave them out by --rows"
            )


def _processor() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _span(values: Sequence[float]) -> str:
    return f"{min(values):.1f} to {max(values):.1f}" if values else "not known"


def _progress(name: str, side: Side, repeat: int, repeats: int, ended: processes.Ended) -> str:
    when = f"{repeat}/{repeats}" if repeat else "warm-up"
    if ended.failure:
        return f"{name:<12}{side.name:<30}{when:<9}{ended.failure}"
    shown = ", ".join(f"{key} {value:.4g}" for key, value in list(ended.values.items())[3:8])
    return f"{name:<12}{side.name:<30}{when:<9}{ended.values['wall_seconds']:.1f} s  {shown}"
