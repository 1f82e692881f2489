"""Site: one weight of the base and what its axes mean; and the rules that select sites, layers and ranks.

Rules are ordered `(pattern, value)` pairs: the first pattern that matches the whole path wins, and a rule that matched
nothing is an error with the nearest paths, because a pattern that silently selects nothing is the commonest defect of
fine-tuning code. A pattern may also be a role (`embed`, `q`, `k`, `v`, `o`, `up`, `gate`, `down`, `head`) where the
family names roles.
"""

import ast
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.errors import UserError, nearest

Sites = Mapping[str, "Site"]
_INDEX = re.compile(r"(?:^|_)(\d+)$")


@dataclasses.dataclass(frozen=True)
class Site:
    """One weight of the base.

    Attributes:
      path: keys joined by `/`, without the collection.
      shape: of the weight.
      dtype: of the weight.
      batch: axes along which this is many independent weights (stacked layers, experts).
      fan_in: axes that a product contracts with the activation (for an embedding: the looked-up axis).
      fan_out: axes that appear in the output. Empty `fan_in` and `fan_out`: no product uses the weight.
      uses: every use in the order of the trace: 'linear', 'conv', 'embedding', 'elementwise', ...; the first product
        sets the axes.
      bias: path of the bias added to this weight's product, if the trace shows one that serves nothing else.
      layer: layer index: the first integer component of the path; None outside layers and for stacked sites.
      layer_axis: the batch axis that counts layers (a scanned stack), or None.
      role: embed (of tokens), q, k, v, o, up, gate, down, head; None where the family names none.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    batch: tuple[int, ...] = ()
    fan_in: tuple[int, ...] = ()
    fan_out: tuple[int, ...] = ()
    uses: tuple[str, ...] = ()
    bias: str | None = None
    layer: int | None = None
    layer_axis: int | None = None
    role: str | None = None

    def dims(self, axes: Sequence[int]) -> tuple[int, ...]:
        """Sizes of the given axes."""
        return tuple(self.shape[a] for a in axes)

    @property
    def is_matrix(self) -> bool:
        """True if a product, convolution or lookup uses the weight."""
        return bool(self.fan_in)

    @property
    def max_rank(self) -> int:
        """min(fan_in, fan_out): a larger rank adds nothing."""
        return min(math.prod(self.dims(self.fan_in)), math.prod(self.dims(self.fan_out)))

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers this site holds: one, all of a stack, or none."""
        if self.layer_axis is not None:
            return tuple(range(self.shape[self.layer_axis]))
        return () if self.layer is None else (self.layer,)


def layer_index(path: str) -> int | None:
    """The first integer component of a path: `layers_3/mlp/kernel` and `layers/3/kernel` are layer 3."""
    for component in path.split("/"):
        if found := _INDEX.search(component):
            return int(found.group(1))
    return None


def with_roles(sites: Sites, rules: Sequence[tuple[str, str]]) -> dict[str, Site]:
    """Names the roles by ordered `(pattern, role)` rules; used by model families."""
    out = {}
    for path, site in sites.items():
        role = next((r for p, r in rules if re.fullmatch(p, path)), None)
        out[path] = dataclasses.replace(site, role=role)
    return out


def _compile(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"the pattern {pattern!r} is not a regular expression: {error}") from None


def _hits(pattern: str, sites: Sites) -> list[str]:
    """Paths that a pattern or a role selects; an error with the nearest paths if there are none."""
    by_role = [p for p, s in sites.items() if s.role is not None and s.role == pattern]
    if by_role:
        return by_role
    regex = _compile(pattern)
    found = [p for p in sites if regex.fullmatch(p)]
    if not found:
        roles = sorted({s.role for s in sites.values() if s.role})
        raise UserError(
            f"the pattern {pattern!r} matches none of the {len(sites)} sites; a pattern is a regular expression that "
            f"must match the whole path. Nearest paths: {', '.join(nearest(pattern, sites))}"
            + (f"; roles: {', '.join(roles)}" if roles else "")
        )
    return found


def parse_patterns(targets: str | Sequence[str]) -> list[str]:
    """One pattern, a comma-separated string of them, or a sequence -> a list of patterns."""
    if isinstance(targets, str):
        targets = [targets]
    if not isinstance(targets, Sequence) or not all(isinstance(t, str) for t in targets):
        raise UserError(f"targets must be patterns (strings), got {targets!r}")
    # A comma inside a regular expression stands in brackets or braces; only the others separate patterns.
    split = [piece for t in targets for piece in re.split(r",(?![^({\[]*[)}\]])", t)]
    return [piece.strip() for piece in split if piece.strip()]


