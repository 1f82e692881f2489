"""Tokens a second, share of the matmul peak and memory of a LoRA step on a 1B Llama, bfloat16, 4 rows of 2,048 tokens.

Against PEFT under torch.compile with SDPA on the same card. Where a step does not fit, by the compiled program's own
account, ours turns remat on and then cuts the batch into as few micro-batches as will do; the peer turns gradient
checkpointing on.
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
        Claim("remat (1 = on)", "remat"),
        Claim("micro-batches", "micro_batches"),
    )
    return Row(sides, claims)


def ours(settings: dict[str, Any]) -> dict[str, float]:
    """The step, with what makes it fit."""
    remat, count = fitting(settings)
    return {**step.ours({**settings, "remat": remat, "accumulate": count}), "remat": remat, "micro_batches": count}


def fitting(settings: dict[str, Any], limit: float | None = None) -> tuple[bool, int]:
    """(remat, micro-batches): the first choice that fits into memory; the most frugal one if none does.

    Args:
      settings: of the step.
      limit: bytes; None: what the device has, less what may lie between arrays.
    """
    limit = ROOM * measure.device_limit() if limit is None else limit
    counts = [n for n in range(1, settings["batch"] + 1) if settings["batch"] % n == 0]
    choices = [(False, 1), *((True, count) for count in counts)]
    for remat, count in choices:
        work = llama.work({**settings, "remat": remat})
        train, state = llama.stepper(work, count)
        memory = train.lower(state, work.base.variables, work.batches[0]).compile().memory_analysis()
        taken = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
        if taken <= limit:
            return remat, count
    return choices[-1]
