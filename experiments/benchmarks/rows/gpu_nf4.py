"""The step of `gpu_step` over a base in nf4, next to the one over the bfloat16 base: memory against time."""

from experiments.benchmarks import llama
from experiments.benchmarks.row import Claim, Plan, Row
from experiments.benchmarks.row import ours as our_side
from experiments.benchmarks.rows import gpu_step

SUITE = "gpu"


def row(plan: Plan) -> Row:
    model = {"model": {**llama.TOY, "hidden_size": 64, "intermediate_size": 128}} if plan.toy else {}
    given = {**gpu_step.settings(plan), **model}
    sides = (our_side("gpu_step", {**given, "quant": "nf4"}), our_side("gpu_step", given, "dense"))
    claims = (
        Claim("tokens/s, over the dense base", "tokens_per_second", other="dense"),
        Claim("peak memory of the device, of the dense base's", "device_peak_bytes", other="dense", better="share"),
        Claim("bytes of the base at rest, of the dense one's", "weight_bytes", other="dense", better="share"),
    )
    return Row(sides, claims)
