"""The model card of the embedded default: how it was made, what was measured, the hashes of what it describes."""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
PACKAGES = ("jax", "flax", "optax", "numpy", "tokenizers", "safetensors")
TEXT = """\
---
license: apache-2.0
language: en
library_name: transformers
---
# The tiny decoder of lora_jax

A Llama-style decoder of {parameters:,} parameters for demonstrations and tests of fine-tuning: small
enough to train on two CPU cores in minutes, and able to copy names and numbers out of its prompt. Its weights
began at random, but for two heads set to look one and two tokens back (`lora_jax/tiny/start.py`), and were
pretrained on text that a seeded grammar generates (`lora_jax/tiny/grammar.py`): records with their text, stories,
questions and word games in English words. It knows no facts and no language beyond that grammar; it is of no use for
anything else.

Made by `python -m lora_jax.tiny.pretrain --out=DIR` with the recipe below. The same versions on the same kind of CPU
with the same number of threads give the same files; elsewhere the last digits of the weights may differ.

Measured after training: {text_loss:.3f} nats a token on held-out text of the grammar; {echo:.1%} of repeated random
tokens foretold. Training took {minutes:.0f} minutes ({machine}, {threads} threads).

```json
{recipe}
```

| package | version |
|---|---|
{versions}

| file | sha256 |
|---|---|
{hashes}
"""


def sha256(file: Path) -> str:
    """Hash of a file's bytes."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def write(folder: Path, recipe: Mapping[str, Any], measured: Mapping[str, float]) -> None:
    """Writes README.md beside the files that it describes."""
    versions = {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES}
    text = TEXT.format(
        parameters=int(measured["parameters"]),
        text_loss=measured["text_loss"],
        echo=measured["echo_accuracy"],
        minutes=measured["seconds"] / 60,
        machine=platform.machine(),
        threads=os.cpu_count(),
        recipe=json.dumps(dict(recipe), indent=2),
        versions="\n".join(f"| {name} | {version} |" for name, version in versions.items()),
        hashes="\n".join(f"| {name} | {sha256(folder / name)} |" for name in FILES),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def recorded(folder: Path) -> dict[str, str]:
    """`{file: sha256}` as the card has it."""
    rows = [line.split("|") for line in (folder / "README.md").read_text(encoding="utf-8").splitlines()]
    return {row[1].strip(): row[2].strip() for row in rows if len(row) == 4 and row[1].strip() in FILES}
