"""Tokens a second, share of the matmul peak and memory of a LoRA step on a 1B Llama, bfloat16, 4 rows of 2,048 tokens.

Against PEFT under torch.compile with SDPA on the same card. Where a step does not fit, ours cuts the batch into
micro-batches, as few as the compiled program's memory allows, and the peer turns gradient checkpointing on.
"""

from typing import Any

from experiments.benchmarks import llama, measure
from experiments.benchmarks.row import Claim, Plan, Row, peer
from experiments.benchmarks.row import ours as our_side
from experiments.benchmarks.rows import step

SUITE = "gpu"
ROOM = 0.9  # of the device's memory that a program may take


def settings(plan: Plan) -> dict[str, Any]:
    """The sizes of Llama-3.2-1B, rank 16 on all linear weights."""
    if plan.toy:
        return {**step.settings(plan), "dtype": "bfloat16"}
    return {"model": llama.BILLION, "batch": 4, "length": 2048, "rank": 16, "dtype": "bfloat16", "steps": 20,
            "matmul": 8192}  # fmt: skip


def row(plan: Plan) -> Row:
    given = settings(plan)
    sides = (our_side("gpu_step", given), peer("llama_step", {**given, "compile": True}, "peft_compiled"))
    claims = (
        Claim("tokens/s, over PEFT compiled", "tokens_per_second", other="peft_compiled"),
        Claim("share of the bfloat16 matmul peak", "peak_share", target=(">=", 0.55)),
        Claim("PEFT's share of the peak", "peak_share", "peft_compiled"),
        Claim("peak memory of the device, of PEFT's", "device_peak_bytes", other="peft_compiled", better="share"),
        Claim("micro-batches", "micro_batches"),
    )
    off = "gpu_step: rematerialization is off, since the library has no setting for it; micro-batches stand in for it"
    return Row(sides, claims, (off,))


def ours(settings: dict[str, Any]) -> dict[str, float]:
    """The step, in as few micro-batches as fit."""
    count = micro_batches(settings)
    return {**step.ours({**settings, "accumulate": count}), "micro_batches": count}


def micro_batches(settings: dict[str, Any], limit: float | None = None) -> int:
    """The fewest micro-batches with which the compiled step fits into memory; the batch itself if none does.

    Args:
      settings: of the step.
      limit: bytes; None: what the device has, less what may lie between arrays.
    """
    limit = ROOM * measure.device_limit() if limit is None else limit
    counts = [n for n in range(1, settings["batch"] + 1) if settings["batch"] % n == 0]
    work = llama.work(settings)
    for count in counts:
        train, state = llama.stepper(work, count)
        memory = train.lower(state, work.base.variables, work.batches[0]).compile().memory_analysis()
        taken = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
        if taken <= limit:
            return count
    return settings["batch"]
