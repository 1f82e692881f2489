"""The environment that a command runs in: huge pages for what JAX allocates on a CPU.

XLA on a CPU asks for its temporaries anew at every step, and with pages of 4 KiB the faults cost an eighth of the step
(30M Llama, LoRA on all linears, 2 cores). glibc can ask for huge pages, but reads its settings only when a process
starts: so the command starts itself once more, before the imports that take a second. The process keeps its id.
`--nohuge_pages` leaves the environment alone; so does a GLIBC_TUNABLES that already speaks of huge pages.
"""

import os
import platform
import sys
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"
SETTING = "glibc.malloc.hugetlb"
SWITCHED_OFF = ("--nohuge_pages", "--huge_pages=false", "--huge_pages=0")
_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def prepare(name: str) -> None:
    """Starts this process again with huge pages on, where that helps and has not been done.

    Args:
      name: the `__name__` of the calling module: only a command that is being run is started again.
    """
    if name != "__main__" or any(off in sys.argv for off in SWITCHED_OFF):
        return
    if not _can_help() or SETTING in os.environ.get(TUNABLES, ""):
        return
    os.environ[TUNABLES] = ":".join(filter(None, [os.environ.get(TUNABLES), f"{SETTING}=1"]))
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def huge_pages() -> bool:
    """Whether this process asks for huge pages, or gets them without asking."""
    always = _PAGES.exists() and "[always]" in _PAGES.read_text()
    return always or f"{SETTING}=1" in os.environ.get(TUNABLES, "").split(":")


def _can_help() -> bool:
    """Linux gives huge pages to who asks, and glibc (2.35 or later) can ask."""
    library, version = platform.libc_ver()
    new = library == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)
    return new and _PAGES.exists() and "[madvise]" in _PAGES.read_text()
