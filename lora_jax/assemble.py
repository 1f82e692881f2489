"""From a configuration to the parts of a run: data, task, base, adapter, mesh.

The cheap parts come first, so that a mistake in the data is reported before a checkpoint is read.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax import adapters, data, export, models, quant, saving, sharding, tasks, tiny
from lora_jax.adapters import Adapter
from lora_jax.errors import UserError
from lora_jax.lift import input_moments
from lora_jax.models import files
from lora_jax.models import tokenizer as tokenizers
from lora_jax.settings import Config

MOMENT_EXAMPLES = 256  # training examples that an adapter which starts from data looks at
PEFT_CONFIG = "adapter_config.json"  # the file that makes a folder an adapter in PEFT's format


class Parts(NamedTuple):
    """Attributes: mesh: None for a single device."""

    base: models.Base
    task: Any
    splits: data.Splits
    adapter: Adapter
    mesh: jax.sharding.Mesh | None


def assemble(config: Config, *, need: tuple[str, ...] = ("train", "dev")) -> Parts:
    """Loads and builds all that a run needs.

    Args:
      config: from `config.resolve`.
      need: splits of the data that must be there.

    Raises:
      UserError: whatever the user can mend: a file, a field, a label, a pattern, a device count.
    """
    mesh = make_mesh(config)
    sharding.check_batch(mesh, config.train.batch_size, accumulate=config.train.accumulate)
    splits = load_data(config, need)
    task = make_task(config, splits)
    base = load_base(config, len(task.labels) if task.labels else None)
    return Parts(base, task, splits, make_adapter(config, base), mesh)


def make_mesh(config: Config) -> jax.sharding.Mesh | None:
    """The mesh that the config asks for; None where one device does."""
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    return mesh if mesh.size > 1 else None


def model_path(config: Config) -> str:
    """The model's directory or hub id; the embedded one if the config names none."""
    return config.model.path or str(tiny.path())


def data_path(config: Config) -> str:
    """The data's path or hub id; the embedded second domain if the config names none."""
    return config.data.path or str(tiny.data_path())


def load_data(config: Config, need: tuple[str, ...]) -> data.Splits:
    """The splits; a mistake in them names the path that was given."""
    path = data_path(config)
    try:
        return data.load(path, fields=config.data.fields, limit=config.data.limit, need=need)
    except UserError as error:
        if path in str(error):
            raise
        raise UserError(f"data.path={path}: {error}") from None


def make_task(config: Config, splits: data.Splits) -> Any:
    """The task, with the tokenizer of the config's model."""
    tokenizer = tokenizers.load(files.find(model_path(config)))
    make = tasks.get(config.task.name)
    return make(tokenizer=tokenizer, max_length=config.data.max_length, splits=splits, **config.task.options)


def load_base(config: Config, num_labels: int | None = None) -> models.Base:
    """The base, quantized if the config says so; a fresh head has the run's seed."""
    model = config.model
    with jax.default_device(_host() if config.quant else None):
        base = models.load_pretrained(
            model_path(config),
            dtype=model.dtype,
            num_labels=num_labels,
            dropout=model.dropout,
            seed=config.seed,
            remat=model.remat,
        )
    return models.quantized(base, config.quant) if config.quant else base


def _host() -> jax.Device | None:
    """Where dense weights wait to be quantized, so that they never fill an accelerator; None where JAX has no CPU."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def make_adapter(config: Config, base: models.Base) -> Adapter:
    """The method, and beside it the task's head, trained in place where the method itself leaves it alone."""
    adapter = adapters.from_spec({"method": config.adapter.method, **_with_ids(config.adapter.arguments, base)})
    if config.adapter.head == "none" or base.num_labels is None:
        return adapter
    head = adapters.get("head")
    chosen = _selected(adapter, base)
    rest = [path for path in _selected(head(), base) if path not in chosen]
    if not rest:
        return adapter
    return adapters.get("chain")(adapter, head(targets=[re.escape(path) for path in rest]))


