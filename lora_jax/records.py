"""What a run writes down: metrics.jsonl, and the same numbers to TensorBoard or Weights & Biases; atomic files.

A record is one flat dictionary: `step`, `split`, then metrics and throughput. `metrics.jsonl` is the source of truth,
one JSON object a line. After a crash it may hold lines that the newest checkpoint knows nothing of; they are cut off
on resume, so that the file ends up as if the run had never been broken. Whole files (summary, manifest, predictions)
are written beside their place and moved there, so that a reader never sees half of one.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lora_jax.errors import UserError, did_you_mean

Record = Mapping[str, Any]


class Writer(Protocol):
    """Takes records."""

    def write(self, record: Record) -> None:
        """Writes one record."""

    def close(self) -> None:
        """Finishes the writing."""


def plain(value: Any) -> Any:
    """Numpy and jax numbers, arrays and paths as plain JSON values; a number that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if isinstance(value, (np.generic, np.ndarray)) or hasattr(value, "__jax_array__") or hasattr(value, "aval"):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def write_atomic(path: str | Path, text: str) -> None:
    """Writes a whole file or nothing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_json(path: str | Path, value: Any) -> None:
    """Writes one JSON document, indented."""
    write_atomic(path, json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line."""
    write_atomic(path, "".join(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows))


def read_json(path: str | Path) -> Any:
    """Reads one JSON document."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Reads one JSON object a line; a last line that was cut off by a crash is left out."""
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


class MetricsFile:
    """`metrics.jsonl`."""

    def __init__(self, path: str | Path, keep: Callable[[Record], bool]):
        """Opens the file to append.

        Args:
          path: of the file.
          keep: which of the records already there stay; the others were written after the checkpoint that the run
            resumes from.
        """
        self._path = Path(path)
        rows = read_jsonl(self._path)
        kept = [row for row in rows if keep(row)]
        if self._path.exists():
            write_jsonl(self._path, kept)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Appends one line, and hands it to the operating system at once."""
        self._file.write(json.dumps(plain(record), ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _numbers(record: Record) -> dict[str, float]:
    return {k: float(v) for k, v in plain(record).items() if isinstance(v, (int, float)) and k != "step"}


class TensorBoard:
    """Event files for TensorBoard, by tensorboardX (which needs neither TensorFlow nor torch)."""

    def __init__(self, folder: str | Path):
        """Opens `folder` for event files.

        Raises:
          UserError: tensorboardX is not installed.
        """
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError(_missing("TensorBoard", "log.tensorboard", "tensorboardX", "tensorboard")) from None
        self._writer = SummaryWriter(str(folder))

    def write(self, record: Record) -> None:
        """Writes each number as `<split>/<name>`."""
        for name, value in _numbers(record).items():
            self._writer.add_scalar(f"{record['split']}/{name}", value, int(record["step"]))

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.close()


class WandB:
    """A Weights & Biases run; WANDB_MODE=offline keeps it on disk."""

    def __init__(self, folder: str | Path, *, name: str, config: Mapping[str, Any] | None = None):
        """Starts a run, or goes on with that of the same name.

        Args:
          folder: for its files.
          name: of the run; also its id, so that a resumed run continues the same curves.
          config: the resolved configuration.

        Raises:
          UserError: wandb is not installed.
        """
        try:
            import wandb
        except ImportError:
            raise UserError(_missing("Weights & Biases", "log.wandb", "wandb", "wandb")) from None
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(dir=str(folder), project="lora_jax", name=name, id=name, resume="allow", config=config)

    def write(self, record: Record) -> None:
        """Logs each number as `<split>/<name>`."""
        values = {f"{record['split']}/{name}": value for name, value in _numbers(record).items()}
        self._run.log(values, step=int(record["step"]))

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


def _missing(what: str, field: str, package: str, extra: str) -> str:
    return (
        f"{field} is on, but {what} needs the package {package}, which is not installed: "
        f"pip install 'lora_jax[{extra}]', or set {field} to false"
    )


def make_writers(names: Iterable[str], workdir: str | Path, config: Mapping[str, Any] | None = None) -> list[Writer]:
    """Opens the optional writers of a run.

    Args:
      names: of 'tensorboard' and 'wandb'.
      workdir: of the run.
      config: the resolved configuration, shown by Weights & Biases.

    Raises:
      UserError: an unknown name, or a package that is not installed.
    """
    workdir = Path(workdir)
    makers: dict[str, Callable[[], Writer]] = {
        "tensorboard": lambda: TensorBoard(workdir / "tensorboard"),
        "wandb": lambda: WandB(workdir / "wandb", name=workdir.absolute().name, config=config),
    }
    names = list(names)
    for name in names:
        if name not in makers:
            raise UserError(f"there is no writer {name!r}; {did_you_mean(str(name), makers)}")
    return [makers[name]() for name in names]
