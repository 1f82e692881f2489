"""Arms: the cells of a grid on top of one config, each with an id that tells whether a result is still its own.

The id hashes what the run computes: the resolved config, a method's own defaults filled in, and nothing of what only
shows or keeps (`settings.SHOWN`). So an edited field never finds an old result, and an axis or a seed that is added to
a finished grid leaves the ids of the old arms as they were.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from lora_jax import adapters
from lora_jax.ablation.grid import Grid, describe
from lora_jax.adapters.base import json_ready
from lora_jax.errors import UserError
from lora_jax.records import plain
from lora_jax.settings import COMMON, SHOWN, Config

ID_LENGTH = 10  # hexadecimal digits: two of a thousand arms share an id with a probability of 5e-7


@dataclasses.dataclass(frozen=True)
class Arm:
    """One cell of an ablation.

    Attributes:
      id: hash of the resolved config; names the arm's directory.
      label: what differs from the other arms: `rank=4 layers=last:1`.
      overrides: `{dotted field: value}` on top of the config file.
      axes: `{dotted field: value}` of every field that the grid sets anywhere, as this arm resolves it; None where
        the arm's method has no such field, or takes it from the model.
      config: the resolved config.
      values: the config as nested plain values, as config.json holds it; it resolves to `config` without overrides.
    """

    id: str
    label: str
    overrides: Mapping[str, Any]
    axes: Mapping[str, Any]
    config: Config
    values: Mapping[str, Any]


Resolve = Callable[[Mapping[str, Any]], tuple[Mapping[str, Any], Config]]


def expand(sweep: Grid, resolve: Resolve, given: Collection[str] = ()) -> list[Arm]:
    """The arms of a grid, in its order. Cells that resolve to the same config are one arm, where the first stands.

    Args:
      sweep: the grid.
      resolve: overrides -> (plain values, resolved config); `functools.partial(config.variant, cfg)`.
      given: dotted names that the command line set.

    Raises:
      UserError: a field that is set by the command line too, or changes nothing that is computed; an unknown field or
        a wrong value in some arm, which the message names.
    """
    _check_fields(sweep, given)
    found: dict[str, dict[str, Any]] = {}
    for cell in sweep:
        try:
            values, config = resolve(cell)
        except UserError as error:
            raise UserError(f"in the arm {describe(cell)}: {error}") from None
        identity = identity_of(config)
        axes = {name: identity.get(name) for name in sweep.fields}
        found.setdefault(digest(identity), dict(overrides=cell, axes=axes, config=config, values=values))
    own = [{n: v for n, v in one["axes"].items() if n in identity_of(one["config"])} for one in found.values()]
    labels = _labels(sweep.fields, own, list(found))
    return [Arm(id=id, label=label, **one) for (id, one), label in zip(found.items(), labels, strict=True)]


def identity_of(config: Config) -> dict[str, Any]:
    """`{dotted field: value}` of all that the result of a run depends on, as JSON would give it back.

    Of `adapter` these are the method's own parameters, its defaults filled in: rank unset and rank 8 are one arm
    where the method's rank is 8, and a field that the method does not have is not there.
    """
    tree = dataclasses.asdict(config)
    section = tree.pop("adapter")
    arguments = json_ready(**{**adapters.options(section["method"]), **section["arguments"]})
    own = {"adapter.method": section["method"], "adapter.head": section["head"]}
    own |= {f"adapter.{n}" if n in COMMON else f"adapter.options.{n}": v for n, v in arguments.items()}
    flat = {**dict(_flat(tree)), **own}
    return {name: _number(plain(value)) for name, value in flat.items() if not name.startswith(SHOWN)}


def digest(identity: Mapping[str, Any]) -> str:
    """The id of what a run depends on, whatever the order of the fields."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:ID_LENGTH]


def _check_fields(sweep: Grid, given: Collection[str]) -> None:
    for name in sweep.fields:
        if name in given:
            raise UserError(
                f"--config.{name} is set on the command line, and the sweep sets it in its arms; leave out one of the "
                "two (an axis is changed in the config file)"
            )
        if name.startswith(SHOWN):
            raise UserError(
                f"the sweep varies {name!r}, which changes what is shown and kept but not what is computed: all its "
                "arms would be the same run"
            )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _number(value: Any) -> Any:
    """16.0 as 16, at any depth: a number that is written in another way is no other number."""
    if isinstance(value, list):
        return [_number(one) for one in value]
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53  # 1e30 is no 31 digits
    return int(value) if whole else value


def _labels(fields: Sequence[str], axes: Sequence[Mapping[str, Any]], ids: Sequence[str]) -> list[str]:
    """The axes that are not the same in all arms; all of them where there is one arm. A method's own fields only."""
    names = [n for n in fields if len(axes) == 1 or len({json.dumps(one.get(n)) for one in axes}) > 1]
    last = [name.rpartition(".")[2] for name in names]
    short = {name: own if last.count(own) == 1 else name for name, own in zip(names, last, strict=True)}
    labels = [" ".join(f"{short[name]}={_shown(one[name])}" for name in names if name in one) for one in axes]
    return [f"{label} {id}" if labels.count(label) > 1 else label for label, id in zip(labels, ids, strict=True)]


def _shown(value: Any) -> str:
    """A value in a label: short, and different for different values."""
    if value is None:
        return "default"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
