"""Tasks: one file per objective, found in this folder: `get(name)(tokenizer=, max_length=, splits=, **options)`."""

import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from lora_jax.errors import UserError, did_you_mean
from lora_jax.tasks import base
from lora_jax.tasks.base import Task

SHARED = ("base", "causal")  # files of this folder that are no task


def names() -> list[str]:
    """The tasks there are: the files of this folder, each with one function of its own name."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in SHARED)


def get(name: str) -> Callable[..., Task]:
    """Finds a task by name.

    Returns:
      A function (tokenizer, max_length, splits, **options) -> Task that refuses options the task does not have.

    Raises:
      UserError: no such task, with the nearest name.
    """
    maker = _maker(name)

    @functools.wraps(maker)
    def make(tokenizer: Any, max_length: int, splits: Any, **options: Any) -> Task:
        base.check_options(name, maker, options)
        return maker(tokenizer=tokenizer, max_length=max_length, splits=splits, **options)

    return make


def options(name: str) -> dict[str, Any]:
    """{option: default} of a task."""
    return base.option_names(_maker(name))


def _maker(name: str) -> Callable[..., Task]:
    if name not in names():
        raise UserError(f"there is no task {name!r}; {did_you_mean(str(name), names())}")
    return getattr(importlib.import_module(f"{__name__}.{name}"), name)


__all__ = ["Task", "get", "names", "options"]
