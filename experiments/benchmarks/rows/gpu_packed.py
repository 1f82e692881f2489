"""Arms of an ablation that train in one program: 1, 4, 16 and 32 of them, against one lone run after the other.

Each arm has a row of 512 tokens a step. The ratio says how many lone runs' worth of tokens a pack trains at once.
"""

from typing import Any

import jax

from experiments.benchmarks import llama, measure
from experiments.benchmarks.row import Claim, Plan, Row
from experiments.benchmarks.row import ours as our_side
from experiments.benchmarks.rows import gpu_step
from lora_jax.ablation.running.packed import Pack, make_program
from lora_jax.train_settings import TrainSettings

SUITE = "gpu"


def row(plan: Plan) -> Row:
    counts = (1, 2) if plan.toy else (1, 4, 16, 32)
    given = {**gpu_step.settings(plan), "batch": 1, "length": 8 if plan.toy else 512}
    packs = tuple(our_side("gpu_packed", {**given, "arms": n}, f"arms_{n}") for n in counts)
    rate = "tokens_per_second"
    claims = [Claim(f"{n} packed arms over one lone run after the other", rate, f"arms_{n}", "alone") for n in counts]
    claims += [Claim(f"peak memory of {n}, of a lone run's", "device_peak_bytes", f"arms_{n}", "alone", "share")
               for n in counts]  # fmt: skip
    return Row((our_side("step", given, "alone"), *packs), tuple(claims))


def ours(settings: dict[str, Any]) -> dict[str, float]:
    """The packed step of `experiments.ablate`, with another first delta for each arm."""
    work, arms = llama.work(settings), settings["arms"]
    starts = [llama.starts(work, seed=seed)[1] for seed in range(arms)]
    own = TrainSettings(steps=1000, learning_rate=llama.RATE, schedule="constant", clip_norm=0.0)
    pack = Pack(work.adapter, starts, [own] * arms, own.steps)
    program = make_program(pack, work.base.apply, work.adapter, work.task, own, own.steps)
    states, hyper, batches = [pack.state(program)], pack.hyper(), llama.placed(work)
    variables = jax.device_put(work.base.variables, jax.devices()[0])

    def turn(i: int) -> Any:
        states[0], numbers = program.train(states[0], hyper, variables, batches[i % len(batches)])
        return numbers

    first, steady = measure.first_and_steady(turn, settings["steps"])
    return {
        "tokens_per_second": arms * work.tokens / steady,
        "step_seconds": steady,
        "first_step_seconds": first,
        "device_peak_bytes": measure.device_peak(),
    }
