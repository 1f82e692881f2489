"""The noun of this project: an adapter is a method with its hyper-parameters, as a tuple of pure functions.

    init(key, variables, sites)          -> delta        what is added to the base, only where sites were selected
    bind(variables, delta)               -> variables    with adapted weights at those sites, for a lifted function
    merge(variables, delta)              -> variables    a plain tree again
    trainable(delta)                     -> tree of bool what gets gradients and optimizer slots
    spec                                 -> JSON         rebuilds the adapter

A delta is a dictionary from site path to an entry: a small registered dataclass with float arrays as leaves and the
site's axes as static fields. An entry's class says in `layout` which axes of its weight each array runs along;
sharding and stacked layers follow from that. A key that begins with `@` names an entry that belongs to no site: arrays
that several sites share, or virtual tokens. `per_site` makes the five functions of what a method does to one site,
which is all that most method files contain.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import trees
from lora_jax.errors import UserError, nearest
from lora_jax.lift.weight import AdaptedWeight, Axes, is_adapted
from lora_jax.sites import Site, Sites

SHARED = "@"  # first letter of the keys of a delta that name no site
Delta = dict[str, Any]
Tree = Any


class Adapter(NamedTuple):
    """A method with its hyper-parameters.

    Attributes:
      init: `(key, variables, sites, *, batch=None) -> delta`.
      bind: `(variables, delta, *, key=None, scale=None) -> variables` with adapted weights. `key` turns the
        adapter's own
        dropout on; `scale` (a number, an array over a site's batch axes, or `{path: ...}`) replaces alpha/rank with
        data; a method that has no scale (weights trained in place, vectors) leaves it alone.
      merge: `(variables, delta) -> variables`, plain arrays, summed in float32 and cast to the weights' dtype.
      trainable: `delta -> tree of bool` of the same structure.
      spec: JSON that `from_spec` rebuilds the adapter from.
      penalty: `delta -> scalar` added to the loss, or None.
      wrap: `optax transformation -> optax transformation`, or None: it sees the raw gradients and edits the updates.
      starts_as_base: whether the first output is promised to be the base's.
      own_rows: whether it needs a row of the batch for each text, so that texts cannot be packed.
      needs: what `init` needs as `batch`, a dictionary by site path: 'moments', second moments of the site's input
        (`lj.input_moments`); 'residuals', what a quantized weight lost (`quant.residuals`); or '' for nothing.
    """

    init: Callable[..., Delta]
    bind: Callable[..., Tree]
    merge: Callable[[Tree, Delta], Tree]
    trainable: Callable[[Delta], Tree]
    spec: dict[str, Any]
    penalty: Callable[[Delta], jax.Array] | None = None
    wrap: Callable[[Any], Any] | None = None
    starts_as_base: bool = True
    own_rows: bool = False
    needs: str = ""


@dataclass_transform(kw_only_default=True, frozen_default=True)
def entry(meta: Sequence[str] = ()) -> Callable[[type], type]:
    """Class decorator: a frozen, registered dataclass with the static fields `axes`, `member` and `meta`."""

    def register(cls: type) -> type:
        cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        static = ["axes", "member", *meta]
        data = [f.name for f in dataclasses.fields(cls) if f.name not in static]
        return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=static)

    return register


class Entry:
    """Base class of a delta's entries; fields `axes: Axes` and `member: str` (which part of a chain made it)."""

    layout: ClassVar[dict[str, tuple[str, ...]]] = {}
    # Whether zeros appended along `rank` in all arrays are a fixed point of training: arms of several ranks then stack.
    widens: ClassVar[bool] = False
    axes: Axes
    member: str

    def fits(self, fan_in: int, fan_out: int) -> bool:
        """Whether the arrays fit a weight of these sizes, beyond what `layout` tells."""
        del fan_in, fan_out
        return True


class Place(NamedTuple):
    """Where an entry is put.

    Attributes:
      path: of the site.
      key: folded with the path, or None: dropout is off.
      scale: what replaces the method's own scale here, or None.
      leaves: everything else that stands in the tree, by path.
      shared: the delta's entries that belong to no site, by name without the `@`.
    """

    path: str
    key: Any
    scale: Any
    leaves: Mapping[str, Any]
    shared: Mapping[str, Any]


def per_site(
    spec: dict[str, Any],
    *,
    choose: Callable[..., Mapping[str, Any]],
    make: Callable[..., Any],
    weight: Callable[[Any, Any, Place], Any],
    trainable: Callable[[Any], Any] | None = None,
    share: Callable[..., Mapping[str, Any]] | None = None,
    **more: Any,
) -> Adapter:
    """An adapter that acts on every site by itself.

    Args:
      spec: the JSON that rebuilds it.
      choose: sites -> `{path: option}`, the selection and what it says about each site (a rank, flags, ...); with
        `needs` it is called again with that and may choose otherwise.
      make: (key folded with the path, base weight, site, option) -> entry; with `needs`, the site's part of that too.
      weight: (base weight, entry, place) -> what stands at the site: an adapted weight or an array; or
        `{path: such}` where a method puts something elsewhere (at the layer's bias).
      trainable: entry -> the same entry with booleans; None: everything of a site trains, what is shared does not.
      share: (key, sites, chosen) -> `{name: entry}`, what the sites share.
      **more: further fields of `Adapter`.
    """

    def init(key, variables, sites, *, batch=None):
        leaves = trees.flatten(variables, is_leaf=is_adapted)
        chosen = choose(sites)
        check_paths(chosen, leaves)
        seen = _needed(spec, chosen, batch, more["needs"]) if more.get("needs") else {}
        chosen = choose(sites, batch) if seen else chosen
        extra = {} if share is None else share(trees.fold_path(key, SHARED), sites, chosen)
        delta = {SHARED + name: one for name, one in extra.items()}
        for path, option in chosen.items():
            delta[path] = make(trees.fold_path(key, path), leaves[path], sites[path], option, *seen.get(path, ()))
        return delta

    def place(variables, delta, key, scale):
        key = typed_key(key)
        leaves = trees.flatten(variables, is_leaf=is_adapted)
        shared = {path.removeprefix(SHARED): one for path, one in delta.items() if is_shared(path)}
        own = {path: one for path, one in delta.items() if not is_shared(path)}
        check_paths(own, leaves)
        new = {}
        for path, one in own.items():
            own_key = None if key is None else trees.fold_path(key, path)
            own_scale = scale.get(path) if isinstance(scale, Mapping) else scale
            check_fits(path, one, leaves[path])
            put = weight(leaves[path], one, Place(path, own_key, own_scale, leaves, shared))
            new.update(put if isinstance(put, dict) else {path: put})
        return new

    def bind(variables, delta, *, key=None, scale=None):
        return trees.replace(variables, place(variables, delta, key, scale), is_leaf=is_adapted)

    def merge(variables, delta):
        placed = place(variables, delta, None, None)
        dense = {p: w.dense() if isinstance(w, AdaptedWeight) else w for p, w in placed.items()}
        return trees.replace(variables, dense, is_leaf=is_adapted)

    def mask(delta):
        fill = lambda value: lambda one: jax.tree_util.tree_map(lambda _: value, one)  # noqa: E731
        return {path: (fill(False) if is_shared(path) else trainable or fill(True))(one) for path, one in delta.items()}

    return Adapter(init, bind, merge, mask, spec, **more)


def is_shared(path: str) -> bool:
    """True for the key of an entry that belongs to no site."""
    return path.startswith(SHARED)


_SOURCES = {
    "moments": "the inputs of its sites: init(..., batch=lj.input_moments(function, variables, sites, paths, *args))",
    "residuals": "what quantization took away: init(..., batch=quant.residuals(dense_variables, quantized_variables))",
}


def _needed(spec: Mapping, chosen: Mapping[str, Any], batch: Any, needs: str) -> dict[str, tuple]:
    missing = [path for path in chosen if path not in (batch or {})]
    if missing:
        raise UserError(
            f"the method {spec['method']!r} with these options starts from {_SOURCES[needs]}; there is nothing for "
            f"{missing[0]!r}"
        )
    return {path: (batch[path],) for path in chosen}


def only(*names: str) -> Callable[[Any], Any]:
    """For `per_site(trainable=...)`: the named fields train, the others are stored."""

    def mask(one):
        fields = {f.name: getattr(one, f.name) for f in dataclasses.fields(one)}
        arrays = {n: v for n, v in fields.items() if isinstance(v, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))}
        return dataclasses.replace(one, **{name: name in names for name in arrays})

    return mask


