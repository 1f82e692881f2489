"""Reading checkpoints in Hugging Face layout: safetensors files, single or sharded, strictly.

Strict: a tensor that is missing, unexpected, of another shape or of a number format we do not read is an error that
names it. A task head that is missing is drawn fresh, as transformers does, when `num_labels` asked for it.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import UserError
from lora_jax.models import base as bases
from lora_jax.models import files, registry
from lora_jax.models.base import Base

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FORMATS = {"F32", "BF16", "F16"}


def load_pretrained(
    path: str | os.PathLike,
    dtype: str = "float32",
    num_labels: int | None = None,
    dropout: float | None = None,
    seed: int = 0,
    remat: bool = False,
) -> Base:
    """Reads a model directory, or a hub id, in Hugging Face layout.

    Args:
      path: directory or hub id.
      dtype: the weights' dtype here: 'float32', 'bfloat16' or 'float16'.
      num_labels: classes of the task head; None: no head.
      dropout: replaces every dropout rate of the checkpoint; None keeps them.
      seed: of a fresh head.
      remat: compute what happens inside a layer again in the backward pass, and keep its input alone: less memory, for
        up to a forward pass more of work.

    Returns:
      The base.

    Raises:
      UserError: no such directory, no config or weights in it, a damaged file, an unknown model_type, an option or a
        tensor that does not fit.
    """
    folder, raw, family, config = _described(path, num_labels, dropout, remat)
    kind = bases.check_dtype(dtype)
    flat, fresh = _read(folder, family, config, kind, seed)
    return _base(folder, raw, family, config, kind, flat, fresh)


def outline(
    path: str | os.PathLike,
    dtype: str = "float32",
    num_labels: int | None = None,
    dropout: float | None = None,
    remat: bool = False,
) -> Base:
    """A base as of `load_pretrained` with shapes (`jax.ShapeDtypeStruct`) in place of weights; reads config.json alone.

    For whatever only needs shapes: `sites`, an adapter's `init` and `apply` under `jax.eval_shape`.

    Args:
      path, dtype, num_labels, dropout, remat: as for `load_pretrained`.

    Raises:
      UserError: no such directory, no config in it, an unknown model_type or option.
    """
    folder, raw, family, config = _described(path, num_labels, dropout, remat)
    kind = bases.check_dtype(dtype)
    flat = {p: jax.ShapeDtypeStruct(shape, kind) for p, shape in bases.shapes(family, config).items()}
    return _base(folder, raw, family, config, kind, flat)


def _described(
    path: str | os.PathLike, num_labels: int | None, dropout: float | None, remat: bool
) -> tuple[Path, dict[str, Any], ModuleType, Any]:
    """(directory, config.json, family, its config)."""
    folder = files.find(path)
    raw = files.read_json(folder, files.CONFIG)
    try:
        family = registry.get(raw.get("model_type"))
        config = bases.configure(family.Config.from_hf(raw), num_labels, dropout, remat)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    return folder, raw, family, config


def _base(
    folder: Path, raw: dict[str, Any], family: ModuleType, config: Any, kind: Any, flat: Mapping, fresh: tuple = ()
) -> Base:
    return Base(
        config=config,
        variables=bases.nest(flat),
        apply=bases.make_apply(family, config),
        family=family,
        path=folder,
        hf_config=raw,
        eos_ids=_eos_ids(folder, config),
        dtype=kind,
        fresh=fresh,
    )


def _eos_ids(folder: Path, config: Any) -> tuple[int, ...]:
    """The ends of text: generation_config.json has the last word, as in transformers."""
    from lora_jax.models import options

    if not (folder / files.GENERATION).is_file():
        return config.eos_token_ids
    return options.token_ids(files.read_json(folder, files.GENERATION), "eos_token_id") or config.eos_token_ids


class Checkpoint:
    """The tensors of a directory by their names without the family's prefix; opened only while reading."""

    def __init__(self, folder: Path, family: ModuleType):
        self.folder = folder
        self.where: dict[str, tuple[Path, str]] = {}
        for file in _weight_files(folder):
            with _open(file) as handle:
                for name in handle.keys():  # noqa: SIM118  (a safetensors handle is not iterable)
                    self._add(bare_name(family, name), file, name)

    def _add(self, bare: str, file: Path, name: str) -> None:
        if bare in self.where:
            raise UserError(f"{file} holds {name!r}, which is there already as {self.where[bare][1]!r}")
        self.where[bare] = (file, name)

    def shape_and_format(self, names: list[str]) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and number format of tensors; reads the headers alone."""
        return {n: (tuple(s.get_shape()), s.get_dtype()) for n, s in self._each(names, lambda h, raw: h.get_slice(raw))}

    def arrays(self, names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the tensors one at a time, file by file."""
        return self._each(names, lambda h, raw: h.get_tensor(raw))

    def _each(self, names: list[str], get) -> Iterator[tuple[str, Any]]:
        for file in dict.fromkeys(self.where[n][0] for n in names):
            with _open(file) as handle:
                for name in names:
                    if self.where[name][0] == file:
                        yield name, get(handle, self.where[name][1])


