"""The function transform: `lift` runs any JAX function on adapted weights, `find_sites` reads what its weights mean.

This is the only folder of the package that sees a jaxpr. `weight` is the node that stands for a weight, `products` and
`rules` say what single operations do with it, `interpret` and `control` walk the jaxpr, `trace` and `find` are the two
ways in.
"""

from lora_jax.lift.again import KEPT, keep, recomputes_products, traced
from lora_jax.lift.control import opened_as
from lora_jax.lift.find import find_sites
from lora_jax.lift.frontier import Split, is_random, split
from lora_jax.lift.moments import input_moments
from lora_jax.lift.trace import lift
from lora_jax.lift.weight import AdaptedWeight, Axes, is_adapted

__all__ = [
    "KEPT", "AdaptedWeight", "Axes", "Split", "find_sites", "input_moments", "is_adapted", "is_random", "keep", "lift",
    "opened_as", "recomputes_products", "split", "traced",
]  # fmt: skip
