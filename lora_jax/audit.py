"""The audit: what an adapter selects, what it trains, and that its first output is the base's.

Printed at the start of every run. It raises where an adapter would silently do nothing, which is the commonest defect
of fine-tuning code: a weight that the function never uses, or a start that is not the base.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import quant, trees
from lora_jax.adapters import Adapter
from lora_jax.adapters.base import is_shared
from lora_jax.errors import UserError
from lora_jax.lift import is_adapted, lift
from lora_jax.sites import Sites, parse_patterns


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the audit: sites alike but for their layer."""

    path: str
    sites: int
    shape: tuple[int, ...]
    what: str
    rule: str
    trainable: int


@dataclasses.dataclass(frozen=True)
class Audit:
    """What `audit` found; `print` it.

    Attributes:
      rows: one per group of adapted sites.
      trainable: number of trained parameters.
      frozen: parameters of the delta that are not trained.
      total: parameters of the base.
      difference: of the first output from the base's, relative to the largest entry: 0 when they are equal bit for bit,
        and at most rounding, because a compiler may fuse the two programs differently; None where no example was given.
      notes: lines to show below the table.
    """

    rows: tuple[Row, ...]
    trainable: int
    frozen: int
    total: int
    difference: float | None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = ("site", "sites", "shape", "what trains", "rule", "parameters")
        body = [
            (r.path, f"{r.sites}", "x".join(map(str, r.shape)), r.what, r.rule, f"{r.trainable:,}") for r in self.rows
        ]
        widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *body]
        ]
        share = 100 * self.trainable / max(self.total, 1)
        lines.append(f"trainable {self.trainable:,} beside {self.total:,} of the base ({share:.2f} %)")
        if self.frozen:
            lines.append(f"stored but not trained {self.frozen:,}")
        if self.difference is not None:
            rounding = f"to rounding ({self.difference:.0e} of the largest entry)"
            lines.append(f"first output equals the base's {rounding if self.difference else 'exactly'}")
        return "\n".join([*lines, *self.notes])


def audit(
    adapter: Adapter,
    delta: Mapping[str, Any],
    variables: Any,
    sites: Sites,
    function: Callable | None = None,
    *args: Any,
    notes: tuple[str, ...] = (),
    **kwargs: Any,
) -> Audit:
    """Checks an adapter and tells what it trains.

    Args:
      adapter: the adapter.
      delta: its delta, as `init` made it.
      variables: the base.
      sites: from `find_sites`.
      function: the model's function; with it and its example arguments the first output is compared with the base's.
      *args: arguments after the variables.
      notes: lines to add below the table.
      **kwargs: keyword arguments of the function.

    Returns:
      An Audit.

    Raises:
      UserError: nothing trains, a selected weight is not used by the function, or the first output is not the base's.
    """
    mask = adapter.trainable(dict(delta))
    trained, stored = _count(delta, mask)
    if not delta or not any(trained.values()):
        raise UserError(f"the adapter {adapter.spec.get('method')!r} trains nothing: it selected {len(delta)} sites")
    idle = [path for path in delta if not is_shared(path) and not sites[path].uses]
    if idle:
        raise UserError(
            f"the function never uses {', '.join(map(repr, idle[:5]))}, so adapting it does nothing; "
            "leave it out of the targets"
        )
    compare = function is not None and adapter.starts_as_base
    difference = (
        None
        if function is None or not compare
        else _difference(adapter, dict(delta), variables, function, args, kwargs)
    )
    rows = _rows(adapter.spec, delta, sites, trained)
    total, notes = trees.count(variables, is_adapted), (*quant.summary(variables), *notes)
    return Audit(rows, sum(trained.values()), sum(stored.values()), total, difference, notes)


