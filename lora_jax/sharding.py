"""Where arrays lie on a mesh of devices: the mesh, rules for the base, and specs that a delta inherits from its base.

Three mesh axes. `data`: copies of everything, each with its part of the batch. `fsdp`: the batch is split over it too,
and the weights as well, gathered when they are used. `tensor`: single products are split. The base follows ordered
`(pattern, axes)` rules on paths; what no rule names has its largest divisible axis put on `fsdp`. A delta states what
the axes of its arrays mean, so that A lies as the fan-in axes of its base weight do and B as the fan-out axes do;
optimizer slots lie as the leaf they belong to.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from lora_jax import trees
from lora_jax.errors import UserError, did_you_mean
from lora_jax.lift import is_adapted

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
# Names that a family may use for a weight's axes, and the mesh axis each one lies on.
LOGICAL: dict[str, str | None] = {
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "head_dim": None,
    "labels": None,
    "layers": None,
    "length": None,
    "norm": None,
}
Rules = Sequence[tuple[str, Sequence[Any] | None]]
Note = Callable[[str], None]


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds a mesh over the first `data * fsdp * tensor` devices.

    Args:
      data: copies of the model. -1 takes all the devices that the other two leave.
      fsdp: parts that each copy's weights are split into, the batch with them.
      tensor: parts that each product is split into.
      devices: to choose from; None is `jax.devices()`.

    Raises:
      UserError: a size below 1, or more devices than there are.
    """
    devices = list(jax.devices() if devices is None else devices)
    if data == -1:
        data = max(1, len(devices) // max(1, fsdp * tensor))
    sizes = (data, fsdp, tensor)
    given = ", ".join(f"mesh.{name}={size}" for name, size in zip(AXES, sizes, strict=True))
    if any(type(size) is not int or size < 1 for size in sizes):
        raise UserError(f"{given}: each size must be an integer of at least 1 (mesh.data may be -1: all that are left)")
    needed = math.prod(sizes)
    if needed > len(devices):
        raise UserError(
            f"{given} needs {needed} devices, but there {'is' if len(devices) == 1 else 'are'} {len(devices)} "
            f"({devices[0].platform}); lower one of them so that the product is at most {len(devices)}"
        )
    # Linen's logical constraints need Auto axes: on the default, Explicit, they raise.
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:needed])


def use(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Makes the mesh the current one inside `with`; None is one device and no mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def sharding(mesh: Mesh | None, spec: P) -> jax.sharding.Sharding:
    """One spec on one mesh; without a mesh everything lies on the first device."""
    return SingleDeviceSharding(jax.devices()[0]) if mesh is None else NamedSharding(mesh, spec)


def shardings(mesh: Mesh | None, specs: Any) -> Any:
    """A tree of specs -> the same tree of shardings."""
    return jax.tree.map(lambda spec: sharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))


def check_batch(mesh: Mesh | None, batch_size: int, *, accumulate: int = 1, name: str = "train.batch_size") -> None:
    """Checks that a batch splits evenly into micro-batches and over the mesh.

    Raises:
      UserError: it does not; the message has the nearest sizes that do.
    """
    parts = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    unit = parts * accumulate
    if batch_size % unit == 0:
        return
    below, above = batch_size // unit * unit, -(-batch_size // unit) * unit
    why = [f"mesh.data * mesh.fsdp = {parts}"] if parts > 1 else []
    why += [f"train.accumulate = {accumulate}"] if accumulate > 1 else []
    raise UserError(
        f"{name}={batch_size} does not divide by {unit} ({' times '.join(why)}); "
        f"use {f'{below} or {above}' if below else above}, or change {' or '.join(w.split(' =')[0] for w in why)}"
    )


def base_specs(variables: Any, rules: Rules, mesh: Mesh, note: Note | None = None) -> dict[str, P]:
    """Chooses a spec for every leaf of the base.

    Args:
      variables: the base (arrays or anything with a shape).
      rules: ordered (pattern, axes) pairs; the first pattern that matches the whole path wins. `axes` has one entry per
        axis of the weight: a mesh axis, a name of `LOGICAL`, several of these in a tuple, or None.
      mesh: from `make_mesh`.
      note: is told about every axis that stays whole although a rule asked to split it.

    Returns:
      {path: spec}.

    Raises:
      UserError: a rule names an unknown axis.
    """
    note = note or (lambda _: None)
    leaves = trees.flatten(variables, is_leaf=is_adapted)
    return {path: _spec(path, leaf.shape, rules, mesh, note) for path, leaf in leaves.items()}


def _spec(path: str, shape: tuple[int, ...], rules: Rules, mesh: Mesh, note: Note) -> P:
    for pattern, axes in rules:
        if not trees.matches(pattern, path):
            continue
        if axes is None:
            return P()
        if len(axes) == len(shape):
            return _fit(path, shape, [_mesh_axes(a, pattern) for a in axes], mesh, note)
        note(f"{path}: the rule {pattern!r} has {len(axes)} axes, the weight has shape {shape}; the default is used")
    return _default(shape, mesh)


