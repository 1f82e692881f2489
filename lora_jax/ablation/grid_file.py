"""`grid.json`: what a grid is about, beside its results.csv. The runner writes it first, the report reads it.

| key | value |
|---|---|
| `question` | text: what the grid asks, the first paragraph of the config file's docstring |
| `command` | text: what makes the grid again |
| `metric` | the column that answers the question: 'dev.accuracy' |
| `better` | 'max' or 'min' |
| `axes` | list of dotted names, `seed` among them |
| `base` | `{dotted name: value}` of the axes in the config without the sweep, as `Arm.axes` has them: the baseline |
| `arms` | list of `{"id", "label", "axes": {dotted name: value}}`, all that the grid has, finished or not |
| `examples` | `{"dev": n, "test": n}` |
| `commit` | text |
| `versions` | `{package: version}` |
| `device` | text |
| `started` | text, ISO 8601 |
| `seconds` | number: wall time of the whole grid so far |

Every key may be absent, and the report leaves out or finds by itself what it would have said. Unknown keys are kept.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax import records
from lora_jax.errors import UserError

NAME = "grid.json"


@dataclasses.dataclass(frozen=True)
class GridFile:
    """The content of grid.json; None or empty where it does not say."""

    question: str | None = None
    command: str | None = None
    metric: str | None = None
    better: str | None = None
    axes: Sequence[str] = ()
    base: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    arms: Sequence[Mapping[str, Any]] = ()
    examples: Mapping[str, int] = dataclasses.field(default_factory=dict)
    commit: str | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    device: str | None = None
    started: str | None = None
    seconds: float | None = None
    other: Mapping[str, Any] = dataclasses.field(default_factory=dict)


KINDS: dict[str, Any] = {
    **dict.fromkeys(("question", "command", "metric", "better", "commit", "device", "started"), str),
    **dict.fromkeys(("axes", "arms"), (list, tuple)),
    **dict.fromkeys(("base", "examples", "versions"), Mapping),
    "seconds": (int, float),
}
SHOWN = {str: "a text", (list, tuple): "a list", Mapping: "an object", (int, float): "a number"}


def write(workdir: str | Path, described: GridFile) -> None:
    """Writes WORKDIR/grid.json, whole or not at all."""
    values = {k: v for k, v in dataclasses.asdict(described).items() if k != "other" and v not in (None, (), {}, [])}
    records.write_json(Path(workdir) / NAME, {**values, **described.other})


def read(workdir: str | Path) -> GridFile:
    """Reads WORKDIR/grid.json; no file says nothing.

    Raises:
      UserError: the file is damaged, or a key has a value of another kind.
    """
    path = Path(workdir) / NAME
    if not path.exists():
        return GridFile()
    try:
        values = records.read_json(path)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; start the grid again to have it written anew") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold one JSON object, got {type(values).__name__}")
    known = {name: values[name] for name in KINDS if values.get(name) is not None}
    for name, value in known.items():
        if not isinstance(value, KINDS[name]):
            raise UserError(f"{path}: {name!r} must be {SHOWN[KINDS[name]]}, got {value!r}")
    return GridFile(**known, other={k: v for k, v in values.items() if k not in KINDS})
