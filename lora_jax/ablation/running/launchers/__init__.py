"""Launchers: where the packs of a grid train. One file each, found by folder: `launchers/x.py` with a function `x`.

A launcher's function takes its options by name, each with a default, and returns a `Launch`. A package that it needs is
imported when it is called, so that the others work without it.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lora_jax.ablation.arms import Arm
from lora_jax.errors import UserError, did_you_mean

# (packs, work directory, `board.Board`): trains all arms of all packs, and tells the board what begins and ends.
Launch = Callable[[Sequence[Sequence[Arm]], Path, Any], None]


def launchers() -> list[str]:
    """Names of all launchers."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def get(name: str) -> Callable[..., Launch]:
    """The function of a launcher by its name.

    Raises:
      UserError: no such launcher; the message has the nearest name.
    """
    if name not in launchers():
        raise UserError(f"--launcher={name}: there is no such launcher; {did_you_mean(name, launchers())}")
    return getattr(importlib.import_module(f"{__name__}.{name}"), name)


def make(name: str, options: Iterable[str] = ()) -> Launch:
    """A launcher by its name and options as text.

    Args:
      name: one of `launchers()`.
      options: `name=value` each; a value is read as the type of the option's default.

    Raises:
      UserError: an unknown name or option, a value of the wrong type, or a package that is not installed.
    """
    function = get(name)
    known = {p.name: p.default for p in inspect.signature(function).parameters.values()}
    given = {}
    for text in options:
        option, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise UserError(f"--launcher_options={text}: expected name=value, such as {_example(known)}")
        if option not in known:
            raise UserError(
                f"--launcher_options={text}: the launcher {name!r} has no option {option!r}; "
                f"{did_you_mean(option, known)}"
            )
        given[option] = _read(option, value, type(known[option]))
    return function(**given)


def needed(package: str, extra: str) -> Any:
    """An optional package.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"--launcher={extra} needs the package {package}, which is not installed: "
            f"pip install 'lora_jax[{extra}]', or leave --launcher out to train on this machine"
        ) from None


def _read(option: str, value: str, kind: type) -> Any:
    expected = {int: "a whole number, 0 or more", float: "a number, 0 or more"}
    try:
        found = kind(value)
    except ValueError:
        found = -1
    if kind in expected and found < 0:
        raise UserError(f"--launcher_options={option}={value}: expected {expected[kind]}")
    return found


def _example(known: Iterable[str]) -> str:
    return next((f"{name}=..." for name in known), "(this launcher has no options)")
