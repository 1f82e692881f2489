"""The kinds of sites every method is tried on: small functions, each with weights of one kind and an output layer.

A method that cannot do a kind says so here, with the reason; silence means it can.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import lora_jax as lj
from tests.lift.checks import variables_of, weights

# Methods that no kind here can have: virtual tokens change shapes inside the function, and only lora_jax's own families
# read them. `virtual_test.py` tries them there, and here that every kind refuses them.
ELSEWHERE = ("prefix", "prompt")

# {method: {kind: reason}}
_NOT_LINEAR = {kind: "acts on the output of a linear layer" for kind in ("embedding", "tied embedding")}
CANNOT: dict[str, dict[str, str]] = {
    "bottleneck": _NOT_LINEAR,
    "bitfit": _NOT_LINEAR | {"experts": "its new biases cannot be merged: formulas_test.py"},
}
# Methods that cannot be merged: what a lifted function gives under jit stands in for merged weights, and their own test
# compares that with the formula written out.
UNMERGED = ("bottleneck",)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A function to adapt.

    Attributes:
      function: `function(variables, *args)`.
      variables: its weights.
      args: its arguments; the first axis of each is the batch.
      weights: pattern of the weights of this kind.
      rest: pattern of one more weight, a kernel of shape (fan_in, fan_out).
    """

    function: Callable[..., Any]
    variables: Any
    args: tuple
    weights: str
    rest: str = "out/kernel"

    @functools.cached_property
    def sites(self) -> dict[str, lj.Site]:
        return lj.find_sites(self.function, self.variables, *self.args)


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = jnp.tanh(nn.Dense(8, name=f"layers_{i}")(x))
        return nn.Dense(8, name="out")(x)


class Heads(nn.Module):
    """(D, H, Dh) and (H, Dh, D), with a nonlinearity between so that both matter."""

    heads: int
    size: int

    @nn.compact
    def __call__(self, x):
        h = jnp.tanh(nn.DenseGeneral((self.heads, self.size), name="in_0")(x))
        h = nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="back_1")(h)
        return nn.Dense(x.shape[-1], use_bias=False, name="out")(jnp.tanh(h))


class Convolution(nn.Module):
    groups: int

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Conv(8, (3, 3), feature_group_count=self.groups, name="layers_0")(x))
        return nn.Dense(8, name="out")(x.mean((1, 2)))


class Embedding(nn.Module):
    tied: bool

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(16, 8, name="layers_0")
        x = jnp.tanh(nn.Dense(8, name="out")(table(tokens)))
        return table.attend(x) if self.tied else x


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + jnp.tanh(nn.Dense(8, name="dense")(x)), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return nn.Dense(8, name="out")(scanned(name="layers")(x, None)[0])


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x, _ = nn.remat(Step)(name=f"layers_{i}")(x)
        return nn.Dense(8, name="out")(x)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="layers_0")(x, x)
        return nn.Dense(8, name="out")(x)


def experts(v, x):
    """Every expert on every token, a soft choice between them: a batch axis of the weight."""
    hidden = jnp.tanh(jnp.einsum("btd,edf->ebtf", x, v["layers_0"]["up"]))
    back = jnp.einsum("ebtf,efd->ebtd", hidden, v["layers_0"]["down"])
    gate = jax.nn.softmax(x @ v["out"]["kernel"][:, :2])
    return jnp.einsum("bte,ebtd->btd", gate, back)


def _linen(model: nn.Module, *args: Any, weights: str) -> Kind:
    return Kind(model.apply, variables_of(model, *args), args, weights)


def _experts() -> Kind:
    variables = {
        "layers_0": {"up": weights(2, 8, 8), "down": weights(2, 8, 8, seed=1)},
        "out": {"kernel": weights(8, 8)},
    }
    return Kind(experts, variables, (weights(4, 3, 8),), "layers_0/down")


_X, _TOKENS = weights(4, 3, 8) * 2, jnp.arange(12).reshape(4, 3)
_KINDS: dict[str, Callable[[], Kind]] = {
    "dense": lambda: _linen(Dense(), _X, weights=".*layers_./kernel"),
    "heads out": lambda: _linen(Heads(2, 4), _X, weights="in_0/kernel"),
    "heads in": lambda: _linen(Heads(2, 4), _X, weights="back_1/kernel"),
    "all sizes equal": lambda: _linen(Heads(4, 4), weights(4, 4, 4) * 2, weights="(in_0|back_1)/kernel"),
    "conv": lambda: _linen(Convolution(1), weights(4, 4, 4, 8) * 2, weights="layers_0/kernel"),
    "grouped conv": lambda: _linen(Convolution(2), weights(4, 4, 4, 8) * 2, weights="layers_0/kernel"),
    "embedding": lambda: _linen(Embedding(False), _TOKENS, weights=".*/embedding"),
    "tied embedding": lambda: _linen(Embedding(True), _TOKENS, weights=".*/embedding"),
    "scan": lambda: _linen(Stack(), _X, weights=".*dense/kernel"),
    "remat": lambda: _linen(Remat(), _X, weights=".*dense/kernel"),
    "attention": lambda: _linen(Attention(), _X, weights="layers_0/(query|value|out)/kernel"),
    "experts": _experts,
}
NAMES = tuple(_KINDS)


@functools.cache
def get(name: str) -> Kind:
    """A kind by its name; made once."""
    return _KINDS[name]()


def options_for(method: str, kind: Kind) -> dict[str, Any]:
    """Options that put a method on the kind's weights; a method has those of them that its signature names."""
    given = {"rank": 2, "alpha": 4, "targets": kind.weights, "layers": "all"}
    return {name: value for name, value in given.items() if name in lj.adapters.options(method)}


def make(method: str, kind: Kind, **options: Any) -> lj.Adapter:
    """The adapter of a method for a kind; a chain is lora on its weights and the output layer trained in full."""
    if method == "chain":
        first = make("lora", kind, **options)
        return lj.chain(first, lj.full(targets=kind.rest))
    return lj.adapters.get(method)(**options_for(method, kind) | options)