def bias_axes(site: Site, sites: Sites) -> tuple[str, tuple[int, ...]] | tuple[None, tuple]:
    """Where the layer's bias is, and which of its axes are batch axes: (path, axes), or (None, ()) without one.

    The other axes run along the site's fan_out, in its order.
    """
    if site.bias is None:
        return None, ()
    bias = sites[site.bias]
    own = bias.batch if len(bias.batch) == len(site.batch) else tuple(range(len(site.batch)))
    rest = tuple(n for i, n in enumerate(bias.shape) if i not in own)
    fits = rest == site.dims(site.fan_out) and bias.dims(own) == site.dims(site.batch)
    return (site.bias, own) if fits else (None, ())


def bias_layout(batch: Sequence[int], ndim: int) -> Axes:
    """The axes of a bias with these batch axes."""
    return Axes(tuple(batch), (), tuple(i for i in range(ndim) if i not in batch))


def typed_key(key: Any) -> Any:
    """A key as of `jax.random.key` for either kind; one of `PRNGKey` has an axis that no layout knows."""
    if key is None or jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)


def check_paths(paths: Any, leaves: Mapping[str, Any]) -> None:
    """Raises if the tree of weights lacks a path."""
    for path in paths:
        if path not in leaves:
            raise UserError(
                f"the variables have no weight {path!r} (nearest: {', '.join(nearest(path, leaves))}); "
                "were the sites or the delta made for another model?"
            )