def _mesh_axes(entry: Any, pattern: str) -> tuple[str, ...]:
    """One entry of a rule -> the mesh axes it stands for."""
    if entry is None:
        return ()
    if isinstance(entry, (tuple, list)):
        return tuple(axis for part in entry for axis in _mesh_axes(part, pattern))
    if entry in AXES:
        return (entry,)
    if entry not in LOGICAL:
        known = did_you_mean(str(entry), [*AXES, *LOGICAL])
        raise UserError(f"the sharding rule {pattern!r} names the axis {entry!r}; {known}")
    axis = LOGICAL[entry]
    return () if axis is None else (axis,)


def _fit(path: str, shape: tuple[int, ...], wanted: list[tuple[str, ...]], mesh: Mesh, note: Note) -> P:
    """Keeps of the wanted axes what divides the dimension and is not used yet."""
    used: set[str] = set()
    entries: list[Any] = []
    for i, axes in enumerate(wanted):
        axes = tuple(a for a in axes if mesh.shape[a] > 1)
        parts = math.prod(mesh.shape[a] for a in axes)
        if shape[i] % parts or used & set(axes):
            name = " * ".join(axes)
            reason = (
                f"another axis is split over {name}" if used & set(axes) else f"{name} = {parts} does not divide it"
            )
            note(f"{path}: axis {i} of size {shape[i]} stays whole ({reason})")
            axes = ()
        used |= set(axes)
        entries.append(axes[0] if len(axes) == 1 else axes or None)
    return P(*entries)


def _default(shape: tuple[int, ...], mesh: Mesh) -> P:
    """The largest axis that divides, over fsdp. Vectors stay whole: gathering them costs more than it saves."""
    parts = mesh.shape["fsdp"]
    divisible = [(size, -i) for i, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or len(shape) < 2 or not divisible:
        return P()
    axis = -max(divisible)[1]
    return P(*(["fsdp" if i == axis else None for i in range(len(shape))]))


def delta_specs(delta: Mapping[str, Any], specs: Mapping[str, P], mesh: Mesh | None = None) -> Any:
    """Specs of a delta's arrays, from those of the weights they belong to.

    An entry's class says in `layout` what the axes of each field mean: `batch`, `fan_in`, `fan_out` each stand for that
    group of the site's axes, any other word for one axis of the entry's own (a rank), which stays whole. A field
    without a layout lies as the weight does where their number of axes agrees, whole elsewhere.

    Args:
      delta: {path: entry}.
      specs: {path: spec} of the base.
      mesh: where given, an axis that does not divide there stays whole (a stack of which only some layers are kept).

    Returns:
      The delta's structure with a spec at every array.
    """
    return {path: _entry_specs(entry, specs.get(path, P()), mesh) for path, entry in delta.items()}


def _entry_specs(entry: Any, spec: P, mesh: Mesh | None) -> Any:
    layout = getattr(entry, "layout", None) or {}
    axes = getattr(entry, "axes", None)

    def one(keypath, leaf):
        roles = layout.get(str(getattr(keypath[0], "name", ""))) if keypath else None
        if roles is None or axes is None:
            entries = list(spec)
        else:
            entries = [e for role in roles for e in _role_entries(role, axes, spec)]
        return P(*_divisible(entries, leaf.shape, mesh)) if len(entries) == leaf.ndim else P()

    return jax.tree_util.tree_map_with_path(one, entry)


def _role_entries(role: str, axes: Any, spec: P) -> list[Any]:
    if role not in ("batch", "fan_in", "fan_out"):
        return [None]
    return [spec[a] if a < len(spec) else None for a in getattr(axes, role)]


def _divisible(entries: list[Any], shape: tuple[int, ...], mesh: Mesh | None) -> list[Any]:
    if mesh is None:
        return entries
    parts = [math.prod(mesh.shape[a] for a in ((e,) if isinstance(e, str) else e or ())) for e in entries]
    return [e if size % p == 0 else None for e, size, p in zip(entries, shape, parts, strict=True)]


def slot_specs(slots: Any, params: Any, specs: Any) -> Any:
    """Specs of optimizer slots: a slot that stands at a parameter's place and has its shape lies as the parameter.

    Args:
      slots: the optimizer's state (arrays or shapes).
      params: the parameters it was made for.
      specs: their specs, same structure.

    Returns:
      The structure of `slots`; counters and the like are replicated.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    own = dict(zip([k for k, _ in leaves], jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P)), strict=True))
    shapes = {k: leaf.shape for k, leaf in leaves}

    def one(keypath, leaf):
        tail = next((keypath[i:] for i in range(len(keypath)) if keypath[i:] in own), None)
        return own[tail] if tail is not None and shapes[tail] == leaf.shape else P()

    return jax.tree_util.tree_map_with_path(one, slots)


def place_base(variables: Any, specs: Mapping[str, P] | None, mesh: Mesh | None) -> Any:
    """Puts the base on the devices, a quantized weight as its dense one; leaves outside the specs are replicated."""
    specs = specs or {}

    def one(path, leaf):
        return shardings(mesh, _quantized_specs(leaf, specs.get(path, P()), mesh))

    targets = trees.map_with_path(one, variables, is_leaf=is_adapted)
    return jax.device_put(variables, targets)


def _quantized_specs(leaf: Any, spec: P, mesh: Mesh | None) -> Any:
    """The spec of an array; of a quantized weight one for each packed array, whole where an axis does not divide."""
    if not is_adapted(leaf):
        return spec
    own = leaf.placement(spec)
    fit = lambda array, one: P(*_divisible(list(one), array.shape, mesh))  # noqa: E731
    return jax.tree.map(fit, leaf, own)
