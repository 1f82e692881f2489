"""What one process leaves for the next: compiled programs and tokenizers. Nothing is kept unless `use` was called."""

import os
from pathlib import Path
from typing import NamedTuple

import jax

from lora_jax.models import tokenizer

_COMPILED = "jax_compilation_cache_dir"


class Kept(NamedTuple):
    """Two folders; None keeps nothing of that kind. Plain values, which can be sent to a worker."""

    compiled: str | None
    tokenizers: str | None


def usual() -> Kept:
    """Folders under `$XDG_CACHE_HOME/lora_jax` (`~/.cache/lora_jax`); jax's own JAX_COMPILATION_CACHE_DIR wins."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_jax"
    return Kept(os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(root / "xla"), str(root / "tokenizers"))


def use(kept: Kept) -> None:
    """Looks there from now on, and leaves there what was not found."""
    tokenizer.keep_in(kept.tokenizers)
    if kept.compiled is None:
        return
    jax.config.update(_COMPILED, kept.compiled)
    # Programs of a tenth of a second too: first values, norms and the like are some thirty of them, a second in all.
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def used() -> Kept:
    """What this process uses."""
    return Kept(getattr(jax.config, _COMPILED), tokenizer.kept_in())
