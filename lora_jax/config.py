"""The configuration of a run: every field with its default and meaning, and the one place where a config is checked.

`default()` is a locked `ConfigDict`, which config files and `--config.a.b=value` change; `resolve()` turns it into
frozen dataclasses. Below this file nobody sees a `ConfigDict`, and nobody checks a field again.
"""

import functools
import types
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from lora_jax import adapters
from lora_jax.errors import UserError, nearest
from lora_jax.settings import Config, Data, Generate, Log, Mesh, Model, Task, choose_adapter
from lora_jax.train_settings import TrainSettings

# Sections whose keys are free: their names belong to a data set, a task or a method.
DEFAULT_STEPS = 300
FREE = ("data.fields", "task.options", "adapter.options")


def default() -> ConfigDict:
    """The embedded default: LoRA on the tiny decoder, on text that the project generates.

    A field that is unset (`placeholder`) takes the value that its method, checkpoint or data set has by itself; in
    `adapter` the word `default` unsets it again.
    """
    cfg = ConfigDict()
    cfg.seed = 0  # of initial values, data order and dropout

    cfg.model = ConfigDict()
    cfg.model.path = ""  # directory or hub id in Hugging Face layout; '' is the embedded tiny decoder
    cfg.model.dtype = "float32"  # of the frozen base: float32, bfloat16 or float16
    cfg.model.dropout = placeholder(float)  # unset: the checkpoint's own
    cfg.model.remat = False  # keep each layer's input alone for the backward pass: less memory, more work

    cfg.quant = ""  # number format of the frozen base, a file of lora_jax/quant: nf4 (QLoRA), fp4, int8, int4

    cfg.data = ConfigDict()
    cfg.data.path = ""  # directory of train/dev/test.jsonl, one file, or hub id; '' is the embedded second domain
    cfg.data.fields = ConfigDict()  # our field name -> the data's: --config.data.fields.text=sentence
    cfg.data.max_length = 128  # tokens; longer examples are cut
    cfg.data.limit = placeholder(int)  # examples per split

    cfg.task = ConfigDict()
    cfg.task.name = "sft"  # a file of lora_jax/tasks
    cfg.task.options = ConfigDict()  # a task's own

    cfg.adapter = ConfigDict()
    cfg.adapter.method = "lora"  # a file of lora_jax/adapters
    cfg.adapter.rank = placeholder(object)  # 8, or rules: [('.*/query/kernel', 4), ('.*', 8)]
    cfg.adapter.alpha = placeholder(object)  # scale is alpha / rank; a number or rules
    cfg.adapter.targets = placeholder(object)  # patterns on whole paths, or roles: 'q,v'
    cfg.adapter.layers = placeholder(object)  # all, last:4, first:4, [0, 3]
    cfg.adapter.head = "full"  # full: the task's head trains beside any method; none: it stays as it is
    # A method's own: --config.adapter.options.dropout=0.1. Of a chain its members: adapters=lora,layernorm, or
    # adapters="[{'method': 'lora', 'targets': 'q,v', 'rank': 4}, {'method': 'bottleneck', 'targets': 'down'}]".
    cfg.adapter.options = ConfigDict()

    cfg.train = ConfigDict()
    cfg.train.steps = 0  # optimizer steps; set this or epochs, and where neither is set it is DEFAULT_STEPS
    cfg.train.epochs = 0.0  # passes over the data, in place of steps
    cfg.train.batch_size = 32  # examples (rows, with packing) per optimizer step
    cfg.train.eval_batch_size = 64  # changes memory and speed, not the result
    cfg.train.accumulate = 1  # micro-batches that a batch is cut into
    cfg.train.learning_rate = placeholder(float)  # unset: the method's own, 1e-3 for most and 1e-4 for `full`
    cfg.train.schedule = "linear"  # constant, cosine, linear: what follows the warm-up
    cfg.train.warmup = 0.0  # steps, or below 1 a fraction of all
    cfg.train.weight_decay = 0.0  # on matrices, not on biases, norms and scales
    cfg.train.clip_norm = 1.0  # of the whole gradient; 0 is off
    cfg.train.b1 = 0.9
    cfg.train.b2 = 0.999
    cfg.train.eps = 1e-8
    cfg.train.lora_plus_ratio = 1.0  # learning rate of B over that of A
    cfg.train.eval_every = 100  # steps between evaluations on dev; 0: at the end only
    cfg.train.checkpoint_every = 100  # steps; 0: after evaluations that improve, and at the end
    cfg.train.log_every = 10  # steps
    cfg.train.patience = 0  # evaluations without improvement before it stops; 0 is off
    cfg.train.keep = 2  # newest checkpoints that stay on disk, besides the best
    cfg.train.packing = False  # several examples in one row, batch_size counts rows
    cfg.train.share_rows = False  # the examples of a step share rows, batch_size counts examples
    cfg.train.buckets = placeholder(object)  # lengths that rows are padded to; unset: a few up to data.max_length
    cfg.train.prefix_cache = "auto"  # keep what lies below the adapter over epochs; on: without the base's dropout; off
    cfg.train.prefix_cache_gb = 2.0  # memory that it may take
    cfg.train.prefix_cache_disk_gb = 0.0  # room in the work directory, for what does not fit into memory

    cfg.mesh = ConfigDict()  # devices along each axis; their product is what the run uses
    cfg.mesh.data = 1  # copies of the model, each with a part of the batch; -1: all devices that are left
    cfg.mesh.fsdp = 1  # as data, with the weights cut up too
    cfg.mesh.tensor = 1  # every product cut up

    cfg.generate = ConfigDict()
    cfg.generate.max_new_tokens = 64
    cfg.generate.temperature = 0.0  # 0 is greedy
    cfg.generate.top_p = 1.0
    cfg.generate.score = 0  # dev examples whose generated text is scored before and after training; 0: no comparison
    cfg.generate.show = 3  # of these, how many are shown

    cfg.log = ConfigDict()
    cfg.log.tensorboard = False  # needs the extra `tensorboard`
    cfg.log.wandb = False  # needs the extra `wandb`

    cfg.lock()
    for path in FREE:
        section, name = path.split(".")
        cfg[section][name].unlock()
    return cfg