def bare_name(family: ModuleType, name: str) -> str:
    """A tensor's name without the family's prefix and in today's spelling."""
    for pattern, new in family.renames:
        name = re.sub(pattern, new, name)
    return name.removeprefix(family.PREFIX)


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    """A safetensors file.

    Raises:
      UserError: missing, cut short, or something else entirely.
    """
    import safetensors

    try:
        with safetensors.safe_open(str(file), framework="np") as handle:
            yield handle
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is damaged or incomplete ({error}); copy or download it again ({_size(file)})"
        ) from None


def _size(file: Path) -> str:
    return f"it has {file.stat().st_size} bytes" if file.is_file() else "it is not there"


def _weight_files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        named = files.read_json(folder, INDEX).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise UserError(f"{folder / INDEX} has no weight_map")
        return [folder / name for name in sorted(set(named.values()))]
    other = [p.name for p in sorted(folder.glob("*.bin"))] + [p.name for p in sorted(folder.glob("*.safetensors"))]
    found = f" (found {', '.join(other[:3])}; save it again with safe_serialization)" if other else ""
    raise UserError(f"{folder} has no weights: expected {SINGLE} or {INDEX}{found}")


def _read(
    folder: Path, family: ModuleType, config: Any, dtype: Any, seed: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """`{path: array}` of all weights, checked, in the model's own order, and the paths that were drawn fresh."""
    checkpoint = Checkpoint(folder, family)
    shapes = bases.shapes(family, config)
    tensors = family.tensors(config, config.num_labels)
    wanted = {bare_name(family, t.name): path for path, t in tensors.items()}
    absent = {path for name, path in wanted.items() if name not in checkpoint.where}
    fresh = _fresh_head(family, set(wanted.values()), absent)
    present = [name for name in wanted if name in checkpoint.where]
    wrong = [f"missing: {tensors[p].name}" for p in wanted.values() if p in absent - fresh]
    wrong += [f"unexpected: {checkpoint.where[n][1]}" for n in _unexpected(family, checkpoint, wanted)]
    wrong += _misshaped(checkpoint, present, {n: (tensors[p], shapes[p]) for n, p in wanted.items()}, config)
    _refuse(folder, family, config, wrong)
    flat = {p: jnp.asarray(bases.fresh(p, shapes[p], config, seed), dtype) for p in fresh}
    for name, array in checkpoint.arrays(present):
        path = wanted[name]
        flat[path] = jnp.asarray(array.T if tensors[path].transpose else array, dtype)
    return {path: flat[path] for path in shapes}, tuple(sorted(fresh))


def _fresh_head(family: ModuleType, paths: set[str], absent: set[str]) -> set[str]:
    """Weights of head modules of which the file holds nothing at all."""
    heads = {
        p.rsplit("/", 1)[0]
        for p in paths
        for pattern, role in family.roles
        if role == "head" and re.fullmatch(pattern, p)
    }
    whole = {h for h in heads if all(p in absent for p in paths if p.rsplit("/", 1)[0] == h)}
    return {p for p in paths if p.rsplit("/", 1)[0] in whole}


def _unexpected(family: ModuleType, checkpoint: Checkpoint, wanted: Mapping[str, str]) -> list[str]:
    left = [n for n in checkpoint.where if n not in wanted]
    return [n for n in left if not any(re.fullmatch(pattern, n) for pattern in family.buffers)]


def _misshaped(checkpoint: Checkpoint, present: list[str], expected: Mapping[str, Any], config: Any) -> list[str]:
    out = []
    for name, (shape, form) in checkpoint.shape_and_format(present).items():
        tensor, ours = expected[name]
        theirs = ours[::-1] if tensor.transpose else ours
        if shape != theirs:
            out.append(f"misshaped: {checkpoint.where[name][1]} is {list(shape)}, expected {list(theirs)}")
            if name.startswith(("classifier.", "score.")):
                out[-1] += f" (num_labels={config.num_labels}; the file's head has {shape[0]} labels)"
        elif form not in FORMATS:
            out.append(f"unreadable: {checkpoint.where[name][1]} is {form}, expected {', '.join(sorted(FORMATS))}")
    return out


def _refuse(folder: Path, family: ModuleType, config: Any, wrong: list[str]) -> None:
    if wrong:
        shown = "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        kind = family.architecture(config, config.num_labels)
        raise UserError(f"the weights in {folder} do not fit its config.json (a {kind}): {shown}")