def check_fits(path: str, one: Any, leaf: Any) -> None:
    """Raises if an entry's arrays do not run along the weight's axes, or the entry itself says that they do not fit."""
    sizes = [
        math.prod(leaf.shape[a] for a in axes if a < len(leaf.shape)) for axes in (one.axes.fan_in, one.axes.fan_out)
    ]
    if not one.fits(*sizes):
        shapes = ", ".join(str(tuple(x.shape)) for x in jax.tree_util.tree_leaves(one))
        raise UserError(
            f"what the delta's arrays of shapes {shapes} make does not fit the weight {path!r} of shape "
            f"{tuple(leaf.shape)}: was it made for another base?"
        )
    for name, roles in one.layout.items():
        value = getattr(one, name)
        axes = [a for r in roles if hasattr(one.axes, r) for a in getattr(one.axes, r)]
        expected = [leaf.shape[a] for a in axes if a < len(leaf.shape)]
        private = [r for r in roles if not hasattr(one.axes, r)]
        if value is None or len(private) + len(axes) != len(value.shape):
            continue
        given = list(value.shape)
        position = 0
        for role in roles:
            width = len(getattr(one.axes, role)) if hasattr(one.axes, role) else 1
            if role in private:
                del given[position]
            else:
                position += width
        if given != expected or len(expected) != len(axes):
            raise UserError(
                f"the delta's {name} of shape {tuple(value.shape)} does not fit the weight {path!r} of shape "
                f"{tuple(leaf.shape)}: was it made for another base?"
            )


def json_ready(**options: Any) -> dict[str, Any]:
    """Options as plain JSON: tuples become lists, numpy numbers Python numbers."""

    def plain(x):
        if isinstance(x, Mapping):
            return [[k, plain(v)] for k, v in x.items()]
        if isinstance(x, (list, tuple, range)):
            return [plain(v) for v in x]
        return x.item() if isinstance(x, (np.generic, np.ndarray)) else x

    return {name: plain(value) for name, value in options.items()}


def batch_dims(site: Site) -> tuple[int, ...]:
    """Sizes of the site's batch axes."""
    return site.dims(site.batch)


def per_batch(values: Sequence[float], site: Site) -> np.ndarray:
    """Spreads one value per layer of a stack (or a single one) over all batch axes: an array of shape (*batch,)."""
    shape = batch_dims(site)
    if site.layer_axis is None or len(values) == 1:
        return np.broadcast_to(np.asarray(values[0]), shape)
    along = [1] * len(shape)
    along[site.batch.index(site.layer_axis)] = len(values)
    return np.broadcast_to(np.asarray(values).reshape(along), shape)


def draw(key: jax.Array, batch: Sequence[int], count: int, sampler: Callable, shape: Sequence[int]) -> jax.Array:
    """Draws `count` independent arrays for every batch index, each from its own key.

    Args:
      key: of all.
      batch: sizes of the batch axes.
      count: how many for each of them.
      sampler: (key, shape) -> array; the same object at every call, since each is compiled by itself.
      shape: of one array.

    Returns:
      (*batch, count, *shape) float32. Entry (n, j) depends on the key, n and j alone, so a smaller count is a prefix of
      a larger one and leaving layers out changes nothing for the others.
    """
    return _drawn(key, tuple(batch), count, sampler, tuple(shape))


@functools.partial(jax.jit, static_argnames=("batch", "count", "sampler", "shape"))
def _drawn(key, batch, count, sampler, shape):
    total = math.prod(batch)
    one = lambda n, j: sampler(jax.random.fold_in(jax.random.fold_in(key, n), j), shape)  # noqa: E731
    rows = jax.vmap(lambda n: jax.vmap(lambda j: one(n, j))(jnp.arange(count)))(jnp.arange(total))
    return rows.astype(jnp.float32).reshape(*batch, count, *shape)