@functools.cache
def fields() -> Mapping[str, type]:
    """`{dotted name: type}` of every field; `object` where several types will do, `ConfigDict` for a free section."""
    cfg = default()
    found = {
        path: (cfg[path.split(".")[0]] if "." in path else cfg).get_type(path.split(".")[-1]) for path, _ in _flat(cfg)
    }
    return types.MappingProxyType(found)


@functools.cache
def _unset() -> frozenset[str]:
    return frozenset(path for path, value in _flat(default()) if value is None)


def resolve(cfg: ConfigDict, overrides: Collection[str] = ()) -> Config:
    """Checks a config and freezes it.

    Args:
      cfg: `default()` with changes.
      overrides: dotted names of the fields that the command line or a sweep set. These must mean something to the
        method; a config file may set fields for another method than the one chosen.

    Raises:
      UserError: an unknown field, method or task; a value of the wrong type or out of range.
    """
    flat = dict(_flat(cfg))
    for path, value in flat.items():
        _check_type(path, value)
    missing = [path for path in fields() if path not in flat]
    if missing:
        raise UserError(f"the config has no field {missing[0]!r}: start from lora_jax.config.default()")
    tree = cfg.to_dict()
    return Config(
        seed=tree["seed"],
        model=Model(**tree["model"]),
        data=Data(**tree["data"]),
        task=Task(**tree["task"]),
        adapter=choose_adapter(tree["adapter"], overrides),
        train=TrainSettings(**tree["train"] | _length(tree["train"], overrides) | _rate(tree)),
        mesh=Mesh(**tree["mesh"]),
        quant=tree["quant"],
        generate=Generate(**tree["generate"]),
        log=Log(**tree["log"]),
    )


