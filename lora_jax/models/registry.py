"""The model families: every module of this folder that names `MODEL_TYPES`. Adding a family is adding one file."""

import functools
import importlib
import pkgutil
from types import ModuleType

import lora_jax.models
from lora_jax.errors import UserError, did_you_mean


@functools.cache
def families() -> dict[str, ModuleType]:
    """Returns `{model_type: family module}`, found by listing the folder."""
    out: dict[str, ModuleType] = {}
    for info in sorted(pkgutil.iter_modules(lora_jax.models.__path__), key=lambda i: i.name):
        module = importlib.import_module(f"lora_jax.models.{info.name}")
        for model_type in getattr(module, "MODEL_TYPES", ()):
            if model_type in out:
                raise RuntimeError(f"{module.__name__} and {out[model_type].__name__} both claim {model_type!r}")
            out[model_type] = module
    return out


def get(model_type: object) -> ModuleType:
    """Returns the family that reads a `model_type`.

    Raises:
      UserError: none does; with the nearest name.
    """
    if not isinstance(model_type, str) or model_type not in families():
        raise UserError(f"model_type {model_type!r} is not supported; {did_you_mean(str(model_type), families())}")
    return families()[model_type]
