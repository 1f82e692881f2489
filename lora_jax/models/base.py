"""Base: a pretrained model as data (variables) and one function (apply)."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import trees
from lora_jax.errors import UserError
from lora_jax.models import options, registry

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


BLOCK = 1 << 14


@dataclasses.dataclass(frozen=True, eq=False)
class Base:
    """A frozen base model.

    Attributes:
      config: the family's frozen `Config`.
      variables: `{"params": tree of arrays}`.
      apply: `apply(variables, tokens, attention_mask=None, *, ...)`; see `make_apply`. Equal configs share it, so that
        what was compiled for one serves the other.
      family: the family's module.
      path: the checkpoint's directory, or None.
      hf_config: config.json as read.
      eos_ids: the tokens at which generation stops.
      dtype: of the weights.
      fresh: paths of the weights that no checkpoint has: a new head, drawn by the seed.
    """

    config: Any
    variables: dict[str, Any]
    apply: Callable
    family: ModuleType
    path: Path | None
    hf_config: dict[str, Any]
    eos_ids: tuple[int, ...]
    dtype: Any
    fresh: tuple[str, ...] = ()

    @property
    def num_labels(self) -> int | None:
        """Classes of the task head, or None."""
        return self.config.num_labels

    @functools.cached_property
    def sites(self) -> dict[str, Any]:
        """The sites with the family's roles, found once by tracing `apply`."""
        from lora_jax.lift import find_sites
        from lora_jax.sites import with_roles

        tokens = jnp.zeros((2, min(8, self.config.max_position_embeddings)), jnp.int32)
        return with_roles(find_sites(self.apply, self.variables, tokens), self.family.roles)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, loaded on first use.

        Raises:
          UserError: the directory has none.
        """
        from lora_jax.models import tokenizer

        return tokenizer.load(self.path)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the weights."""
        return trees.fingerprint(self.variables)

    def init_cache(self, batch: int, length: int) -> Any:
        """An empty key-value cache for `batch` rows of up to `length` tokens.

        Raises:
          UserError: the model is an encoder or has a task head.
        """
        _needs(self.family.HAS_CACHE and self.num_labels is None, "a cache", self.config)
        return self.family.init_cache(self.config, batch, length, self.dtype)


def quantized(base: Base, format: str, targets: Any = None, **options: Any) -> Base:
    """The base with its linear weights in a number format; see `quant.quantize`.

    Its `apply` takes quantized and dense variables alike, its arrays lie on the default device. Whatever is trained
    on it belongs to the quantized weights, so that is what an adapter is merged into.

    Args:
      base: with dense variables; not changed.
      format: 'nf4', 'fp4', 'int8' or 'int4'.
      targets: patterns or roles; None: every linear weight but embeddings and heads.
      **options: of the format.

    Raises:
      UserError: as `quant.quantize`.
    """
    from lora_jax.lift import lift
    from lora_jax.quant import quantize

    variables = quantize(base.variables, base.sites, format, targets, **options)
    # The base may have waited on the host, so that dense weights never filled an accelerator.
    variables = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), variables)
    new = dataclasses.replace(base, variables=variables, apply=lift(base.apply, unused="allow"))
    vars(new)["sites"] = base.sites  # quantizing moves no axis
    return new


def reseeded(base: Base, seed: int) -> Base:
    """The base as `load_pretrained` gives it for another seed: its fresh head drawn anew, all other arrays shared."""
    if not base.fresh:
        return base
    shapes = {path: leaf.shape for path, leaf in trees.flatten(base.variables).items() if path in base.fresh}
    drawn = {p: jnp.asarray(fresh(p, shape, base.config, seed), base.dtype) for p, shape in shapes.items()}
    new = dataclasses.replace(base, variables=trees.replace(base.variables, drawn))
    vars(new)["sites"] = base.sites
    return new


@functools.lru_cache(maxsize=64)
def make_apply(family: ModuleType, config: Any) -> Callable:
    """Returns the one function of a model; the same object for the same config.

    The function's arguments:
      variables: `{"params": ...}`.
      tokens: (B, T) int32.
      attention_mask: (B, T), 1 = real. None: all are.
      token_type_ids: (B, T) int32 (BERT).
      positions: (B, T) int32; default 0 to T-1, counted anew in each segment.
      segment_ids: (B, T) int32, 0 = padding, 1.. = packed segments; tokens see their own segment only.
      pool_at: (B, S) int32, the slots to pool at; the result then has an axis S. On a decoder without `num_labels`:
        the slots whose next-token logits are wanted.
      targets: (B, T) int32, or (B, S) with `pool_at`, on a decoder without `num_labels`: the function then returns each
        slot's likelihood in place of its logits, of which those of a part of the slots are there at a time.
      cache: from `Base.init_cache`; the function then returns (output, cache).
      dropout_key: turns the checkpoint's dropout on.
      output: None, or "hidden" for the last hidden states (B, T, D).
    Returns:
      decoder: (B, T, V) logits, or with `targets` (B, T) negative log likelihoods, float32; encoder: (B, T, D) hidden
        states; with `num_labels`: (B, num_labels).
    """
    model = family.Model(config)

    def apply(
        variables,
        tokens,
        attention_mask=None,
        *,
        token_type_ids=None,
        positions=None,
        segment_ids=None,
        pool_at=None,
        targets=None,
        cache=None,
        dropout_key=None,
        output=None,
    ):
        if output not in (None, "hidden"):
            raise UserError(f"output must be None or 'hidden', got {output!r}")
        given = {"positions": positions, "segment_ids": segment_ids, "pool_at": pool_at, "output": output}
        if targets is not None:
            _check_targets(family, config, targets, tokens if pool_at is None else pool_at, output)
            given["targets"] = targets
        if cache is not None:
            _needs(family.HAS_CACHE, "cache", config)
            if segment_ids is not None:
                raise UserError("a cache holds one text a row: give attention_mask, not segment_ids")
            given["cache"] = cache
        if token_type_ids is not None:
            _needs(family.HAS_TOKEN_TYPES, "token_type_ids", config)
            given["token_type_ids"] = token_type_ids
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        return model.apply(variables, tokens, attention_mask, deterministic=dropout_key is None, rngs=rngs, **given)

    return apply


