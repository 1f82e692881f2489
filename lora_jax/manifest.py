"""The manifest of a run: all that its numbers depend on, so that a year later they can be made again or explained.

On CPU the result depends on the size of XLA's thread pool, on GPU on flags and autotuning; versions, devices, threads
and flags are therefore written down beside seeds and the hashes of base and data. `identity` is the part that must be
the same for a run to be resumed.
"""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from lora_jax import records
from lora_jax.errors import UserError

VERSION = 1
PACKAGES = (
    "lora_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "safetensors", "transformers",
    "tokenizers", "datasets",
)  # fmt: skip
# Settings of the environment that change results or speed. Named one by one: a whole environment holds secrets.
ENVIRONMENT = ("NPROC", "XLA_FLAGS", "CUDA_VISIBLE_DEVICES", "GLIBC_TUNABLES", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")
JAX_SETTINGS = (
    "jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable",
)  # fmt: skip


def collect(identity: Mapping[str, Any], *, mesh: Any = None, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the manifest of a run that starts now.

    Args:
      identity: what must not change when the run is resumed.
      mesh: of the run, or None for one device.
      extra: more fields, such as what the caller knows of the configuration.
    """
    return {
        "version": VERSION,
        "started": now(),
        "command": [sys.executable, *sys.argv],
        "identity": dict(identity),
        "git": git(Path(__file__).parent),
        "packages": versions(),
        "python": platform.python_version(),
        "machine": machine(),
        "devices": devices(mesh),
        "environment": environment(),
        "jax": {name: getattr(jax.config, name, None) for name in JAX_SETTINGS},
        **(extra or {}),
    }


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str | None]:
    """Versions of the packages that results depend on; None where one is not installed."""
    out: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = None
    return out


def git(folder: Path) -> dict[str, Any] | None:
    """The commit that the code stands at and whether files differ from it; None if it is not under version control."""

    def ask(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        # An installed package may lie inside a repository that is not its own: ask for the file itself.
        ask("ls-files", "--error-unmatch", Path(__file__).name)
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def machine() -> dict[str, Any]:
    """Operating system, processor, and how many threads XLA sees."""
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads(),
    }


def threads() -> int | None:
    """Size of XLA's thread pool on CPU, on which results depend: NPROC if set, else the cores the process may use."""
    if os.environ.get("NPROC", "").isdigit():
        return int(os.environ["NPROC"])
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def devices(mesh: Any = None) -> dict[str, Any]:
    """Kind and number of devices, and the mesh over them."""
    first = jax.devices()[0]
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "count": jax.device_count(),
        "processes": jax.process_count(),
        "mesh": None if mesh is None else {name: int(size) for name, size in mesh.shape.items()},
    }


def environment() -> dict[str, str]:
    """The settings of the environment that change results: those of `ENVIRONMENT` and everything called JAX_*."""
    return {k: v for k, v in sorted(os.environ.items()) if k in ENVIRONMENT or k.startswith("JAX_")}


def open_run(path: str | Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest of a new run, or notes in that of an old one that it is resumed.

    Args:
      path: of manifest.json.
      manifest: from `collect`.

    Raises:
      UserError: the manifest there is that of another run; the message names what differs.
    """
    path = Path(path)
    if not path.exists():
        records.write_json(path, manifest)
        return
    old = records.read_json(path)
    check_identity(path.parent, old.get("identity", {}), records.plain(manifest["identity"]))
    again = {name: manifest[name] for name in ("started", "command", "git", "packages", "machine", "devices")}
    records.write_json(path, {**old, "resumed": [*old.get("resumed", []), again]})


def check_identity(workdir: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises if two runs are not the same one; the message names the innermost field that differs."""
    found = _difference(old, new, "")
    if found is not None:
        name, there, here = found
        raise UserError(
            f"{workdir} belongs to another run: there {name} is {_short(there)}, here it is "
            f"{_short(here)}. Give another --workdir, or the configuration that this one was started with"
        )


def _difference(old: Any, new: Any, name: str) -> tuple[str, Any, Any] | None:
    """The first place where two JSON values differ: (dotted name, old, new)."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*new, *(k for k in old if k not in new)]
        pairs = [(f"{name}.{k}".lstrip("."), old.get(k), new.get(k)) for k in keys]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{name}[{i}]", *both) for i, both in enumerate(zip(old, new))]
    else:
        return None if old == new else (name, old, new)
    return next((found for k, a, b in pairs if (found := _difference(a, b, k)) is not None), None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