def start_data(config: Config, parts: Parts) -> dict[str, Any] | None:
    """What the adapter's `init` needs beside the base: `adapter.needs`."""
    if parts.adapter.needs == "moments":
        return _moments(config, parts)
    if parts.adapter.needs == "residuals":
        return _residuals(config, parts.base)
    return None


def _residuals(config: Config, base: models.Base) -> dict[str, Any]:
    if not config.quant:
        raise UserError(
            "this adapter starts from what quantization takes away, but the base is not quantized: set quant=nf4 (or "
            "another format), or choose another adapter.options.init"
        )
    path, model = model_path(config), config.model
    dense = models.load_pretrained(path, dtype=model.dtype, num_labels=base.num_labels, seed=config.seed)
    return quant.residuals(dense.variables, base.variables)


def _moments(config: Config, parts: Parts) -> dict[str, Any]:
    """The inputs of the adapter's sites over the first training examples."""
    records = parts.task.prepare(parts.splits["train"][:MOMENT_EXAMPLES])
    batches = data.Batches(
        [parts.task.encode(record) for record in records], batch_size=config.train.batch_size, seed=config.seed,
        max_length=config.data.max_length,
    )  # fmt: skip
    paths = _linear(parts.base)  # how the ranks are shared out decides which of them are adapted
    total: dict[str, Any] = {}
    for batch in batches.in_order():
        inputs = parts.task.inputs(batch)
        found = input_moments(parts.base.apply, parts.base.variables, parts.base.sites, paths, **inputs)
        total = {p: found[p] + total.get(p, 0.0) for p in paths}
    return total


def _linear(base: models.Base) -> list[str]:
    return [p for p, s in base.sites.items() if set(s.uses) == {"linear"}]


def _with_ids(arguments: Mapping[str, Any], base: models.Base) -> dict[str, Any]:
    """A method's arguments, a text for `init_tokens` as the ids of the run's tokenizer, without special tokens."""
    if "adapters" in arguments:  # of a chain, each its own
        return {**arguments, "adapters": [_with_ids(one, base) for one in arguments["adapters"]]}
    text = arguments.get("init_tokens")
    if not isinstance(text, str):
        return dict(arguments)
    ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"adapter.options.init_tokens={text!r} holds no token; give a text or a list of ids")
    return {**arguments, "init_tokens": list(ids)}


def _selected(adapter: Adapter, base: models.Base) -> set[str]:
    """Paths that an adapter takes."""
    return set(delta_shapes(adapter, base))


def delta_shapes(adapter: Adapter, base: models.Base) -> dict[str, Any]:
    """The delta that `adapter.init` would make, shapes in place of arrays; the base may be an outline.

    What an adapter needs beside the base is taken to be featureless: even moments, residuals of zero.
    """
    sites, even = base.sites, None
    if adapter.needs == "moments":
        even = {p: np.eye(math.prod(sites[p].dims(sites[p].fan_in))) for p in _linear(base)}
    if adapter.needs == "residuals":
        even = {p: np.zeros(sites[p].shape, np.float32) for p in _linear(base)}
    init = lambda key, v: adapter.init(key, v, sites, batch=even)  # noqa: E731
    return jax.eval_shape(init, jax.random.key(0), base.variables)


def save_adapter(folder: Path, parts: Parts, delta: Any) -> None:
    """Writes the trained adapter: in PEFT's format where PEFT has the method, else in ours."""
    if export.has_format(parts.adapter, delta, parts.base):
        export.save_peft(folder, parts.adapter, delta, parts.base)
    else:
        saving.save(folder, parts.adapter, delta, parts.base.variables)


def load_adapter(folder: Path, base: models.Base) -> tuple[Adapter, dict[str, Any]]:
    """Reads what `save_adapter` wrote.

    Raises:
      UserError: nothing there, damaged files, or another base.
    """
    if (folder / PEFT_CONFIG).exists():
        return export.load_peft(folder, base)
    return saving.load(folder, base.variables)
