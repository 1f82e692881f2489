"""The algebra of grids: axes, their product, side by side, one after the other, and a condition.

A grid is an ordered tuple of cells; a cell is `{dotted field: value}`, what one arm sets on top of the config file. The
order is the order of writing, the last axis running fastest. An axis may repeat a value (side by side with another axis
that makes sense); what `product`, `zipped` and `chain` make holds every cell once, where it stands first, since parts
of an ablation naturally meet in a common cell.
"""

import inspect
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.errors import UserError, nearest
from lora_jax.records import plain

Cell = dict[str, Any]


class Grid(Sequence[Cell]):
    """An ordered set of cells; made by `axis`, `product`, `zipped` and `chain`, never empty."""

    def __init__(self, cells: Iterable[Mapping[str, Any]]):
        self._cells = tuple(dict(cell) for cell in cells)

    @property
    def fields(self) -> tuple[str, ...]:
        """Every field that some cell sets, in the order of appearance."""
        return tuple(dict.fromkeys(name for cell in self._cells for name in cell))

    def where(self, predicate: Callable[[Cell], Any]) -> "Grid":
        """The cells for which `predicate(overrides)` is true.

        Raises:
          UserError: none is left, or the predicate reads a field that a cell does not set.
        """
        kept = [cell for cell in self if _holds(predicate, cell, self.fields)]
        if not kept:
            raise UserError(
                f"where() leaves none of the {len(self)} arms, of which the first is {describe(self[0])}: the "
                "predicate takes an arm's overrides and is true for those to keep"
            )
        return Grid(kept)

    def __len__(self) -> int:
        return len(self._cells)

    def __getitem__(self, index: Any) -> Any:
        return Grid(self._cells[index]) if isinstance(index, slice) else dict(self._cells[index])

    def __iter__(self) -> Iterator[Cell]:
        return (dict(cell) for cell in self._cells)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grid) and list(map(_key, self)) == list(map(_key, other))

    def __hash__(self) -> int:
        return hash(tuple(map(_key, self)))

    def __repr__(self) -> str:
        return f"Grid of {len(self)} over {', '.join(self.fields)}"


def axis(field: str, values: Iterable[Any]) -> Grid:
    """One field, its values one after the other.

    Args:
      field: dotted name of a config field, such as `adapter.rank`.
      values: what the field may hold; numpy's numbers become Python's.

    Raises:
      UserError: no value, or something that is no sequence of values.
    """
    if not isinstance(field, str) or not field:
        raise UserError(f"axis({field!r}, ...): the first argument is a config field, such as 'adapter.rank'")
    if isinstance(values, (str, bytes, Mapping, set, frozenset)) or not isinstance(values, Iterable):
        raise UserError(
            f"axis({field!r}, {values!r}): the second argument is a list of values, in their order; for a single one "
            "write [value]"
        )
    listed = [_python(value) for value in values]
    if not listed:
        raise UserError(f"axis({field!r}, []) has no value, so the grid would have no arm; give at least one")
    return Grid({field: value} for value in listed)


def product(*grids: Grid) -> Grid:
    """Every combination of one cell of each grid; the last grid runs fastest.

    Raises:
      UserError: no grid, or a field that two of them set.
    """
    _check("product", grids)
    _check_apart("product", grids)
    return _once(_merged(cells) for cells in itertools.product(*grids))


def zipped(*grids: Grid) -> Grid:
    """The first cells together, the second cells together, and so on.

    Raises:
      UserError: no grid, a field that two of them set, or unequal lengths.
    """
    _check("zipped", grids)
    _check_apart("zipped", grids)
    if len({len(grid) for grid in grids}) > 1:
        lengths = "; ".join(f"{', '.join(grid.fields)} has {len(grid)}" for grid in grids)
        raise UserError(f"zipped() needs grids of one length: {lengths}. For every combination use product()")
    return _once(_merged(cells) for cells in zip(*grids, strict=True))


def chain(*grids: Grid) -> Grid:
    """One grid after the other; a cell that was there already is left out.

    Raises:
      UserError: no grid.
    """
    _check("chain", grids)
    return _once(itertools.chain(*grids))


def from_sweep(sweep: Callable[..., Any], cfg: Any = None) -> Grid:
    """Calls a config file's `sweep()`, or `sweep(cfg)` where it takes the config (to read sizes of its model).

    Raises:
      UserError: it returns no grid.
    """
    takes_config = bool(inspect.signature(sweep).parameters)
    found = sweep(cfg) if takes_config and cfg is not None else sweep()
    if not isinstance(found, Grid):
        raise UserError(
            f"sweep() returned {type(found).__name__}, expected a grid: return axis(...), product(...), zipped(...) or "
            "chain(...) of lora_jax.ablation"
        )
    return found


def describe(cell: Mapping[str, Any]) -> str:
    """A cell in the words of a message."""
    return " ".join(f"{name}={value!r}" for name, value in cell.items())


def _once(cells: Iterable[Cell]) -> Grid:
    """The cells without repetitions."""
    first: dict[str, Cell] = {}
    for cell in cells:
        first.setdefault(_key(cell), cell)
    return Grid(first.values())


def _merged(cells: Iterable[Mapping[str, Any]]) -> Cell:
    return {name: value for cell in cells for name, value in cell.items()}


def _python(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value


def _key(cell: Mapping[str, Any]) -> str:
    """Equal for equal cells, whatever the order of their fields; True and 1 differ, a tuple and a list do not."""
    return json.dumps(sorted((name, json.dumps(plain(value))) for name, value in cell.items()))


def _check(name: str, grids: Sequence[Any]) -> None:
    if not grids:
        raise UserError(f"{name}() needs at least one grid, such as axis('adapter.rank', [1, 4])")
    for grid in grids:
        if not isinstance(grid, Grid):
            raise UserError(f"{name}() takes grids, such as axis('adapter.rank', [1, 4]), and was given {grid!r}")


def _check_apart(name: str, grids: Sequence[Grid]) -> None:
    seen: set[str] = set()
    for grid in grids:
        if twice := seen.intersection(grid.fields):
            raise UserError(
                f"{name}() sets {min(twice)!r} twice; write its values as one axis, or use chain() for one grid after "
                "the other"
            )
        seen.update(grid.fields)


def _holds(predicate: Callable[[Cell], Any], cell: Cell, fields: Sequence[str]) -> bool:
    try:
        return bool(predicate(dict(cell)))
    except KeyError as error:
        name = str(error.args[0])
        hint = (
            "not every part of this chain does; use overrides.get(...)"
            if name in fields
            else f"did you mean {nearest(name, fields, 1)[0]!r}?"
        )
        raise UserError(f"where() reads {name!r}, which the arm {describe(cell)} does not set: {hint}") from None
