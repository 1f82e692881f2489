"""Reading config.json: typed fields, and options of which only one value is supported.

The rule for options that no field reads: what transformers' own class of that family never reads either may stand in
the file and changes nothing; what it does read is either implemented or refused here, by `only`.
"""

from collections.abc import Mapping
from typing import Any

from lora_jax.errors import UserError, did_you_mean, nearest

# Read by transformers whatever the family: other numbers come out if they are set.
REFUSED = {"quantization_config": (None,), "is_causal": (None, True)}

# Keys that any config.json may hold and that say nothing about the numbers.
COMMON = frozenset(
    "model_type architectures torch_dtype dtype transformers_version id2label label2id num_labels problem_type "
    "pad_token_id bos_token_id eos_token_id use_cache initializer_range _name_or_path".split()
)


def integer(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A positive integer option.

    Raises:
      UserError: missing without a default, or not a positive integer.
    """
    value = raw.get(name)
    if value is None:
        value = default
    if value is None:
        close = ", ".join(nearest(name, raw, 2))
        raise UserError(f"config.json lacks {name!r} (a positive integer); nearest keys there: {close}")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"config.json: {name} must be a positive integer, got {value!r}")
    return value


def number(raw: Mapping[str, Any], name: str, default: float) -> float:
    """A real option that is not negative."""
    value = raw.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise UserError(f"config.json: {name} must be a number >= 0, got {value!r}")
    return float(value)


def flag(raw: Mapping[str, Any], name: str, default: bool) -> bool:
    """A true/false option."""
    value = raw.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise UserError(f"config.json: {name} must be true or false, got {value!r}")
    return value


def token_ids(raw: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """One token id, a list of them or null -> a tuple."""
    value = raw.get(name)
    ids = () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(type(i) is int for i in ids):
        raise UserError(f"config.json: {name} must be a token id or a list of them, got {value!r}")
    return ids


def only(raw: Mapping[str, Any], supported: Mapping[str, tuple]) -> None:
    """Refuses options with a value that is not implemented.

    Raises:
      UserError: names the option, its value and what is supported.
    """
    for name, values in (REFUSED | dict(supported)).items():
        if name in raw and raw[name] not in values:
            raise UserError(f"config.json: {name}={raw[name]!r} is not supported; supported: {_shown(values)}")


def known(raw: Mapping[str, Any], keys: frozenset[str]) -> None:
    """Refuses keys that no one reads: for a config written by hand, where such a key is a misspelling.

    Raises:
      UserError: names the key and the nearest one that exists.
    """
    for name in raw:
        if name not in keys | COMMON | set(REFUSED):
            raise UserError(f"unknown key {name!r} in the config; {did_you_mean(name, keys | COMMON)}")


def _shown(values: tuple) -> str:
    return ", ".join("null" if v is None else repr(v) for v in values)
