"""Ablations: a grid of overrides, its arms, their cost, equal budgets; results, statistics over seeds, figures.

from lora_jax.ablation import axis, product, zipped, chain

def sweep():
    return product(axis("adapter.rank", [1, 4]), axis("adapter.layers", ["last:1", "all"]), axis("seed", range(3)))
"""

from lora_jax.ablation.arms import Arm as Arm
from lora_jax.ablation.arms import expand as expand
from lora_jax.ablation.budget import equal_flops as equal_flops
from lora_jax.ablation.budget import equal_parameters as equal_parameters
from lora_jax.ablation.cost import Cost as Cost
from lora_jax.ablation.cost import estimate as estimate
from lora_jax.ablation.grid import Grid as Grid
from lora_jax.ablation.grid import axis as axis
from lora_jax.ablation.grid import chain as chain
from lora_jax.ablation.grid import from_sweep as from_sweep
from lora_jax.ablation.grid import product as product
from lora_jax.ablation.grid import zipped as zipped
