"""`analyze`: what a trained adapter did to each weight, as rows and as a table of layers by roles."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax import trees
from lora_jax.adapters import Adapter
from lora_jax.adapters.base import check_paths, is_shared
from lora_jax.analyze.spectrum import along_base, along_random, along_update, directions, effective_rank, stable_rank
from lora_jax.analyze.updates import (
    SVD,
    dense_float32,
    dense_svd,
    dense_updates,
    factored,
    factors,
    matrices,
    thin_svd,
    update_ranks,
)
from lora_jax.errors import UserError
from lora_jax.lift.weight import is_adapted
from lora_jax.sites import Site, Sites


@dataclasses.dataclass(frozen=True)
class Row:
    """The update of one weight, or of one layer or expert of a stacked weight.

    Attributes:
      path: of the site.
      index: position along its batch axes; () for an unstacked site.
      layer: the layer, or None.
      role: the role, or None.
      what: the kind of the delta's entry.
      rank: of LoRA's factors (twice that where a start is subtracted); None for any other method.
      norm: ||dW||_F.
      base_norm: ||W||_F.
      relative_norm: norm / base_norm; nan where the base is zero.
      effective_rank: see `effective_rank`.
      stable_rank: see `stable_rank`.
      along_update: ||U^T W V||_F with the update's top singular vectors (see `amplification`).
      amplification: norm / along_update; nan for a zero update and for a weight that is no matrix.
      along_base: reference with W's own top singular vectors; nan unless asked for.
      along_random: reference with random directions; nan unless asked for.
      singular_values: all of them, descending.
    """

    path: str
    index: tuple[int, ...]
    layer: int | None
    role: str | None
    what: str
    rank: int | None
    norm: float
    base_norm: float
    relative_norm: float
    effective_rank: float
    stable_rank: float
    along_update: float
    amplification: float
    along_base: float
    along_random: float
    singular_values: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """What `analyze` found; `print` it, or `pandas.DataFrame(report.rows)`.

    Attributes:
      rows: one per weight, layer and expert.
      notes: sites that were left out, and why.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def grid(self, field: str = "relative_norm") -> dict[tuple[int | None, str], float]:
        """`{(layer, role or name): value}` of one field.

        Where several weights fall together (experts, biases of one name), relative norms are those of all of them
        taken as one vector; of any other field it is the mean.
        """
        cells: dict[tuple[int | None, str], list[Row]] = {}
        for row in self.rows:
            cells.setdefault((row.layer, label(row.path, row.role)), []).append(row)
        if field == "relative_norm":
            both = lambda rows, f: math.hypot(*(getattr(r, f) for r in rows))  # noqa: E731
            return {cell: ratio(both(rows, "norm"), both(rows, "base_norm")) for cell, rows in cells.items()}
        return {cell: float(np.mean([getattr(r, field) for r in rows])) for cell, rows in cells.items()}

    def __str__(self) -> str:
        references = any(not math.isnan(r.along_base) for r in self.rows)
        head = ["site", "layer", "rank", "|dW|", "|dW|/|W|", "effective", "stable", "amplified"]
        head += ["|UWV| dW", "of W", "random"] if references else []
        body = [_cells(r, references) for r in self.rows]
        lines = [table(head, body, left=1), "", "|dW|/|W| by layer", self._layers()]
        return "\n".join([*lines, *self.notes])

    def _layers(self) -> str:
        grid = self.grid()
        columns = list(dict.fromkeys(name for _, name in grid))
        layers = sorted({layer for layer, _ in grid}, key=lambda i: (i is None, i or 0))
        cell = lambda key: f"{grid[key]:.4f}" if key in grid else ""  # noqa: E731
        body = [["-" if i is None else str(i), *(cell((i, c)) for c in columns)] for i in layers]
        return table(["layer", *columns], body)


def analyze(
    adapter: Adapter,
    delta: Mapping[str, Any],
    variables: Any,
    sites: Sites,
    *,
    rank: int | None = None,
    references: bool = False,
) -> Report:
    """Tells what an adapter adds to each weight of the base.

    Args:
      adapter: the adapter.
      delta: its delta.
      variables: the base.
      sites: from `find_sites`.
      rank: how many directions the amplification factor takes; None: LoRA's own rank, for any other method the
        update's effective rank, rounded.
      references: also the amplification's references (along_base, along_random), which cost the singular values of
        every adapted weight of the base.

    Returns:
      A Report. Sites of a method that does not change weights (members of a chain) are named in its notes.

    Raises:
      UserError: an empty delta, another base's, or a method none of whose sites can be merged.
    """
    if not delta:
        raise UserError("the delta is empty: there is nothing to analyze")
    leaves = trees.flatten(variables, is_leaf=is_adapted)
    own = [path for path in delta if not is_shared(path)]
    check_paths(own, leaves)
    check_paths(own, sites)
    plain, notes = _dense(adapter, delta, variables, [p for p in own if not factored(delta[p])])
    rows: list[Row] = []
    for path in own:
        one = delta[path]
        if factored(one):
            found = thin_svd(*factors(one))
        elif path in plain:
            found = dense_svd(matrices(plain[path], one.axes))
        else:
            continue
        rows += _rows(sites[path], one, found, matrices(dense_float32(leaves[path]), one.axes), rank, references)
    return Report(tuple(rows), tuple(notes))