def _count(delta: Mapping[str, Any], mask: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Trained and merely stored parameters per site; columns padded to a stack's largest rank do not count."""
    trained, stored = {}, {}
    for path, one in delta.items():
        pairs = list(zip(jax.tree_util.tree_leaves(one), jax.tree_util.tree_leaves(mask[path]), strict=True))
        trained[path] = sum(x.size for x, on in pairs if on)
        stored[path] = sum(x.size for x, on in pairs if not on)
        if hasattr(one, "parameters"):
            trained[path] = one.parameters()
        elif ranks := getattr(one, "ranks", None):
            trained[path] = trained[path] * sum(ranks) // (max(ranks) * len(ranks))
    return trained, stored


def _difference(adapter: Adapter, delta: Any, variables: Any, function: Callable, args: tuple, kwargs: dict) -> float:
    """The largest difference of the first output from the base's, relative to the largest entry.

    Raises:
      UserError: it is more than rounding.
    """
    apply = lift(function, unused="allow")

    # Everything but the arrays is static, so the arguments are closed over; the base is passed.
    def outputs(variables, delta):
        # A quantized base needs lifting too; without one `apply` is the function itself.
        return apply(variables, *args, **kwargs), apply(adapter.bind(variables, delta), *args, **kwargs)

    base, adapted = jax.jit(outputs)(variables, delta)
    worst = 0.0
    # Compared on the host: on the device each of these operations would be compiled.
    for x, y in zip(jax.device_get(jax.tree.leaves(base)), jax.device_get(jax.tree.leaves(adapted)), strict=True):
        if not jnp.issubdtype(x.dtype, jnp.inexact) or np.array_equal(x, y, equal_nan=True):
            continue
        off = float(np.max(np.abs(x - y)) / np.max(np.abs(x)))
        # Rounding of single operations grows through the layers; an adapter that starts wrongly is off by more.
        if not off < min(0.1, 1e4 * float(jnp.finfo(x.dtype).eps)):
            raise UserError(
                f"the first output of the adapter {adapter.spec.get('method')!r} is not the base's (off by {off:.1e} "
                "of its largest entry); an adapter must start as the identity. Was the delta trained already? Then "
                "leave the function out of the audit"
            )
        worst = max(worst, off)
    return worst


def _rows(spec: Mapping, delta: Mapping[str, Any], sites: Sites, trained: Mapping[str, int]) -> tuple[Row, ...]:
    groups: dict[tuple, list[str]] = {}
    for path, one in delta.items():
        if is_shared(path):
            shapes = [x.shape for x in jax.tree_util.tree_leaves(one)]
            groups[path, shapes[0], _what(one), "shared by all sites"] = [path]
            continue
        alike = re.sub(r"(^|[_/])\d+(?=/|$)", r"\1*", path) if sites[path].layer is not None else path
        groups.setdefault((alike, sites[path].shape, _what(one), _rule(spec, one.member, path, sites)), []).append(path)
    return tuple(
        Row(alike if len(paths) > 1 else paths[0], len(paths), shape, what, rule, sum(trained[p] for p in paths))
        for (alike, shape, what, rule), paths in groups.items()
    )


def _what(one: Any) -> str:
    """A few words on an entry: its own, or its class, and its rank or layers where it has them."""
    if hasattr(one, "about"):
        return one.about()
    name = type(one).__name__.lower()
    if ranks := getattr(one, "ranks", None):
        distinct = sorted(set(ranks))
        shown = str(distinct[0]) if len(distinct) == 1 else f"{distinct[0]} to {distinct[-1]} by layer"
        return f"{name}, rank {shown}"
    if getattr(one, "kept", None) is not None:
        return f"{name}, layers {', '.join(map(str, one.kept))}"
    return name


def _rule(spec: Mapping, member: str, path: str, sites: Sites) -> str:
    """The target pattern that selected a site."""
    for index in member.split(".") if member else []:
        spec = spec["adapters"][int(index)]
    targets = spec.get("targets")
    if targets is None:
        return f"{spec['method']}'s default"
    return next((t for t in parse_patterns(targets) if t == sites[path].role or trees.matches(t, path)), "?")
