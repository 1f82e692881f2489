"""Nothing but the task head: the feature-based baseline, and what trains beside every other method on a new head.

A family names its head by the role `head`; a foreign model has none unless told by `targets`.
"""

from typing import Any

from lora_jax.adapters.base import Adapter, json_ready
from lora_jax.adapters.full import in_place
from lora_jax.errors import UserError
from lora_jax.sites import select


def head(*, targets: Any = None) -> Adapter:
    """Trains the head in place.

    Args:
      targets: patterns or roles; None: the sites whose role is `head` and their biases.

    Returns:
      An Adapter. Its first output equals the base's exactly.

    Raises:
      UserError: the family names no head and no targets are given.
    """
    spec = json_ready(method="head", targets=targets)

    def choose(sites):
        kernels = [p for p, s in sites.items() if s.role == "head"]
        default = [p for p in sites if p in {*kernels, *(sites[k].bias for k in kernels)}]
        if targets is None and not default:
            raise UserError(
                "the method 'head' finds no head: this model names none (a task without labels has none, and a "
                "model of your own never does). Give targets, for example targets='.*head.*'"
            )
        return {p: (True,) * max(1, len(sites[p].layers)) for p in select(sites, targets, default)}

    return in_place(spec, choose)
