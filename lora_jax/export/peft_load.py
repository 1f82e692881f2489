"""`load_peft`: reads an adapter that PEFT wrote. Strict where PEFT is silent.

PEFT warns about missing tensors and ignores unexpected ones, so an adapter for another model loads and does nothing.
Here
a missing, unexpected or misshaped tensor, a rank that contradicts the config and an option we do not have are errors.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import trees
from lora_jax.adapters import Adapter, get
from lora_jax.adapters.full import Full
from lora_jax.adapters.lora import LoRA
from lora_jax.adapters.parts.ranks import SCALINGS
from lora_jax.errors import UserError, nearest
from lora_jax.export import peft_names as names
from lora_jax.lift.weight import Axes

# Options that change what the adapter computes and that we do not have: the value that switches them off.
_OFF = {
    "use_dora": (False,), "lora_bias": (False,), "bias": ("none",), "layer_replication": (None,),
    "target_parameters": (None, []), "trainable_token_indices": (None,), "alora_invocation_tokens": (None,),
    "use_qalora": (False,), "use_bdlora": (None, False),
    "arrow_config": (None,), "kasa_config": (None,), "velora_config": (None,), "monteclora_config": (None,),
}  # fmt: skip


def load_peft(directory: str | Path, base: Any) -> tuple[Adapter, dict[str, Any]]:
    """Reads a PEFT adapter directory.

    Args:
      directory: with `adapter_config.json` and `adapter_model.safetensors`.
      base: the `Base` it belongs to.

    Returns:
      (adapter, delta); the adapter is `lora`, or a chain of `lora` and `full` where the file saves whole modules.

    Raises:
      UserError: no such files, an unsupported option, or tensors that do not fit the config or the base.
    """
    directory = Path(directory)
    config = _read_config(directory)
    tensors = _read_tensors(directory)
    file = directory / names.TENSORS
    factors, alphas = _factors(config, tensors, base, file)
    saved = _saved(tensors, base, file)
    if tensors:
        known = names.modules(base).values()
        odd = sorted(tensors)[0]
        raise UserError(
            f"{file} holds {len(tensors)} tensor(s) that this base has no place for, the first {odd!r} "
            f"(nearest: {nearest(odd.removeprefix(names.PREFIX), known, 1)[0]!r}); is it an adapter for another model?"
        )
    return _assemble(config, factors, alphas, saved, base)


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / names.CONFIG
    if not file.is_file():
        raise UserError(f"no PEFT adapter in {str(directory)!r}: {names.CONFIG} is missing")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type {config.get('peft_type')!r} is not supported yet; expected 'LORA'")
    for option, off in _OFF.items():
        if option in config and config[option] not in off:
            raise UserError(f"{file}: {option}={config[option]!r} is not supported; this reader needs {off[0]!r}")
    for needed in ("r", "lora_alpha", "target_modules"):
        if config.get(needed) is None:
            raise UserError(f"{file} lacks {needed!r}")
    return config


def _read_tensors(directory: Path) -> dict[str, np.ndarray]:
    import safetensors

    file = directory / names.TENSORS
    if not file.is_file():
        hint = f"; convert {names.PICKLED} with PEFT first" if (directory / names.PICKLED).is_file() else ""
        raise UserError(f"{file} is missing{hint}")
    try:
        with safetensors.safe_open(str(file), framework="np") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}); the file is truncated or not safetensors") from None


def _take(tensors: dict, key: str, shape: tuple[int | None, ...], file: Path) -> np.ndarray:
    """Removes one tensor, checked; None in the shape leaves a size open."""
    if key not in tensors:
        raise UserError(f"{file} lacks the tensor {key!r}, which its config and this base call for")
    value = tensors.pop(key)
    if len(value.shape) != len(shape) or any(e is not None and g != e for g, e in zip(value.shape, shape, strict=True)):
        raise UserError(f"{file}: {key!r} has the shape {list(value.shape)}, expected {list(shape)}")
    return value.astype(np.float32)


def _factors(config: Mapping, tensors: dict, base: Any, file: Path) -> tuple[dict[str, LoRA], dict[str, float]]:
    scaling = "alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r"
    factors, alphas = {}, {}
    for path, name in names.modules(base).items():
        module, site = names.module_of(name), base.sites[path]
        if not name.endswith(".weight") or not site.is_matrix or not names.targeted(config, module):
            continue
        rank = names.pattern_value(config.get("rank_pattern") or {}, module, config["r"])
        alphas[path] = names.pattern_value(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
        n_in, n_out = (int(np.prod(site.dims(axes))) for axes in (site.fan_in, site.fan_out))
        a_key, b_key = (names.PREFIX + module + suffix for suffix in names.suffixes(site))
        a, b = _take(tensors, a_key, (rank, n_in), file).T, _take(tensors, b_key, (n_out, rank), file).T
        _check_tied(config, tensors, site, (a, b), rank, file)
        _check_base_layer(tensors, module, base, path, file)
        factors[path] = LoRA(
            a=jnp.asarray(a.reshape(*site.dims(site.fan_in), rank)),
            b=jnp.asarray(b.reshape(rank, *site.dims(site.fan_out))),
            axes=Axes.of(site), ranks=(rank,), scales=(SCALINGS[scaling](float(alphas[path]), rank),),
        )  # fmt: skip
    if not factors:
        raise UserError(f"{file}: target_modules={config['target_modules']!r} selects no module of this base")
    return factors, alphas


def _check_tied(config: Mapping, tensors: dict, site: Any, own: tuple, rank: int, file: Path) -> None:
    """An embedding tied to the head has one delta here; PEFT keeps two, which must agree."""
    if not names.tied_head(site):
        return
    if not names.targeted(config, "lm_head"):
        raise UserError(
            f"{file} adapts the embedding but not the head that is tied to it; this base has one weight for both, "
            "so such an adapter cannot be held. Untie the checkpoint (tie_word_embeddings=false) or adapt both"
        )
    head = [
        _take(tensors, names.PREFIX + "lm_head" + s, shape, file)
        for s, shape in zip(names.LINEAR, ((rank, None), (None, rank)), strict=True)
    ]
    tensors.pop(names.PREFIX + "lm_head" + names.BASE_LAYER, None)
    if not np.allclose(head[1] @ head[0], own[0] @ own[1], rtol=1e-5, atol=1e-6):
        raise UserError(
            f"{file} adapts the embedding and the head tied to it differently; this base has one weight for both"
        )


def _check_base_layer(tensors: dict, module: str, base: Any, path: str, file: Path) -> None:
    """PEFT writes the frozen weight of an adapted embedding or head beside its factors."""
    key = names.PREFIX + module + names.BASE_LAYER
    if key in tensors:
        tensor = base.family.tensors(base.config, base.num_labels)[path]
        own = np.asarray(trees.flatten(base.variables)[path], np.float32)
        given = tensors.pop(key).astype(np.float32)
        given = given.T if tensor.transpose else given
        if own.shape != given.shape or not np.allclose(own, given, atol=1e-6):
            raise UserError(
                f"{file}: {key!r} differs from the base's own weight; the adapter was made for another base"
            )


def _saved(tensors: dict, base: Any, file: Path) -> dict[str, Full]:
    """Modules saved whole."""
    out, leaves = {}, trees.flatten(base.variables)
    for path, tensor in base.family.tensors(base.config, base.num_labels).items():
        key = names.PREFIX + tensor.name
        if key in tensors:
            shape = leaves[path].shape
            value = _take(tensors, key, shape[::-1] if tensor.transpose else shape, file)
            value = value.T if tensor.transpose else value
            out[path] = Full(value=jnp.asarray(np.ascontiguousarray(value)), axes=Axes.of(base.sites[path]))
    return out


def _assemble(config: Mapping, factors: dict, alphas: dict, saved: dict, base: Any) -> tuple[Adapter, dict[str, Any]]:
    ranks = {p: one.ranks[0] for p, one in factors.items()}
    adapter = get("lora")(
        rank=_uniform(ranks), alpha=_uniform(alphas), targets=[_exact(p) for p in factors],
        dropout=config.get("lora_dropout") or 0.0, scaling="alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r",
    )  # fmt: skip
    if not saved:
        return adapter, factors
    adapter = get("chain")(adapter, get("full")(targets=[_exact(p) for p in saved]))
    members = {**{p: ("0", one) for p, one in factors.items()}, **{p: ("1", one) for p, one in saved.items()}}
    from dataclasses import replace

    order = [p for p in trees.flatten(base.variables) if p in members]
    return adapter, {p: replace(members[p][1], member=members[p][0]) for p in order}


def _uniform(values: Mapping[str, Any]) -> Any:
    """One number where all are equal, else rules by path."""
    distinct = set(values.values())
    return distinct.pop() if len(distinct) == 1 else [(_exact(p), v) for p, v in values.items()]


def _exact(path: str) -> str:
    """A pattern that matches this path alone."""
    return path.replace(".", r"\.")