def _dense(adapter, delta, variables, paths: list[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Updates of methods other than LoRA, member by member of a chain, and a note for each that has none."""
    members: dict[str, list[str]] = {}
    for path in paths:
        members.setdefault(delta[path].member, []).append(path)
    out: dict[str, np.ndarray] = {}
    notes = []
    for member, own in members.items():
        part = {p: one for p, one in delta.items() if p in own or (is_shared(p) and one.member == member)}
        try:
            out |= dense_updates(adapter, part, variables, own)
        except (UserError, NotImplementedError) as error:
            if len(part) == len(delta):
                raise UserError(f"no update to analyze: {error}") from None
            notes.append(f"left out: {own[0]} ({len(own)} sites, {type(delta[own[0]]).__name__.lower()}): {error}")
    return out, notes


def _rows(site: Site, one: Any, found: SVD, w_NxIxO: np.ndarray, rank: int | None, references: bool) -> list[Row]:
    own = update_ranks(one) if factored(one) else None
    draw = np.random.default_rng([0, trees.stable_hash(site.path)])
    nan, rows = float("nan"), []
    for n, index in enumerate(place(site)):
        w, s = w_NxIxO[n], found.s[n] if own is None else found.s[n][: own[n]]
        r = directions(s, rank if rank is not None else None if own is None else own[n]) if site.is_matrix else 0
        along, factor = along_update(w, SVD(found.u[n], s, found.v[n]), r)
        asked = references and r > 0
        norm, base_norm = float(np.linalg.norm(s)), float(np.linalg.norm(w))
        rows.append(Row(
            path=site.path, index=index, layer=layer_of(site, index), role=site.role, what=type(one).__name__.lower(),
            rank=None if own is None else own[n], norm=norm, base_norm=base_norm,
            relative_norm=ratio(norm, base_norm), effective_rank=effective_rank(s), stable_rank=stable_rank(s),
            along_update=along, amplification=factor, along_base=along_base(w, r) if asked else nan,
            along_random=along_random(w, r, draw) if asked else nan, singular_values=tuple(map(float, s)),
        ))  # fmt: skip
    return rows


def ratio(x: float, y: float) -> float:
    """x / y, nan where y is zero."""
    return x / y if y else float("nan")


def place(site: Site) -> list[tuple[int, ...]]:
    """The indices along a site's batch axes, in the order in which its matrices lie."""
    return list(np.ndindex(*site.dims(site.batch)))


def layer_of(site: Site, index: tuple[int, ...]) -> int | None:
    """The layer of one matrix of a site."""
    return site.layer if site.layer_axis is None else index[site.batch.index(site.layer_axis)]


def label(path: str, role: str | None) -> str:
    """A short name for a column: the role, or the end of the path."""
    parts = [p for p in path.split("/") if not re.search(r"(^|_)\d+$", p)] or [path]
    last = parts[-1:] if parts[-1] not in ("kernel", "embedding", "bias", "scale") else parts[-2:]
    return role or "/".join(last).removesuffix("/kernel")


def title(path: str, role: str | None, layer: int | None) -> str:
    """A site's name in a table with a column of layers: outside the layers a role may be several weights."""
    return path if layer is None else label(path, role)


def _cells(row: Row, references: bool) -> list[str]:
    layer = "" if row.layer is None else str(row.layer)
    stacked = len(row.index) > 1 or (row.index and row.layer is None)
    name = title(row.path, row.role, row.layer) + (f" {list(row.index)}" if stacked else "")
    numbers = [row.norm, row.relative_norm, row.effective_rank, row.stable_rank, row.amplification]
    numbers += [row.along_update, row.along_base, row.along_random] if references else []
    shown = ["" if math.isnan(x) else f"{x:.4g}" for x in numbers]
    return [name, layer, "full" if row.rank is None else str(row.rank), *shown]


def table(head: Sequence[str], body: Sequence[Sequence[str]], left: int = 0) -> str:
    """Columns of text under their names; the first `left` flush left, the others right."""
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    pad = lambda i, cell: cell.ljust(widths[i]) if i < left else cell.rjust(widths[i])  # noqa: E731
    return "\n".join("  ".join(pad(i, cell) for i, cell in enumerate(row)).rstrip() for row in [head, *body])
