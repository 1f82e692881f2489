"""Fair budgets: what to adapt varies, and every choice gets the rank that its share of one budget buys.

As in Hu et al. (2021), "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, table 5: one matrix at
rank 8, two at rank 4, four at rank 2, the same number of parameters. A LoRA of rank r on a weight has r * (fan_in +
fan_out) parameters, so the rank is budget // sum(fan_in + fan_out), the largest that does not exceed the budget. The
head that trains beside the adapter is the same for every choice and not part of the budget.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from lora_jax.ablation.grid import Grid, describe
from lora_jax.adapters.parts.ranks import choose_ranks
from lora_jax.errors import UserError
from lora_jax.sites import Site, Sites

TARGETS, LAYERS, RANK = "adapter.targets", "adapter.layers", "adapter.rank"


def equal_parameters(budget: int, choices: Grid, sites: Sites, *, targets: Any = None, layers: Any = "all") -> Grid:
    """Gives each choice of matrices or layers the largest rank whose trainable parameters stay within the budget.

    Args:
      budget: parameters of the adapter, the head not counted.
      choices: a grid over `adapter.targets`, `adapter.layers` or both; other fields of its cells stay as they are.
      sites: of the model; `models.outline(path).sites` reads no weights.
      targets, layers: of cells that do not set them; None is LoRA's own choice.

    Returns:
      The same cells in the same order, each with its `adapter.rank`.

    Raises:
      UserError: even rank 1 exceeds the budget, no rank of the choice would use it up, or the choice selects nothing.
    """
    return _equal(budget, "parameters", parameters, choices, sites, targets, layers)


def equal_flops(budget: int, choices: Grid, sites: Sites, *, targets: Any = None, layers: Any = "all") -> Grid:
    """As `equal_parameters`, the budget being the FLOPs per token that the adapter's product adds to a forward pass.

    For linear weights these are two per parameter, so the two budgets differ for embeddings alone, whose A is looked
    up. A training step costs three times as much; what the layers below the lowest adapted one save is not counted.

    Raises:
      UserError: as `equal_parameters`; a convolution, whose FLOPs per token depend on the input.
    """
    return _equal(budget, "FLOPs per token", flops_per_token, choices, sites, targets, layers)


def parameters(site: Site) -> int:
    """Parameters of one unit of rank at one batch index of a site: fan_in + fan_out."""
    return math.prod(site.dims(site.fan_in)) + math.prod(site.dims(site.fan_out))


def flops_per_token(site: Site) -> int:
    """FLOPs per token of one unit of rank in a forward pass, a multiplication and an addition counted as two.

    Raises:
      UserError: the site is a convolution.
    """
    if "conv" in site.uses:
        raise UserError(
            f"{site.path!r} is a convolution, whose FLOPs depend on the size of the input: use equal_parameters"
        )
    fan_in, fan_out = math.prod(site.dims(site.fan_in)), math.prod(site.dims(site.fan_out))
    each = {"linear": 2 * (fan_in + fan_out), "embedding": 2 * fan_out}
    return sum(each.get(use, 0) for use in site.uses)


def _equal(
    budget: int, unit: str, cost: Callable[[Site], int], choices: Grid, sites: Sites, targets: Any, layers: Any
) -> Grid:
    if type(budget) is not int or budget < 1:
        raise UserError(f"a budget is a whole number of {unit}, at least 1; got {budget!r}")
    if RANK in choices.fields:
        raise UserError(f"the choices set {RANK}, which is what the budget decides; leave it out of them")
    if not {TARGETS, LAYERS} & {*choices.fields}:
        raise UserError(
            f"the choices vary {', '.join(choices.fields)}; to share a budget between them, vary {TARGETS} or {LAYERS}"
        )
    cells = []
    for cell in choices:
        chosen = _chosen(cell, sites, cell.get(TARGETS, targets), cell.get(LAYERS, layers))
        cells.append({**cell, RANK: _rank(budget, unit, cost, chosen, sites, describe(cell))})
    return Grid(cells)


def _chosen(cell: Mapping[str, Any], sites: Sites, targets: Any, layers: Any) -> dict[str, int]:
    """`{path: how many weights of that shape}` of a choice: the selected layers of a stack, times its other copies."""
    try:
        ranks = choose_ranks(sites, method="lora", targets=targets, layers=layers, rank=1, alpha=1)
    except UserError as error:
        raise UserError(f"the choice {describe(cell)}: {error}") from None
    return {
        path: sum(own) * math.prod(sites[path].dims(sites[path].batch)) // len(own) for path, (own, _) in ranks.items()
    }


def _rank(
    budget: int, unit: str, cost: Callable[[Site], int], chosen: Mapping[str, int], sites: Sites, choice: str
) -> int:
    each = sum(count * cost(sites[path]) for path, count in chosen.items())
    if each > budget:
        raise UserError(
            f"the choice {choice} has {each:,} {unit} at rank 1, more than the budget of {budget:,}: raise the budget, "
            "or leave the choice out"
        )
    most = min(sites[path].max_rank for path in chosen)
    rank = budget // each
    if rank > most:
        raise UserError(
            f"the choice {choice} would need rank {rank} to use up the budget of {budget:,} {unit}, but its smallest "
            f"weight has rank {most} at most: lower the budget to {(most + 1) * each - 1:,}, or leave the choice out"
        )
    return rank