def _length(train: Mapping[str, Any], overrides: Collection[str]) -> dict[str, Any]:
    """Steps or epochs: what the command line sets wins over what the file set."""
    steps, epochs = train["steps"], train["epochs"]
    if steps and epochs and ("train.steps" in overrides) != ("train.epochs" in overrides):
        return {"steps": 0} if "train.epochs" in overrides else {"epochs": 0.0}
    return {"steps": DEFAULT_STEPS} if not steps and not epochs else {}


def from_dict(values: Mapping[str, Any]) -> ConfigDict:
    """The config whose `to_dict()` is `values`, as `config.json` holds it.

    Raises:
      UserError: a field that this version does not have, or of the wrong type.
    """
    cfg = default()
    for path, value in _flat(values):
        _check_type(path, value)
        if value is not None:
            section, _, name = path.rpartition(".")
            (cfg[section] if section else cfg)[name] = value
    return cfg


def _rate(tree: Mapping[str, Any]) -> dict[str, float]:
    """The peak learning rate: what was given, else the method's own."""
    given = tree["train"]["learning_rate"]
    return {"learning_rate": adapters.learning_rate(tree["adapter"]["method"]) if given is None else given}


def variant(
    cfg: ConfigDict, changes: Mapping[str, Any], overrides: Collection[str] = ()
) -> tuple[dict[str, Any], Config]:
    """A config with some fields changed, `cfg` itself untouched.

    Args:
      cfg: `default()` with changes.
      changes: `{dotted name: value}`, as an arm of a sweep sets them; None unsets a field that may be unset.
      overrides: dotted names of fields that the command line set; those of `changes` count too.

    Returns:
      (nested plain values, resolved config); the values resolve to the same config without overrides, save for notes
      on options of another method, which are not among them.

    Raises:
      UserError: an unknown field, a section in place of a field, a value of the wrong type or out of range.
    """
    new = from_dict(cfg.to_dict())
    for path, value in changes.items():
        section, _, name = path.rpartition(".")
        if section not in FREE:
            _check_settable(path)
            _check_type(path, value)
        parent = new
        for part in filter(None, section.split(".")):
            parent = parent[part]
        parent[name] = value
    config = resolve(new, {*overrides, *changes})
    values = new.to_dict()
    # Without the overrides nobody could tell any more which of steps and epochs had won, or whose an option is.
    values["train"] |= {"steps": config.train.steps, "epochs": config.train.epochs}
    options = values["adapter"]["options"]
    values["adapter"]["options"] = {name: value for name, value in options.items() if name in config.adapter.arguments}
    return values, config


def _check_settable(path: str) -> None:
    """Raises for a whole section; an unknown name is told by `_check_type`."""
    inside = [name for name in fields() if name.startswith(path + ".")]
    if inside or path in FREE:
        raise UserError(
            f"{path} is a section; set one of its fields, such as {inside[0] if inside else path + '.NAME'}"
        )


def unknown_field(path: str) -> str:
    """The message for a field that no config has: the nearest name, and what its section holds."""
    section = path.rpartition(".")[0]
    siblings = [n.rpartition(".")[2] for n in fields() if n.rpartition(".")[0] == section]
    known = f" ({section or 'the top level'} has {', '.join(siblings)})" if siblings else ""
    return f"there is no config field {path!r}: did you mean {nearest(path, fields(), 1)[0]!r}?{known}"


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field; a free section is one field."""
    for name, value in tree.items():
        if isinstance(value, (ConfigDict, Mapping)) and prefix + name not in FREE:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _check_type(path: str, value: Any) -> None:
    if path not in fields():
        raise UserError(unknown_field(path))
    expected: Any = fields()[path]
    if expected is object or (value is None and path in _unset()):
        return
    accepted = {float: (int, float), ConfigDict: (ConfigDict, dict)}.get(expected, expected)
    if not isinstance(value, accepted) or (isinstance(value, bool) and expected is not bool):
        raise UserError(f"{path}={value!r}: expected {type_name(expected)}, got {type(value).__name__}")


def type_name(kind: type) -> str:
    """'an integer', ...: the type of a field in the words of a message."""
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}.get(kind, "fields of its own")
