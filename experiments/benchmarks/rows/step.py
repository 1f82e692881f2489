"""Tokens a second of one LoRA step on a 30M Llama, against PEFT as it is and under torch.compile.

The share of the matmul peak counts 4 FLOPs for every matrix weight and token: a forward pass and the gradient of its
inputs, two each. The peak is that of one large product in the same process.
"""

import time
from typing import Any

from experiments.benchmarks import llama, measure
from experiments.benchmarks.row import Claim, Plan, Row, Side, peer
from experiments.benchmarks.row import ours as our_side
from lora_jax.feed import Throttle

SUITE = "cpu"


def settings(plan: Plan) -> dict[str, Any]:
    """8 rows of 128 tokens, rank 8 on all linear weights, AdamW, float32."""
    if plan.toy:
        return {"model": llama.TOY, "batch": 2, "length": 8, "rank": 2, "dtype": "float32", "steps": 2, "matmul": 64}
    return {"model": llama.SMALL, "batch": 8, "length": 128, "rank": 8, "dtype": "float32", "steps": 30, "matmul": 2048}


def sides(given: dict[str, Any]) -> tuple[Side, ...]:
    """Ours, and PEFT both ways."""
    eager, compiled = ({**given, "compile": on} for on in (False, True))
    return our_side("step", given), peer("llama_step", eager, "peft"), peer("llama_step", compiled, "peft_compiled")


def row(plan: Plan) -> Row:
    claims = (
        Claim("tokens/s, over PEFT eager", "tokens_per_second", other="peft", target=(">=", 2.5)),
        Claim("tokens/s, over PEFT compiled", "tokens_per_second", other="peft_compiled", target=(">=", 2.2)),
        Claim("share of the matmul peak", "peak_share", target=(">=", 0.75)),
        Claim("first step (compiles), over PEFT compiled", "first_step_seconds", other="peft_compiled", better="lower"),
    )
    return Row(sides(settings(plan)), claims)


def ours(settings: dict[str, Any]) -> dict[str, float]:
    """The step as the library makes it; also what memory it takes."""
    work = llama.work(settings)
    step, state = llama.stepper(work, settings.get("accumulate", 1))
    batches, before = llama.placed(work), measure.rss()
    states, throttle = [state], Throttle()  # as the loop of a run

    def turn(i: int) -> Any:
        states[0], numbers = step(states[0], work.base.variables, batches[i % len(batches)])
        throttle(numbers["weight"])
        return numbers

    began = time.perf_counter()
    first, steady = measure.first_and_steady(turn, settings["steps"])
    peak_rss = measure.peak_rss()
    peak = measure.matmul_peak(settings["matmul"], settings["dtype"])
    return {
        "tokens_per_second": work.tokens / steady,
        "step_seconds": steady,
        "first_step_seconds": first,
        "loop_seconds": time.perf_counter() - began,
        "matmul_flops_per_second": peak,
        "peak_share": 4 * work.matrix_params * work.tokens / steady / peak,
        "matrix_params": work.matrix_params,
        "weight_bytes": work.weight_bytes,
        "over_weights_bytes": peak_rss - work.weight_bytes,
        "training_bytes": peak_rss - before,
        "device_peak_bytes": measure.device_peak(),
    }
