"""What QLoRA's base takes in nf4: bits a weight at rest, and how much of it is dense at one time in the step.

From the packed arrays and the compiled programs; nothing runs.
"""

import math
from typing import Any

import jax

from experiments.benchmarks import llama, measure
from experiments.benchmarks.row import Claim, Plan, Row
from experiments.benchmarks.row import ours as our_side
from experiments.benchmarks.rows import step as step_row
from lora_jax.lift import is_adapted

SUITE = "cpu"


def row(plan: Plan) -> Row:
    # Packing takes blocks of 64, which the usual toy size would mostly pad.
    model = {"model": {**llama.TOY, "hidden_size": 64, "intermediate_size": 128}} if plan.toy else {}
    given = {**step_row.settings(plan), **model, "quant": "nf4"}
    claims = (
        Claim("bits a quantized weight at rest", "weight_bits", target=("<=", 4.2)),
        Claim("layers' weights dense at a time", "layers_dense", target=("<=", 1.0)),
        Claim("temporaries of the step, of the dense base's", "temporaries_share"),
        Claim("bytes that the program takes, of the dense base's", "arguments_share"),
    )
    return Row((our_side("quant", given),), claims)


def ours(settings: dict[str, Any]) -> dict[str, float]:
    """The LoRA step over the packed base, next to the one over the dense base."""
    dense, small = llama.work({**settings, "quant": ""}), llama.work(settings)
    before, after = _compiled(dense), _compiled(small)
    held = measure.temporaries(after) - measure.temporaries(before)
    nodes = [x for x in jax.tree.leaves(small.base.variables, is_leaf=is_adapted) if is_adapted(x)]
    weights = sum(math.prod(node.shape) for node in nodes)
    stored = sum(leaf.nbytes for node in nodes for leaf in jax.tree.leaves(node))
    layer = 4 * weights / dense.base.config.num_hidden_layers
    sizes = [p.memory_analysis().argument_size_in_bytes for p in (after, before)]
    return {
        "weight_bits": 8 * stored / weights,
        "layers_dense": held / layer,
        "temporaries_share": measure.temporaries(after) / measure.temporaries(before),
        "arguments_share": sizes[0] / sizes[1],
        "temporary_bytes": measure.temporaries(after),
        "dense_temporary_bytes": measure.temporaries(before),
    }


def _compiled(work: llama.Work) -> Any:
    step, state = llama.stepper(work, form="factored")  # as over a packed base, or the forms would be compared
    return step.lower(state, work.base.variables, work.batches[0]).compile()
