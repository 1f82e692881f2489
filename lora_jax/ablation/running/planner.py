"""Which arms train together: those that one program can hold, whose sharing costs little, as many as memory takes.

Arms stack if they have the model, the data with its order, the batch shape, the steps and the method in common, and
deltas that are alike (see `stack.alike`). They should stack if no arm pays much for the others: every arm of a pack
computes the largest rank, every site and the deepest backward pass of all.

Arms with one seed come first: they see one batch, so what lies below their lowest adapted weight is computed once for
all of them. Packs of different seeds are put together afterwards, where they may (`apart`) and where giving that up
costs no arm too much.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax import trees
from lora_jax.ablation.arms import Arm, digest, identity_of
from lora_jax.ablation.running.mixed import masks_keep
from lora_jax.ablation.running.stack import alike, fills
from lora_jax.adapters import Adapter
from lora_jax.sites import Site, Sites

# The fields that are data of a packed step; the last four say which ranks and sites, which `stack` evens out.
DATA = (
    "train.learning_rate", "train.warmup", "train.weight_decay", "train.clip_norm", "train.lora_plus_ratio",
    "train.patience", "adapter.alpha", "adapter.options.scaling",
    "adapter.rank", "adapter.layers", "adapter.targets", "adapter.options.init",
)  # fmt: skip
WORTH = 1.25  # an arm may cost this much more in a pack than its own work
MOST = 16  # arms of a pack
CPU_MEMORY = 3e9  # of a pack, as `activations` estimates; beyond, arms of MiniLM were slower together than alone


def _never(arm: Arm) -> bool:
    del arm
    return False


class Shape(NamedTuple):
    """What the planner knows of an arm.

    Attributes:
      adapter: its method.
      delta: its delta's shapes.
      sites: of the base.
      tokens: of a batch, padding included.
      random: whether a step of the arm draws dropout.
    """

    adapter: Adapter
    delta: Mapping[str, Any]
    sites: Sites
    tokens: int
    random: Callable[[Arm], bool] = _never


class Bounds(NamedTuple):
    """What a pack may have.

    Attributes:
      memory: bytes that its arms may use beside the base.
      most: arms; 1 packs nothing.
    """

    memory: float = math.inf
    most: int = MOST


def plan(arms: Sequence[Arm], shapes: Callable[[Arm], Shape], bounds: Bounds | None = None) -> list[list[Arm]]:
    """Arms -> packs; a pack of one arm trains by itself.

    Args:
      arms: of a grid; the result depends on nothing else, so that a command that is run again makes the same packs.
      shapes: of an arm.
      bounds: of a pack; None is `Bounds()`.
    """
    bounds = bounds or Bounds()
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        groups.setdefault(_common(arm), []).append(arm)
    packs: list[list[Arm]] = []
    place = {arm.id: i for i, arm in enumerate(arms)}
    for group in groups.values():
        if bounds.most == 1 or not packable(group[0]):
            packs += [[arm] for arm in group]
            continue
        seeds = dict.fromkeys(arm.config.seed for arm in group)
        own = [_divided([a for a in group if a.config.seed == seed], shapes, bounds) for seed in seeds]
        packs += _mixed([pack for divided in own for pack in divided], shapes, bounds)
    packs = [sorted(pack, key=lambda arm: place[arm.id]) for pack in packs]
    return sorted(packs, key=lambda pack: place[pack[0].id])


def apart(arm: Arm, shape: Shape) -> str:
    """Why an arm may only train beside arms with its own seed; '' where it may train beside others."""
    train = arm.config.train
    if train.packing:
        return "train.packing plans its rows by the seed"
    given = train.buckets
    single = given in (1, "1") or (isinstance(given, (list, tuple)) and len(given) == 1)
    single = single or (train.share_rows and not shape.adapter.own_rows)
    if not (single and masks_keep()) and shape.random(arm):
        return (
            "they draw dropout and a seed's batches have lengths of their own (train.share_rows gives them one, "
            "except where the method needs rows of its own)"
        )
    return ""


def reasons(arms: Sequence[Arm], shapes: Callable[[Arm], Shape]) -> list[str]:
    """Why arms that differ in nothing but their seed train apart, each reason once, with how many arms it is about."""
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        groups.setdefault(_common(arm), []).append(arm)
    several = [g for g in groups.values() if packable(g[0]) and len({arm.config.seed for arm in g}) > 1]
    found: dict[str, int] = {}
    for group in several:
        if why := apart(group[0], shapes(group[0])):
            found[why] = found.get(why, 0) + len(group)
    return [f"seeds train apart in {count} of {len(arms)} arms: {why}" for why, count in found.items()]


def packable(arm: Arm) -> bool:
    """Whether an arm can train beside others at all: on one device, from a start that needs no data."""
    mesh = arm.config.mesh
    return mesh.data in (1, -1) and mesh.fsdp == 1 and mesh.tensor == 1


def work(shape: Shape, delta: Mapping[str, Any] | None = None) -> float:
    """Multiplications per token of a step, up to a factor: forward, backward down to the lowest site, the adapter."""
    delta = shape.delta if delta is None else delta
    depths = _depths(shape.sites)
    lowest = min(depths.get(path, -1.0) for path in delta)
    weights = {p: math.prod(s.shape) for p, s in _products(shape.sites).items()}
    own = sum(trees.count(one) for path, one in delta.items() if depths.get(path, -1.0) < math.inf)
    return sum(weights.values()) + sum(n for path, n in weights.items() if depths[path] >= lowest) + 3 * own


def activations(shape: Shape) -> float:
    """Bytes that an arm keeps for its backward pass and its optimizer, an estimate: see `cost` for a better one."""
    depths = _depths(shape.sites)
    lowest = min(depths.get(path, -1.0) for path in shape.delta)
    above = [site for path, site in _products(shape.sites).items() if depths[path] >= lowest]
    wide = sum(math.prod(s.dims(s.fan_in)) + math.prod(s.dims(s.fan_out)) for s in above)
    return 8.0 * shape.tokens * wide + 16.0 * sum(trees.count(one) for one in shape.delta.values())


def _common(arm: Arm) -> str:
    """Equal for arms that differ in nothing but data and the seed."""
    return digest({name: value for name, value in identity_of(arm.config).items() if name not in (*DATA, "seed")})


def _mixed(packs: list[list[Arm]], shapes: Callable[[Arm], Shape], bounds: Bounds) -> list[list[Arm]]:
    """Packs of one seed each -> fewer packs: each goes whole into the first one that has place for it."""
    if len(packs) == 1 or apart(packs[0][0], shapes(packs[0][0])):
        return packs
    known = {arm.id: shapes(arm) for pack in packs for arm in pack}
    found: list[list[list[Arm]]] = []  # of each new pack the old ones
    for pack in packs:
        fits = (new for new in found if _mix([*new, pack], known, bounds))
        if (new := next(fits, None)) is None:
            found.append([pack])
        else:
            new.append(pack)
    return [[arm for pack in new for arm in pack] for new in found]


def _mix(packs: Sequence[Sequence[Arm]], known: Mapping[str, Shape], bounds: Bounds) -> bool:
    """Whether packs may become one, in which no arm shares what lies below its lowest adapted weight."""
    if not _belongs([arm for pack in packs for arm in pack], known, bounds):
        return False
    whole = _union([known[arm.id].delta for pack in packs for arm in pack])
    return all(work(known[pack[0].id], whole) <= WORTH * _shared_work(pack, known) for pack in packs)


def _shared_work(pack: Sequence[Arm], known: Mapping[str, Shape]) -> float:
    """As `work`, of each arm of a pack with one batch."""
    shape, whole = known[pack[0].id], _union([known[arm.id].delta for arm in pack])
    depths = _depths(shape.sites)
    lowest = min(depths.get(path, -1.0) for path in whole)
    below = sum(math.prod(s.shape) for path, s in _products(shape.sites).items() if depths[path] < lowest)
    return work(shape, whole) - below * (1 - 1 / len(pack))


def _divided(group: Sequence[Arm], shapes: Callable[[Arm], Shape], bounds: Bounds) -> list[list[Arm]]:
    """The most expensive arm first, each into the first pack that has place for it."""
    known = {arm.id: shapes(arm) for arm in group}
    order = sorted(group, key=lambda arm: -work(known[arm.id]))
    packs: list[list[Arm]] = []
    for arm in order:
        fitting = (p for p in packs if _belongs([*p, arm], known, bounds))
        if (pack := next(fitting, None)) is None:
            packs.append([arm])
        else:
            pack.append(arm)
    place = {arm.id: i for i, arm in enumerate(group)}
    return [sorted(pack, key=lambda arm: place[arm.id]) for pack in packs]


def _belongs(pack: Sequence[Arm], known: Mapping[str, Shape], bounds: Bounds) -> bool:
    shapes = [known[arm.id] for arm in pack]
    if len(pack) > bounds.most:
        return False
    if not all(alike(shapes[0].delta, s.delta, fills(s.adapter) and fills(shapes[0].adapter)) for s in shapes[1:]):
        return False
    if any(s.adapter.needs for s in shapes) or len(pack) * max(activations(s) for s in shapes) > bounds.memory:
        return False
    whole = work(shapes[0], _union([s.delta for s in shapes]))
    return all(whole <= WORTH * work(s) for s in shapes)


def _union(deltas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every site with its largest entry."""
    out: dict[str, Any] = {}
    for delta in deltas:
        for path, one in delta.items():
            if path not in out or trees.count(one) > trees.count(out[path]):
                out[path] = one
    return out


def _products(sites: Sites) -> dict[str, Site]:
    """The sites whose product costs something."""
    return {path: site for path, site in sites.items() if site.is_matrix and "embedding" not in site.uses}


def _depths(sites: Sites) -> dict[str, float]:
    """Where each weight stands: embeddings and what is in no layer below all layers, a head with its bias above."""
    out = {path: -1.0 if site.layer is None else float(site.layer) for path, site in sites.items()}
    for path, site in sites.items():
        if site.role == "head":
            out |= {own: math.inf for own in (path, site.bias) if own is not None}
    return out
