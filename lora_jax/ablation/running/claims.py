"""Arms that a process trains are its own: a second one that wants them waits, and then finds them done.

A command that was killed may have left workers behind, and a scheduler may start a task twice. The claim is a lock of
the operating system on a file in the arm's directory, so it ends with the process however that ends. A file system
without locks gives none, and then nothing is guarded.
"""

import contextlib
import fcntl
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lora_jax.ablation.running.execute import run_folder

LOCK = ".lock"


@contextlib.contextmanager
def claimed(workdir: Path, ids: Sequence[str], say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Inside `with`, no other process that asks gets these arms.

    Args:
      workdir: of the ablation.
      ids: of the arms; always taken in the same order, so that no two packs wait for each other.
      say: is told before it waits.
    """
    with contextlib.ExitStack() as files:
        for arm in sorted(ids):
            folder = run_folder(workdir, arm)
            folder.mkdir(parents=True, exist_ok=True)
            _lock(files.enter_context(open(folder / LOCK, "w", encoding="utf-8")), folder, say)
        yield


def _lock(file, folder: Path, say: Callable[[str], None]) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"another process is training {folder}; waiting for it to end")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # no locks here
        pass
