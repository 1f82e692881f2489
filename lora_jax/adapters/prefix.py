"""Prefix tuning: trained keys and values that every token attends to, in every layer.

Li, Liang (2021), "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv:2101.00190, section 4: the
activations of `length` positions before the text are free parameters; only their keys and values matter. Training them
directly is unstable, so they are reparametrized (section 4.3) as an MLP of smaller embeddings, here as in PEFT

    P = W2 tanh(W1 e + b1) + b2        e of the width of a layer's keys, P the keys and values of all layers

and the MLP is no longer needed after training: PEFT's file holds P alone, as does `Reparametrized.collapsed`. The first
values are those of PyTorch's layers (e from N(0, 1), weights and biases within 1/sqrt(fan_in)), which PEFT uses.
PEFT trains P directly unless asked (`prefix_projection`): `hidden=0`.

The text's positions come after the virtual tokens', and a prefix never starts as the base: a key of zeros has a weight
in the softmax too (so `init='zero'`, PEFT's 'no-op', is none). Keys are as a cache would hold them, rotation included.
Only a model that reads the collection `virtual` can have a prefix: lora_jax's own families do.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax import trees, virtual
from lora_jax.adapters.base import Adapter, Entry, draw, entry, json_ready
from lora_jax.errors import UserError, did_you_mean
from lora_jax.lift.weight import Axes
from lora_jax.sites import in_layers

KEY = "@prefix"
INITS = ("random", "zero")


@entry(meta=("layers",))
class Prefix(Entry):
    """Keys and values of the virtual tokens.

    Attributes:
      pairs: (layers, 2, length, width) float32: keys, then values; width = key heads * head size.
      layers: indices of the layers.
    """

    pairs: Any
    layers: tuple[int, ...]
    axes: Axes = Axes()
    member: str = ""
    layout: ClassVar = {"pairs": ("batch", "token", "width")}

    def collapsed(self) -> "Prefix":
        """Itself."""
        return self


@entry(meta=("layers",))
class Reparametrized(Entry):
    """An MLP that makes the keys and values.

    Attributes:
      embedding: (length, width) float32.
      inner_kernel: (width, hidden) float32.
      inner_bias: (hidden,) float32.
      outer_kernel: (layers, 2, hidden, width) float32.
      outer_bias: (layers, 2, width) float32.
      layers: indices of the layers.
    """

    embedding: Any
    inner_kernel: Any
    inner_bias: Any
    outer_kernel: Any
    outer_bias: Any
    layers: tuple[int, ...]
    axes: Axes = Axes()
    member: str = ""
    layout: ClassVar = {
        "embedding": ("token", "width"), "inner_kernel": ("width", "hidden"), "inner_bias": ("hidden",),
        "outer_kernel": ("batch", "hidden", "width"), "outer_bias": ("batch", "width"),
    }  # fmt: skip

    def collapsed(self) -> Prefix:
        """The prefix that the MLP makes."""
        hidden_NxH = jnp.tanh(self.embedding @ self.inner_kernel + self.inner_bias[None])
        pairs = jnp.einsum("nh,lphw->lpnw", hidden_NxH, self.outer_kernel) + self.outer_bias[:, :, None]
        return Prefix(pairs=pairs, layers=self.layers, axes=self.axes, member=self.member)


def prefix(*, length: int = 20, layers: Any = "all", init: str = "random", hidden: int = 512) -> Adapter:
    """Trains keys and values of virtual tokens before the text.

    Args:
      length: how many virtual tokens.
      layers: 'all', 'last:k', 'first:k', or a list of layer indices.
      init: 'random', or 'zero': keys and values start at zero (with an MLP: its last layer). For the keys and values
        of real tokens see `from_cache`.
      hidden: width of the reparametrization's MLP; 0 trains keys and values directly.

    Returns:
      An Adapter with the delta `{'@prefix': Prefix or Reparametrized}`. It does not start as the base.

    Raises:
      UserError: a length below 1, an unknown init, a negative width; at `init`: layers that the model does not have,
        or a model that names no keys (role 'k').
    """
    for name, value, least in (("length", length, 1), ("hidden", hidden, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"prefix({name}={value!r}): expected a whole number, {least} or more")
    if init not in INITS:
        raise UserError(f"prefix(init={init!r}): {did_you_mean(str(init), INITS)}")
    spec = json_ready(method="prefix", length=length, layers=layers, init=init, hidden=hidden)

    def make(key, variables, sites, *, batch=None):
        del variables, batch
        chosen, width = _layers(sites, layers)
        key = trees.fold_path(key, KEY)
        if hidden:
            return {KEY: _reparametrized(key, chosen, length, width, hidden, init == "zero")}
        if init == "zero":
            return {KEY: Prefix(pairs=jnp.zeros((len(chosen), 2, length, width)), layers=chosen)}
        drawn = [draw(jax.random.fold_in(key, i), (2,), length, jax.random.normal, (width,)) for i in chosen]
        return {KEY: Prefix(pairs=jnp.stack(drawn), layers=chosen)}

    def bind(variables, delta, *, key=None, scale=None):
        del key, scale
        one = delta[KEY].collapsed()
        pairs = {str(i): {"keys": p[0], "values": p[1]} for i, p in zip(one.layers, one.pairs, strict=True)}
        return virtual.put(variables, "prefix", pairs)

    def merge(variables, delta):
        virtual.refuse_merge("prefix")

    def trainable(delta):
        return jax.tree_util.tree_map(lambda _: True, delta)

    return Adapter(make, bind, merge, trainable, spec, starts_as_base=False)


def from_cache(delta: dict[str, Any], cache: Any) -> dict[str, Any]:
    """The prefix whose keys and values are the base's own of some text: the model starts as if it had read it.

        _, cache = base.apply(base.variables, tokens_1xN, cache=base.init_cache(1, N))
        delta = from_cache(adapter.init(key, base.variables, base.sites), cache)

    Args:
      delta: of `prefix(length=N, hidden=0)`.
      cache: a decoder's, of one row, after N tokens.

    Returns:
      The delta, of the same structure.

    Raises:
      UserError: a delta with an MLP, or a cache of another size.
    """
    one = delta[KEY]
    if not isinstance(one, Prefix):
        raise UserError("from_cache sets the keys and values themselves: use prefix(hidden=0), without an MLP")
    flat = lambda x: x.transpose(0, 2, 1, 3).reshape(*x.shape[:1], x.shape[2], -1)  # noqa: E731
    pairs = jnp.stack([jnp.concatenate([flat(cache.keys[i]), flat(cache.values[i])]) for i in one.layers])
    if pairs.shape != one.pairs.shape:
        rows, _, slots, _ = cache.keys[0].shape
        raise UserError(
            f"from_cache: the delta is of {one.pairs.shape[2]} virtual tokens, the cache of {rows} row(s) of {slots}: "
            "expected one row and as many tokens"
        )
    return {**delta, KEY: dataclasses.replace(one, pairs=pairs.astype(jnp.float32))}


def _layers(sites: Any, layers: Any) -> tuple[tuple[int, ...], int]:
    """The chosen layers and the width of their keys."""
    keys = [site.path for site in virtual.find(sites, "prefix", "k", "keys")]
    chosen = [sites[path] for path in in_layers(sites, keys, layers)]
    return tuple(sorted(site.layer for site in chosen)), math.prod(chosen[0].dims(chosen[0].fan_out))


def _reparametrized(key, layers: tuple[int, ...], length: int, width: int, hidden: int, zero: bool) -> Reparametrized:
    def within(key, shape, fan_in):
        return jax.random.uniform(key, shape, minval=-(fan_in**-0.5), maxval=fan_in**-0.5)

    embedding, kernel, bias, *outer = (jax.random.fold_in(key, i) for i in range(5))
    outer_kernel = jnp.zeros((len(layers), 2, hidden, width))
    outer_bias = jnp.zeros((len(layers), 2, width))
    if not zero:
        each = lambda key, shape: jnp.stack([within(jax.random.fold_in(key, i), shape, hidden) for i in layers])  # noqa: E731
        outer_kernel, outer_bias = each(outer[0], (2, hidden, width)), each(outer[1], (2, width))
    return Reparametrized(
        embedding=draw(embedding, (), length, jax.random.normal, (width,)),
        inner_kernel=within(kernel, (width, hidden), width),
        inner_bias=within(bias, (hidden,), width),
        outer_kernel=outer_kernel,
        outer_bias=outer_bias,
        layers=layers,
    )
