"""What a run is told, checked and frozen: one dataclass per section of the configuration.

`config.resolve` makes these from a config; a notebook may make them by hand. The names of methods and tasks, and which
fields a method has, come from the methods and tasks themselves: a new file in `adapters/` or `tasks/` needs no line
here.
"""

import ast
import dataclasses
import inspect
from collections.abc import Collection, Mapping
from typing import Any

from lora_jax import adapters, quant, tasks
from lora_jax.adapters.chain import USUAL
from lora_jax.errors import UserError, did_you_mean
from lora_jax.sites import parse_layers, parse_patterns
from lora_jax.train_settings import SHOWN_ONLY, TrainSettings

COMMON = (
    "rank",
    "alpha",
    "targets",
    "layers",
)  # fields of `adapter` itself; any other parameter of a method is an option
# Beginnings of the fields that change what is shown and kept, not what is computed.
SHOWN = ("log.", "generate.", *(f"train.{name}" for name in SHOWN_ONLY))
MEMBERS = "adapters"  # the option of a chain that names its members
DEFAULT = "default"  # in `adapter`: the method's own value, as if unset


def _check(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise UserError(f"{name}={value!r}: expected {expected}")


@dataclasses.dataclass(frozen=True)
class Model:
    path: str
    dtype: str
    dropout: float | None
    remat: bool

    def __post_init__(self):
        known = ("float32", "bfloat16", "float16")
        if self.dtype not in known:
            raise UserError(f"model.dtype={self.dtype!r} is not known: {did_you_mean(self.dtype, known)}")
        _check(self.dropout is None or 0 <= self.dropout < 1, "model.dropout", self.dropout, "0 <= dropout < 1")


@dataclasses.dataclass(frozen=True)
class Data:
    path: str
    fields: Mapping[str, str]
    max_length: int
    limit: int | None

    def __post_init__(self):
        for ours, theirs in self.fields.items():
            _check(isinstance(theirs, str), f"data.fields.{ours}", theirs, "the name of a field of the data")
        _check(self.max_length >= 2, "data.max_length", self.max_length, "2 or more tokens")
        _check(self.limit is None or self.limit >= 1, "data.limit", self.limit, "1 or more examples")


@dataclasses.dataclass(frozen=True)
class Task:
    name: str
    options: Mapping[str, Any]

    def __post_init__(self):
        known = tasks.options(self.name)
        for option in self.options:
            if option not in known:
                raise UserError(
                    f"task.options.{option}: the task {self.name!r} has no such option; {did_you_mean(option, known)}"
                )


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Attributes:
    method: a name of `adapters.methods()`.
    head: 'full' trains the task's head beside the method, 'none' leaves it.
    arguments: what the method's function is called with.
    notes: lines for the audit: what the config file sets and this method does not have.
    """

    method: str
    head: str
    arguments: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        _check(self.head in ("full", "none"), "adapter.head", self.head, "full or none")
        checks = {
            "rank": _check_rank, "alpha": _check_alpha, "targets": _check_targets, "layers": _check_layers,
            MEMBERS: _check_members,
        }  # fmt: skip
        for name, value in self.arguments.items():
            if name in checks:
                checks[name](value)


@dataclasses.dataclass(frozen=True)
class Mesh:
    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    # `sharding.make_mesh` checks the sizes, since it knows how many devices there are.


@dataclasses.dataclass(frozen=True)
class Generate:
    max_new_tokens: int
    temperature: float
    top_p: float
    score: int
    show: int

    def __post_init__(self):
        _check(self.max_new_tokens >= 1, "generate.max_new_tokens", self.max_new_tokens, "1 or more")
        _check(self.temperature >= 0, "generate.temperature", self.temperature, "0 (greedy) or more")
        _check(0 < self.top_p <= 1, "generate.top_p", self.top_p, "0 < top_p <= 1")
        _check(self.score >= 0, "generate.score", self.score, "0 or more examples")
        _check(self.show >= 0, "generate.show", self.show, "0 or more examples")


@dataclasses.dataclass(frozen=True)
class Log:
    tensorboard: bool
    wandb: bool


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, all of it checked.

    Attributes:
      quant: number format of the frozen base; '' leaves it as it is.
    """

    seed: int
    model: Model
    data: Data
    task: Task
    adapter: Adapter
    train: TrainSettings
    mesh: Mesh
    generate: Generate
    log: Log
    quant: str = ""

    def __post_init__(self):
        _check(self.seed >= 0, "seed", self.seed, "0 or more")
        if self.quant and self.quant not in quant.formats():
            raise UserError(f"quant={self.quant!r} is not a number format: {did_you_mean(self.quant, quant.formats())}")


def choose_adapter(section: Mapping[str, Any], overrides: Collection[str] = ()) -> Adapter:
    """Matches the section `adapter` of a config with the method's own parameters.

    Args:
      section: method, head, rank, alpha, targets, layers (unset: None or 'default') and options.
      overrides: dotted names of fields that the command line or a sweep set.

    Raises:
      UserError: an unknown method; a field that the method does not have, where `overrides` names it or where the
        config file itself chose the method and misspells one of its options.
    """
    method = section["method"]
    known = _parameters(method)
    given = {name: section[name] for name in COMMON} | {f"options.{k}": v for k, v in section["options"].items()}
    arguments, notes = {}, []
    for field, value in given.items():
        name = field.removeprefix("options.")
        has = known & set(COMMON) if field in COMMON else known - set(COMMON)
        if value is None or value == DEFAULT:
            continue
        if name in has:
            arguments[name] = value
            continue
        message = f"adapter.{field}={value!r}: the method {method!r} has no {name!r}; {did_you_mean(name, has)}"
        misspelt = field not in COMMON and "adapter.method" not in overrides
        if f"adapter.{field}" in overrides or misspelt:
            raise UserError(message)
        notes.append(f"adapter.{field}={value!r} has no effect: the method {method!r} does not have it")
    if MEMBERS in known:
        arguments[MEMBERS] = _members(arguments.get(MEMBERS, USUAL))
    return Adapter(method=method, head=section["head"], arguments=arguments, notes=tuple(notes))


def _parameters(method: str) -> set[str]:
    parameters = inspect.signature(adapters.get(method)).parameters.values()
    return {MEMBERS if p.kind is p.VAR_POSITIONAL else p.name for p in parameters}


def _members(value: Any) -> list[dict[str, Any]]:
    """The members of a chain as specs: names with commas between them, or a list of names and {'method': ..., ...}."""
    value = _literal(value)
    listed = value.split(",") if isinstance(value, str) else value
    form = "'lora,bottleneck', or a list such as [{'method': 'lora', 'targets': 'q,v'}, 'layernorm']"
    _check(isinstance(listed, (list, tuple)) and len(listed) > 0, f"adapter.options.{MEMBERS}", value, form)
    out = []
    for one in listed:
        one = {"method": one.strip()} if isinstance(one, str) else one
        _check(isinstance(one, Mapping) and "method" in one, f"adapter.options.{MEMBERS}", one, form)
        out.append({name: v for name, v in one.items() if v is not None and v != DEFAULT})
    return out


def _literal(value: Any) -> Any:
    """A string that spells a Python literal becomes it: a config file and a sweep may write either."""
    if isinstance(value, str):
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return value
    return value


def _numbers(value: Any, name: str, form: str) -> list[Any]:
    """The numbers of a field that takes one number, or (pattern, number) rules."""
    value = _literal(value)
    if isinstance(value, Mapping):
        value = list(value.items())
    if not isinstance(value, (list, tuple)):
        return [value]
    pairs = all(isinstance(rule, (list, tuple)) and len(rule) == 2 and isinstance(rule[0], str) for rule in value)
    _check(bool(value) and pairs, name, value, form)
    return [rule[1] for rule in value]


def _check_rank(value: Any) -> None:
    form = "a whole number, 1 or more, or rules [(pattern, rank), ...]"
    ranks = _numbers(value, "adapter.rank", form)
    _check(all(type(r) is int and r >= 0 for r in ranks), "adapter.rank", value, form)
    _check(any(ranks), "adapter.rank", value, f"{form}; rank 0 everywhere leaves nothing to train")


def _check_alpha(value: Any) -> None:
    form = "a number above 0, or rules [(pattern, alpha), ...]"
    alphas = _numbers(value, "adapter.alpha", form)
    _check(all(type(a) in (int, float) and a > 0 for a in alphas), "adapter.alpha", value, form)


def _check_targets(value: Any) -> None:
    listed = isinstance(value, (str, list, tuple))
    _check(
        listed and bool(parse_patterns(value)),
        "adapter.targets",
        value,
        "patterns on whole paths, or roles, as in 'q,v'",
    )


def _check_members(value: Any) -> None:
    """Each as if it were the run's method, in the words of the whole list."""
    for one in value:
        method, given = one["method"], {name: v for name, v in one.items() if name != "method"}
        known = _parameters(method)
        for name in given:
            if name not in known:
                raise UserError(
                    f"adapter.options.{MEMBERS}: the method {method!r} has no {name!r}; {did_you_mean(name, known)}"
                )
        Adapter(method=method, head="none", arguments=given)


def _check_layers(value: Any) -> None:
    # The form only: how many layers there are is known when the model is. `parse_layers` counts from a number of them
    # that no model has, so only a wrong form can fail.
    try:
        parse_layers(value, 10**6)
    except UserError:
        raise UserError(
            f"adapter.layers={value!r}: expected 'all', 'last:k', 'first:k' (k from 1) or [i, ...]"
        ) from None
