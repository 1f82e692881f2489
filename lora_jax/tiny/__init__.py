"""The embedded default: a tiny decoder shipped with the package, and a second domain, made on demand, to adapt it to.

`path()` is a model directory in Hugging Face layout (about a million parameters; its README.md says how it was made,
and `python -m lora_jax.tiny.pretrain` makes it again). `write_data` makes the files to fine-tune on. Neither needs a
network.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from lora_jax.errors import UserError
from lora_jax.tiny.grammar import SIZES, announcements, as_jsonl

SEED = 0


def path() -> Path:
    """Returns the directory of the tiny model (config, weights, tokenizer) inside the installed package."""
    return Path(__file__).parent / "model"


def write_data(folder: str | Path, seed: int = SEED, sizes: Mapping[str, int] = SIZES) -> Path:
    """Writes `train.jsonl`, `dev.jsonl` and `test.jsonl` of the second domain; the same bytes for the same arguments.

    Args:
      folder: made if it does not exist. Files that already hold these bytes are left alone.
      seed: of the grammar.
      sizes: examples per split.

    Returns:
      The folder.

    Raises:
      UserError: the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in announcements(seed, sizes).items():
            _write(folder / f"{split}.jsonl", as_jsonl(rows).encode())
    except OSError as error:
        raise UserError(
            f"cannot write the tiny data to {str(folder)!r}: {error.strerror}; name another folder"
        ) from None
    return folder


def _write(file: Path, content: bytes) -> None:
    """Writes whole files only: two runs that start together must never read half of one."""
    if file.is_file() and file.read_bytes() == content:
        return
    part = file.with_name(f".{file.name}.{os.getpid()}")
    part.write_bytes(content)
    os.replace(part, file)


def data_path(folder: str | Path | None = None) -> Path:
    """Returns a directory with the second domain's files, written there if they are not.

    Args:
      folder: where to; None means `$XDG_CACHE_HOME/lora_jax/tiny` (`~/.cache/lora_jax/tiny` by default).
    """
    if folder is None:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(cache) / "lora_jax" / "tiny"
    return write_data(folder)
