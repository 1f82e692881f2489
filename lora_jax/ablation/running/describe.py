"""What grid.json says of a grid that starts now."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax import manifest
from lora_jax.ablation.arms import Arm, identity_of
from lora_jax.ablation.grid_file import GridFile
from lora_jax.settings import Config


def describe(
    arms: Sequence[Arm], config: Config, task: Any, sizes: Mapping[str, int], *, question: str, command: str
) -> GridFile:
    """Everything but the seconds.

    Args:
      arms: all of the grid.
      config: the config file's own, without the sweep.
      task: of it; names the metric that decides.
      sizes: {split: how many records}.
      question: the config file's docstring, whose first paragraph is the question.
      command: what makes the grid again.
    """
    axes = list(dict.fromkeys(name for arm in arms for name in arm.axes))
    own, (metric, better) = identity_of(config), task.better
    machine = manifest.machine()
    git, devices = manifest.git(Path(manifest.__file__).parent), manifest.devices()
    return GridFile(
        question=inspect.cleandoc(question or "").split("\n\n")[0].replace("\n", " "),
        command=command,
        metric=f"dev.{metric}",
        better=better,
        axes=axes,
        base={name: own.get(name) for name in axes},
        arms=[{"id": arm.id, "label": arm.label, "axes": dict(arm.axes)} for arm in arms],
        examples=dict(sizes),
        commit=str(git["commit"]) if git else None,
        versions={name: version for name, version in manifest.versions().items() if version},
        device=f"{devices['count']} x {devices['kind']} ({machine['processor']}, {machine['threads']} threads)",
        started=manifest.now(),
    )
