"""Training the norms alone: scales and biases of layer norms and RMS norms.

A baseline of Houlsby et al. (2019), arXiv:1902.00751, section 3.4, and a method of its own for language models: Zhao,
Tu, Wei, Mei, Xie (2023), "Tuning LayerNorm in Attention", arXiv:2312.11420. What trains beside bottleneck adapters in
the first of these papers: `chain(bottleneck(...), layernorm())`.
"""

import re
from typing import Any

from lora_jax.adapters.base import Adapter, json_ready
from lora_jax.adapters.full import in_place
from lora_jax.errors import UserError
from lora_jax.sites import Site, in_layers, select

_NORM = re.compile(r"(norm|(^|_)ln(_|\d|$))", re.IGNORECASE)


def layernorm(*, targets: Any = None, layers: Any = "all") -> Adapter:
    """Trains the norms.

    Args:
      targets: patterns on whole paths; None: every vector of a module whose name has `norm` or `ln` in it.
      layers: 'all', 'last:k', 'first:k', or a list of layer indices; anything but 'all' leaves out norms outside
        layers.

    Returns:
      An Adapter. Its first output equals the base's exactly.

    Raises:
      UserError: no norm is found.
    """
    spec = json_ready(method="layernorm", targets=targets, layers=layers)

    def choose(sites):
        norms = [p for p, s in sites.items() if is_norm(s)]
        if targets is None and not norms:
            raise UserError(
                f"layernorm finds no norm: none of the {len(sites)} weights is a vector in a module called norm or ln. "
                "Give targets, for example '.*/scale'"
            )
        return in_layers(sites, select(sites, targets, norms), layers)

    return in_place(spec, choose)


def is_norm(site: Site) -> bool:
    """True for the scale or bias of a norm, told by its module's name."""
    modules = site.path.split("/")[:-1]
    return not site.is_matrix and bool(modules) and _NORM.search(modules[-1]) is not None
