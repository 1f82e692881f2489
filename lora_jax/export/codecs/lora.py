"""LORA: `lora` and `dora`.

A and B are stored as (rank, in) and (out, rank), the transposes of ours, flattened; DoRA's magnitude beside them. An
init away from zero (PiSSA, OLoRA) is written as a plain LoRA of twice the rank on the original base, `[A; A0]` and
`[B, -B0]`, so that a reader need not repeat the decomposition.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import trees
from lora_jax.adapters import Adapter, get
from lora_jax.adapters.dora import DoRA, squared_norms
from lora_jax.adapters.lora import LoRA
from lora_jax.adapters.parts import inits
from lora_jax.adapters.parts.ranks import SCALINGS
from lora_jax.errors import UserError
from lora_jax.export import peft_modules as modules
from lora_jax.export import peft_names as names
from lora_jax.lift.nodes import dense
from lora_jax.lift.weight import Axes, is_adapted

METHODS = ("lora", "dora")
BIASES = True  # PEFT can train biases beside these
MAGNITUDE = ".lora_magnitude_vector"

# Options that change what the adapter computes and that we do not have: the values that switch them off.
_OFF: dict[str, tuple] = {
    "lora_bias": (False,), "layer_replication": (None,), "target_parameters": (None, []),
    "trainable_token_indices": (None,), "alora_invocation_tokens": (None,), "use_qalora": (False,),
    "use_bdlora": (None, False), "arrow_config": (None,), "kasa_config": (None,), "velora_config": (None,),
    "monteclora_config": (None,),
}  # fmt: skip
# Inits of PEFT that leave the base as it is. Two more are exact functions of the weight (`inits.RESIDUAL`): PEFT takes
# the first update out of the base, here it is subtracted. Any other left a base that only its training run had.
_PLAIN_INITS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")


def write(adapter: Adapter, delta: Mapping[str, Any], base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fields of the config and the factors' tensors."""
    spec = adapter.spec
    module = names.module_keys(delta, base)
    tensors: dict[str, np.ndarray] = {}
    for path, one in delta.items():
        tensors |= _tensors(one, base.sites[path], names.PREFIX + module[path])
    root = spec["scaling"] == "alpha/sqrt(r)"
    rank = {p: one.ranks[0] * (1 if one.a0 is None else 2) for p, one in delta.items()}
    alpha = {
        p: modules.plain_number(one.scales[0] * (math.sqrt(rank[p]) if root else rank[p])) for p, one in delta.items()
    }
    r, rank_pattern = modules.usual_and_exceptions(rank, module)
    lora_alpha, alpha_pattern = modules.usual_and_exceptions(alpha, module)
    tied = any(names.tied_head(base.sites[p]) for p in delta)
    return {
        "r": r,
        "lora_alpha": lora_alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": root,
        "use_dora": spec["method"] == "dora",
        "lora_dropout": spec["dropout"],
        "target_modules": names.targets([*module.values(), *([names.HEAD] if tied else [])], base),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }, tensors


def _tensors(one: LoRA, site: Any, module: str) -> dict[str, np.ndarray]:
    rank = one.ranks[0]
    a = np.asarray(one.a, np.float32).reshape(-1, one.a.shape[-1])[:, :rank]
    b = np.asarray(one.b, np.float32).reshape(one.b.shape[0], -1)[:rank]
    if one.a0 is not None:
        a0, b0 = np.asarray(one.a0, np.float32), np.asarray(one.b0, np.float32)
        a = np.concatenate([a, a0.reshape(-1, a0.shape[-1])[:, :rank]], axis=1)
        b = np.concatenate([b, -b0.reshape(b0.shape[0], -1)[:rank]], axis=0)
    out = {module + suffix: value for suffix, value in zip(names.suffixes(site), (a.T, b.T), strict=True)}
    if isinstance(one, DoRA):
        out[module + MAGNITUDE] = np.asarray(one.magnitude, np.float32).reshape(-1)
    if names.tied_head(site):  # the output matrix is (vocabulary, width): A is our b, B our a
        if isinstance(one, DoRA):
            raise UserError(
                f"dora on the embedding {site.path!r} that is also the output matrix: PEFT would keep two magnitudes "
                "where there is one; leave it out of the targets to export"
            )
        head = names.PREFIX + names.HEAD
        out[head + names.LINEAR[0]], out[head + names.LINEAR[1]] = b, a
    return out


