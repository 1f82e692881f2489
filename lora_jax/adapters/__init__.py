"""Methods of fine-tuning, one file each, found by folder: `adapters/x.py` with a function `x` is the method `x`."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from lora_jax.adapters.base import Adapter, Delta
from lora_jax.errors import UserError, did_you_mean

__all__ = ["Adapter", "Delta", "for_steps", "from_spec", "get", "learning_rate", "methods", "options"]


LEARNING_RATE = 1e-3  # of methods that name none


def methods() -> list[str]:
    """Names of all methods."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base" and not m.ispkg)


def get(name: str) -> Callable[..., Adapter]:
    """The function of a method by its name.

    Raises:
      UserError: no such method; the message has the nearest name.
    """
    if name not in methods():
        raise UserError(f"there is no method {name!r}; {did_you_mean(name, methods())}")
    return getattr(importlib.import_module(f"{__name__}.{name}"), name)


def options(name: str) -> dict[str, Any]:
    """A method's own options and their defaults."""
    parameters = inspect.signature(get(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is not p.VAR_POSITIONAL}


def learning_rate(name: str) -> float:
    """The peak learning rate that a method is trained with where none is given: its file's LEARNING_RATE.

    A start, not a recommendation for every model: `configs/ablations/methods.py` searches it for all methods.
    """
    get(name)
    return float(getattr(importlib.import_module(f"{__name__}.{name}"), "LEARNING_RATE", LEARNING_RATE))


def from_spec(spec: Mapping[str, Any]) -> Adapter:
    """Rebuilds an adapter from its `spec`.

    Raises:
      UserError: an unknown method or option.
    """
    given = dict(spec)
    if "method" not in given:
        raise UserError(f"an adapter's spec needs the field 'method', got {sorted(given)}")
    name = given.pop("method")
    members = [from_spec(s) for s in given.pop("adapters", [])]
    make = get(name)
    for option in given:
        if option not in options(name):
            raise UserError(f"the method {name!r} has no option {option!r}; {did_you_mean(option, options(name))}")
    return make(*members, **given)


def for_steps(adapter: Adapter, total_steps: int) -> Adapter:
    """Tells an adapter how long the run is: an option `total_steps` that was left open (None) is filled in."""
    spec = _filled(adapter.spec, total_steps)
    return adapter if spec == adapter.spec else from_spec(spec)


def _filled(spec: Mapping[str, Any], total_steps: int) -> dict[str, Any]:
    out = dict(spec)
    if "total_steps" in out and out["total_steps"] is None:
        out["total_steps"] = total_steps
    if "adapters" in out:
        out["adapters"] = [_filled(one, total_steps) for one in out["adapters"]]
    return out