def select(sites: Sites, targets: str | Sequence[str] | None, default: Sequence[str] = ()) -> list[str]:
    """Returns the selected paths in the order of `sites`.

    Args:
      sites: from `find_sites`.
      targets: patterns or roles; None takes `default`.
      default: paths that the method takes by itself.

    Raises:
      UserError: no pattern, or one that matches nothing.
    """
    if targets is None:
        return list(default)
    patterns = parse_patterns(targets)
    if not patterns:
        raise UserError(f"targets={targets!r} holds no pattern; leave it out for the method's own default")
    chosen = {path for pattern in patterns for path in _hits(pattern, sites)}
    return [path for path in sites if path in chosen]


def parse_layers(layers: str | int | Sequence[int], total: int) -> frozenset[int] | None:
    """`'all'` -> None; `'last:k'`, `'first:k'`, `3`, `[0, 3]` -> the set of layer indices.

    Raises:
      UserError: not of these forms, or a layer that the model does not have.
    """
    given = layers
    if isinstance(layers, str) and layers.strip() == "all":
        return None
    if total == 0:
        raise UserError(f"layers={given!r}, but no site of this model has a layer index; use layers='all'")
    if isinstance(layers, str):
        if found := re.fullmatch(r"\s*(last|first):(\d+)\s*", layers):
            k = int(found.group(2))
            if not 1 <= k <= total:
                raise UserError(f"layers={given!r}, but the model has {total} layers; k must be 1 to {total}")
            return frozenset(range(total - k, total) if found.group(1) == "last" else range(k))
        try:
            layers = ast.literal_eval(layers)
        except (ValueError, SyntaxError):
            layers = ()
    if isinstance(layers, int) and not isinstance(layers, bool):
        layers = [layers]
    if not isinstance(layers, (list, tuple)) or not layers or not all(type(i) is int for i in layers):
        raise UserError(f"layers must be 'all', 'last:k', 'first:k' or a list of layer indices, got {given!r}")
    wrong = [i for i in layers if not -total <= i < total]
    if wrong:
        raise UserError(f"layers={given!r}, but the model has layers 0 to {total - 1}; {wrong[0]} is not one of them")
    return frozenset(i % total for i in layers)


def count_layers(sites: Sites) -> int:
    """Number of layers of the model: one more than the largest index of any site."""
    return 1 + max((i for site in sites.values() for i in site.layers), default=-1)


def in_layers(sites: Sites, paths: Sequence[str], layers: Any) -> dict[str, tuple[bool, ...]]:
    """Restricts paths to a choice of layers.

    Returns:
      `{path: flags}` for the sites that keep at least one layer; flags has one entry per layer of a stacked site
      and exactly one, True, for any other.

    Raises:
      UserError: nothing is left.
    """
    chosen = parse_layers(layers, count_layers(sites))
    flags = {}
    for path in paths:
        own = sites[path].layers
        flags[path] = tuple(chosen is None or i in chosen for i in own) or (chosen is None,)
    kept = {path: f for path, f in flags.items() if any(f)}
    if paths and not kept:
        raise UserError(
            f"layers={layers!r} leaves none of the {len(paths)} selected sites (the first is {paths[0]!r}); "
            "choose other layers or other targets"
        )
    return kept


def parse_rules(value: Any, name: str, sites: Sites, paths: Sequence[str]) -> dict[str, Any]:
    """One value for all, or ordered (pattern, value) rules -> `{path: value}` or, for a stack, `{path: [value per
    layer]}`.

    A pattern matches a layer of a stacked site as `path#i`, or all its layers as `path`.

    Raises:
      UserError: a rule that matches nothing, or a selected site that no rule covers.
    """
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise UserError(f"{name} must be a number or a list of (pattern, number) rules, got {value!r}") from None
    if isinstance(value, Mapping):
        value = list(value.items())
    if not isinstance(value, (list, tuple)):
        return {p: [value] * max(1, len(sites[p].layers)) for p in paths}
    rules = [_rule(r, name) for r in value]
    used: set[int] = set()
    out = {p: [_first(rules, t, sites[p], name, used) for t in _texts(sites[p])] for p in paths}
    for i, (pattern, _) in enumerate(rules):
        if i not in used:
            raise UserError(
                f"the {name} rule {pattern!r} matches none of the {len(paths)} selected sites (or an earlier rule "
                f"takes them all). Nearest paths: {', '.join(nearest(pattern, paths))}"
            )
    return out


def _rule(rule: Any, name: str) -> tuple[str, Any]:
    if not isinstance(rule, (list, tuple)) or len(rule) != 2 or not isinstance(rule[0], str):
        raise UserError(f"a {name} rule is a (pattern, number) pair, got {rule!r}")
    _compile(rule[0])
    return rule[0], rule[1]


def _texts(site: Site) -> list[str]:
    return [f"{site.path}#{i}" for i in site.layers] if site.layer_axis is not None else [site.path]


def _first(rules, text: str, site: Site, name: str, used: set[int]) -> Any:
    for i, (pattern, value) in enumerate(rules):
        if pattern == site.role or re.fullmatch(pattern, text) or re.fullmatch(pattern, site.path):
            used.add(i)
            return value
    raise UserError(f"no {name} rule covers {text!r}; end the list with ('.*', value)")
