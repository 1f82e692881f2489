"""This machine and this process: one pack after the other. The default; needs nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_jax.ablation.arms import Arm
from lora_jax.ablation.running.claims import claimed
from lora_jax.ablation.running.execute import execute
from lora_jax.ablation.running.launchers import Launch


def local() -> Launch:
    """A launcher that trains here."""
    return _train


def _train(packs: Sequence[Sequence[Arm]], workdir: Path, board: Any) -> None:
    for pack in packs:
        with claimed(workdir, [arm.id for arm in pack], board.say):
            board.start(pack)
            execute(pack, workdir, board.ended, board.tick)