def read(config: Mapping, tensors: dict, base: Any, file: Path) -> tuple[Adapter, dict[str, Any]]:
    """The adapter and its delta.

    Raises:
      UserError: an option that we do not have, tensors that do not fit the config or the base.
    """
    for option, off in _OFF.items():
        if option in config and config[option] not in off:
            raise UserError(f"{file}: {option}={config[option]!r} is not supported; this reader needs {off[0]!r}")
    names.need(config, ("r", "lora_alpha", "target_modules"), file)
    init = _init(config, file)
    scaling = "alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r"
    delta, alphas = {}, {}
    for path, module in names.targeted_modules(config, base).items():
        rank = names.pattern_value(config.get("rank_pattern") or {}, module, config["r"])
        alphas[path] = names.pattern_value(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
        scale = SCALINGS[scaling](float(alphas[path]), rank)
        delta[path] = _entry(config, tensors, base, path, module, rank, scale, file)
        if init and "embedding" not in base.sites[path].uses[:1]:  # PEFT starts an embedding as usual
            start = inits.start_of(jax.random.key(0), _leaf(base, path), base.sites[path], ([rank], [scale]))
            first = inits.initial(start, init)
            delta[path] = dataclasses.replace(delta[path], a0=first.a0, b0=first.b0)
    adapter = get("dora" if config.get("use_dora") else "lora")(
        rank=names.uniform({p: one.ranks[0] for p, one in delta.items()}), alpha=names.uniform(alphas),
        targets=[names.exact(p) for p in delta], dropout=config.get("lora_dropout") or 0.0, scaling=scaling,
        **({"init": init} if init else {}),
    )  # fmt: skip
    return adapter, delta


def _init(config: Mapping, file: Path) -> str | None:
    """The init whose first update the file takes to be gone from the base, or None."""
    given = config.get("init_lora_weights", True)
    word = str(given).lower()
    if word in inits.RESIDUAL and not config.get("use_dora"):
        return word
    if given is not None and word not in _PLAIN_INITS:
        raise UserError(
            f"{file.with_name(names.CONFIG)}: init_lora_weights={given!r}: this adapter belongs to a base that PEFT "
            "changed when training began, not to the checkpoint. Save it again with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    return None


def _leaf(base: Any, path: str) -> Any:
    return trees.flatten(base.variables, is_adapted)[path]


def _entry(config, tensors, base, path, module, rank, scale, file) -> LoRA:
    site = base.sites[path]
    n_in, n_out = names.flat_sizes(site)
    a_key, b_key = (names.PREFIX + module + suffix for suffix in names.suffixes(site))
    a = names.take(tensors, a_key, (rank, n_in), file).T
    b = names.take(tensors, b_key, (n_out, rank), file).T
    _check_tied(config, tensors, site, (a, b), rank, file)
    _check_base_layer(tensors, module, base, path, file)
    fields: dict[str, Any] = dict(
        a=jnp.asarray(a.reshape(*site.dims(site.fan_in), rank)),
        b=jnp.asarray(b.reshape(rank, *site.dims(site.fan_out))),
        axes=Axes.of(site), ranks=(rank,), scales=(scale,),
    )  # fmt: skip
    if not config.get("use_dora"):
        return LoRA(**fields)
    magnitude = names.take(tensors, names.PREFIX + module + MAGNITUDE, (n_out,), file).reshape(site.dims(site.fan_out))
    return DoRA(**fields, magnitude=jnp.asarray(magnitude), norm2=squared_norms(_leaf(base, path), site))


def _check_tied(config: Mapping, tensors: dict, site: Any, own: tuple, rank: int, file: Path) -> None:
    """An embedding tied to the head has one delta here; PEFT keeps two, which must agree."""
    if not names.tied_head(site):
        return
    if not (names.targeted(config, names.HEAD) or config.get("ensure_weight_tying")):
        raise UserError(
            f"{file} adapts the embedding but not the head that is tied to it; this base has one weight for both, "
            "so such an adapter cannot be held. Untie the checkpoint (tie_word_embeddings=false) or adapt both"
        )
    head = [
        names.take(tensors, names.PREFIX + names.HEAD + s, shape, file)
        for s, shape in zip(names.LINEAR, ((rank, None), (None, rank)), strict=True)
    ]
    tensors.pop(names.PREFIX + names.HEAD + names.BASE_LAYER, None)
    if not np.allclose(head[1] @ head[0], own[0] @ own[1], rtol=1e-5, atol=1e-6):
        raise UserError(
            f"{file} adapts the embedding and the head tied to it differently; this base has one weight for both"
        )


def _check_base_layer(tensors: dict, module: str, base: Any, path: str, file: Path) -> None:
    """PEFT writes the frozen weight of an adapted embedding or head beside its factors."""
    key = names.PREFIX + module + names.BASE_LAYER
    if key in tensors:
        tensor = base.family.tensors(base.config, base.num_labels)[path]
        own = np.asarray(dense(_leaf(base, path)), np.float32)
        given = tensors.pop(key).astype(np.float32)
        given = given.T if tensor.transpose else given
        if own.shape != given.shape or not np.allclose(own, given, atol=1e-6):
            raise UserError(
                f"{file}: {key!r} differs from the base's own weight; the adapter was made for another base"
            )
