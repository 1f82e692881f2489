"""The directory of a checkpoint: finding it (a folder or a hub id), its JSON files, the files of its tokenizer."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from lora_jax.errors import UserError, nearest

CONFIG = "config.json"
GENERATION = "generation_config.json"
# What a tokenizer may consist of; `save_pretrained` copies what is there.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model", "tekken.json")
TOKENIZER = VOCABULARIES + (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def find(path: str | os.PathLike) -> Path:
    """Returns the directory of a checkpoint; a hub id is downloaded (or taken from the hub's cache).

    Raises:
      UserError: neither a directory nor a hub id that can be had.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{path} is a file; a model is a directory with {CONFIG} and model.safetensors, or a hub id")
    if not _HUB_ID.fullmatch(str(path)):
        raise UserError(
            f"there is no directory {path}{_beside(folder)}; give a model directory or a hub id (name/model)"
        )
    return _download(str(path), folder)


def _beside(folder: Path) -> str:
    """Names like the missing one in the nearest folder that exists."""
    parent = folder.parent
    names = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    return f" (nearest in {parent}: {', '.join(nearest(folder.name, names, 2))})" if names else ""


def _download(hub_id: str, folder: Path) -> Path:
    import huggingface_hub

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # the hub's own errors, the network's, the disk's: for the user they are one
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{hub_id!r} is no directory here{_beside(folder)}, and it could not be had from the hub: {reason[0]} "
            "Give an existing model directory, or check the name and the connection"
        ) from None


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Reads one JSON object of a checkpoint.

    Raises:
      UserError: the file is missing or not a JSON object.
    """
    path = folder / name
    if not path.is_file():
        raise UserError(
            f"{folder} has no {name}: it is not a model directory (expected {CONFIG} and model.safetensors)"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def copy_extras(source: Path, target: Path) -> None:
    """Copies the tokenizer's files and the generation config, those that are there."""
    for name in (*TOKENIZER, GENERATION):
        if (source / name).is_file() and source.resolve() != target.resolve():
            shutil.copyfile(source / name, target / name)