def _needs(has: bool, name: str, config: Any) -> None:
    if not has:
        raise UserError(f"{name} was asked for, but a {_kind(config)} has no use for it; leave it out")


def _kind(config: Any) -> str:
    return f"{config.model_type!r} model" + ("" if config.num_labels is None else " with a task head")


def _check_targets(family: ModuleType, config: Any, targets: Any, slots: Any, output: str | None) -> None:
    if not family.HAS_CACHE or config.num_labels is not None:
        raise UserError(
            "the likelihood of each next token, which the tasks sft and language_modeling learn, was asked for, but a "
            f"{_kind(config)} predicts none; take another task or a decoder without a task head"
        )
    if output is not None:
        raise UserError("targets are scored by logits, which output='hidden' leaves out; give one of them")
    if targets.shape != slots.shape:
        raise UserError(f"targets have the shape {targets.shape}, but the slots that they follow {slots.shape}")


def shapes(family: ModuleType, config: Any) -> dict[str, tuple[int, ...]]:
    """`{path: shape}` of a model's weights; computes nothing."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    tree = jax.eval_shape(family.Model(config).init, jax.random.key(0), tokens)
    return {path: leaf.shape for path, leaf in trees.flatten(tree).items()}


def fresh(path: str, shape: tuple[int, ...], config: Any, seed: int) -> np.ndarray:
    """Initial value of one weight, by seed and path: scales 1, biases 0, the rest N(0, initializer_range)."""
    leaf = path.rsplit("/", 1)[-1]
    if leaf in ("scale", "bias"):
        return np.full(shape, float(leaf == "scale"), np.float32)
    size, key = math.prod(shape), trees.fold_path(jax.random.key(seed), path)
    blocks = [np.asarray(_normal(key, np.uint32(i))) for i in range(-(-size // BLOCK))]
    return config.initializer_range * np.concatenate(blocks)[:size].reshape(shape)


@jax.jit
def _normal(key, block):
    """Draws in blocks of one size, so that one compiled program serves every shape."""
    return jax.random.normal(jax.random.fold_in(key, block), (BLOCK,), jnp.float32)


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{path: array}` -> `{"params": nested dictionaries}`."""
    out: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return {trees.COLLECTION: out}


def check_dtype(dtype: str) -> Any:
    """The JAX dtype of a name.

    Raises:
      UserError: not float32, bfloat16 or float16.
    """
    name = jnp.dtype(dtype).name if not isinstance(dtype, str) else dtype
    if name not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[name]


def configure(config: Any, num_labels: int | None, dropout: float | None, remat: bool) -> Any:
    """The config with a task head's size, other dropout rates, and whether activations are computed again.

    Raises:
      UserError: a number of labels below 1, a rate outside [0, 1), or a remat that is no boolean.
    """
    if num_labels is not None:
        if isinstance(num_labels, bool) or not isinstance(num_labels, int) or num_labels < 1:
            raise UserError(f"num_labels must be None or a positive integer, got {num_labels!r}")
        config = dataclasses.replace(config, num_labels=num_labels)
    if dropout is not None:
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise UserError(f"dropout must be None (the checkpoint's own) or a rate in [0, 1), got {dropout!r}")
        config = config.with_dropout(float(dropout))
    if not isinstance(remat, bool):
        raise UserError(f"remat must be True or False, got {remat!r}")
    return dataclasses.replace(config, remat=remat)


def from_config(
    config: Any,
    seed: int = 0,
    num_labels: int | None = None,
    *,
    dtype: str = "float32",
    dropout: float | None = None,
    remat: bool = False,
) -> Base:
    """A model with random weights, for pretraining, tests and benchmarks.

    Args:
      config: a family's `Config`, or the dictionary of a config.json (with its `model_type`).
      seed: of the weights; each is drawn by its own path.
      num_labels: classes of a task head, or None.
      dtype: 'float32', 'bfloat16' or 'float16'.
      dropout: replaces every dropout rate; None keeps the config's.
      remat: compute what happens inside a layer again in the backward pass, and keep its input alone.

    Raises:
      UserError: an unknown model_type or key, an unsupported option.
    """
    raw = dict(config) if isinstance(config, Mapping) else config.to_hf()
    family = registry.get(raw.get("model_type"))
    options.known(raw, family.KEYS)
    config = family.Config.from_hf(raw) if isinstance(config, Mapping) else config
    config = configure(config, num_labels, dropout, remat)
    kind = check_dtype(dtype)
    flat = {p: jnp.asarray(fresh(p, s, config, seed), kind) for p, s in shapes(family, config).items()}
    return Base(
        config=config,
        variables=nest(flat),
        apply=make_apply(family, config),
        family=family,
        path=None,
        hf_config=raw,
        eos_ids=config.eos_token_ids,
        dtype=kind,
    )
