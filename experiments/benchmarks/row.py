"""What a benchmark row is: sides that do the same work, each a command of its own, and claims about their numbers.

A row is one file in `rows/`, found by folder: `SUITE`, the suite it belongs to, `row(plan) -> Row`, and where one of
its sides is our own code `ours(settings) -> {name: number}`, which `worker.py` calls in a process of its own.
"""

import dataclasses
import importlib
import importlib.util
import json
import pkgutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.benchmarks import rows

ROOT = Path(__file__).parents[2]
PEERS = ROOT / "third_party" / "peers"
TORCH = ("torch", "transformers", "peft")
JAX = ("jax", "jaxlib", "flax", "optax")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a whole benchmark is told.

    Attributes:
      toy: sizes at which everything runs and no number means anything.
      data: directory of train/dev/test.jsonl with `text` and `label`.
      model: directory of the BERT-like encoder that is fine-tuned.
      peer_arms: how many arms of the grid the peer really trains; 0 is all.
    """

    toy: bool
    data: str
    model: str
    peer_arms: int = 0


@dataclasses.dataclass(frozen=True)
class Side:
    """One way to do a row's work.

    Attributes:
      name: 'ours', 'ours_cached', 'peft', ...
      argv: the command. `{scratch}` stands for an empty directory of this run, `{repeat}` for its number.
      settings: what the work is; written to the CSV, and as JSON to workers and peers.
      needs: packages without which the side is not measured.
      read: more values, from the scratch directory of a finished run and the seconds that it took.
      warm: one run first, that does not count; compiled programs are then kept for the runs that do.
    """

    name: str
    argv: tuple[str, ...]
    settings: Mapping[str, Any]
    needs: tuple[str, ...] = JAX
    read: Callable[[Path, float], dict[str, float]] | None = None
    warm: bool = False

    def missing(self) -> list[str]:
        """The packages it needs that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A line of the table.

    Attributes:
      what: in words.
      value: the measured name.
      side: whose value; other: compared with whose, None = with nothing.
      better: 'higher' (ratio side / other), 'lower' (ratio other / side: so many times less), or 'share' (side / other,
        for what should be a fraction).
      target: ('>=' or '<=', number) for the ratio, or without `other` for the value itself; None = only shown.
    """

    what: str
    value: str
    side: str = "ours"
    other: str | None = None
    better: str = "higher"
    target: tuple[str, float] | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One benchmark. `notes` are printed below the table: what is off, extrapolated, or measured another way."""

    sides: tuple[Side, ...]
    claims: tuple[Claim, ...]
    notes: tuple[str, ...] = ()


def names(suite: str) -> list[str]:
    """The rows of a suite, by name."""
    found = sorted(m.name for m in pkgutil.iter_modules(rows.__path__))
    return [name for name in found if module(name).SUITE == suite]


def suites() -> list[str]:
    """The suites that rows belong to."""
    return sorted({module(m.name).SUITE for m in pkgutil.iter_modules(rows.__path__)})


def module(name: str) -> Any:
    """The file of a row."""
    return importlib.import_module(f"{rows.__name__}.{name}")


def unit(value: str) -> str:
    """The unit of a measured name, by how it ends."""
    endings = {"tokens_per_second": "tokens/s", "_seconds": "s", "_bytes": "bytes", "_bits": "bits"}
    return next((word for ending, word in endings.items() if value.endswith(ending)), "1")


def ours(worker: str, settings: Mapping[str, Any], name: str = "ours", **fields: Any) -> Side:
    """A side that is `ours(settings)` of the file `rows/WORKER.py`."""
    argv = (sys.executable, "-m", "experiments.benchmarks.worker", worker, json.dumps(settings))
    return Side(name, argv, settings, **fields)


def peer(script: str, settings: Mapping[str, Any], name: str, **fields: Any) -> Side:
    """A side that is a script of `third_party/peers/`."""
    argv = (sys.executable, str(PEERS / f"{script}.py"), json.dumps(settings))
    return Side(name, argv, settings, needs=TORCH, **fields)


def command(module_name: str, arguments: Mapping[str, Any], name: str = "ours", **fields: Any) -> Side:
    """A side that is one of our own commands with flags: {'config.seed': 0} is --config.seed=0."""
    flags = tuple(f"--{key}={value}" for key, value in arguments.items())
    return Side(name, (sys.executable, "-m", module_name, *flags), dict(arguments), **fields)
