"""PEFT's file formats, one file per `peft_type`, found by folder.

A codec has `METHODS` (which of our methods it writes) and two functions:

    write(adapter, delta, base) -> (fields of adapter_config.json, {tensor name: array})
    read(config, tensors, base, file) -> (adapter, delta); takes out of `tensors` what it used

`write` raises UserError where the format has no place for an adapter. A codec may name the prefix of modules that are
saved whole beside it (`PREFIX`), and say that PEFT can train biases beside it (`BIASES = True`).
"""

import importlib
import pkgutil
from types import ModuleType

from lora_jax.errors import UserError, did_you_mean


def types() -> list[str]:
    """PEFT's names of the methods that there is a codec for."""
    return sorted(m.name.upper() for m in pkgutil.iter_modules(__path__))


def by_type(peft_type: str, where: str) -> ModuleType:
    """The codec of a `peft_type`.

    Raises:
      UserError: there is none; `where` says which file asked.
    """
    if peft_type not in types():
        raise UserError(f"{where}: peft_type {peft_type!r} is not supported; {did_you_mean(str(peft_type), types())}")
    return importlib.import_module(f"{__name__}.{peft_type.lower()}")


def by_method(method: str) -> ModuleType | None:
    """The codec that writes a method, or None: PEFT does not have it."""
    for peft_type in types():
        codec = by_type(peft_type, "")
        if method in codec.METHODS:
            return codec
    return None
