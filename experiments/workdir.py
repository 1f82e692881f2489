"""The work directory of a run: whose it is, and the config it was made with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from lora_jax import config as config_lib
from lora_jax import records
from lora_jax.errors import UserError, nearest
from lora_jax.settings import SHOWN

CONFIG = "config.json"
MANIFEST = "manifest.json"
SUMMARY = "summary.json"
ADAPTER = "adapter"
# What may change when a finished run is looked at: where things are, how much is read, how fast.
MOVED = (*SHOWN, "model.path", "model.dtype", "data.path", "data.limit", "mesh.", "train.eval_batch_size")


def path() -> Path:
    """The flag --workdir.

    Raises:
      UserError: it is not set, or a file is there.
    """
    given = flags.FLAGS.workdir
    if not given:
        raise UserError("--workdir=DIR is needed: the directory of the run, for example --workdir=runs/first")
    if Path(given).exists() and not Path(given).is_dir():
        raise UserError(f"--workdir={given} is a file; name a directory")
    return Path(given)


def check(folder: Path, cfg: ConfigDict) -> None:
    """Raises UserError if the directory belongs to another config; the message has the fields that differ."""
    # The manifest is written when training begins: a start that failed before that has claimed nothing.
    if (folder / CONFIG).exists() and (folder / MANIFEST).exists():
        _same(folder, _load(folder), cfg, SHOWN, "Give another --workdir, or the config that this run was started with")


def claim(folder: Path, cfg: ConfigDict) -> None:
    """Writes config.json of a run that has none yet.

    Raises:
      UserError: the directory cannot be written.
    """
    if (folder / CONFIG).exists() and (folder / MANIFEST).exists():
        return
    try:
        records.write_json(folder / CONFIG, cfg.to_dict())
    except OSError as error:
        raise UserError(f"--workdir={folder} cannot be written: {error.strerror}; name another directory") from None


def read() -> ConfigDict:
    """The config of the finished run in --workdir.

    Raises:
      UserError: there is no run, or it is not finished.
    """
    return read_from(path(), "--workdir")


def read_from(folder: Path, flag: str) -> ConfigDict:
    """The config of the finished run in a directory that a flag named; errors as of `read`."""
    if not folder.is_dir():
        beside = [str(p) for p in folder.parent.glob("*") if p.is_dir()] if folder.parent.is_dir() else []
        hint = f"did you mean {nearest(str(folder), beside, 1)[0]!r}?" if beside else "train a run first"
        raise UserError(f"{flag}={folder}: there is no such directory; {hint}")
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder} is not the directory of a run: it has no {CONFIG}")
    if not (folder / SUMMARY).exists():
        raise UserError(
            f"the run in {folder} is not finished (no {SUMMARY}); run experiments.train on it again to finish it"
        )
    return _load(folder)


def check_finished(folder: Path, cfg: ConfigDict) -> None:
    """Raises UserError if a config changes what a finished run has fixed."""
    _same(folder, _load(folder), cfg, MOVED, "Only where things are and how they are shown may change after training")


def _load(folder: Path) -> ConfigDict:
    try:
        values = records.read_json(folder / CONFIG)
    except ValueError as error:
        raise UserError(f"{folder / CONFIG} is damaged: {error}") from None
    try:
        return config_lib.from_dict(values)
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None


def _same(folder: Path, old: ConfigDict, new: ConfigDict, free: tuple[str, ...], advice: str) -> None:
    before, after = _flat(old.to_dict()), _flat(new.to_dict())
    names = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    wrong = [name for name in names if not name.startswith(free)]
    if wrong:
        shown = "; ".join(f"{n} is {before.get(n)!r} there and {after.get(n)!r} here" for n in wrong[:3])
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise UserError(f"{folder} belongs to another config: {shown}{more}. {advice}")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted name: value}, as JSON would give it back."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = records.plain(value)
    return out
