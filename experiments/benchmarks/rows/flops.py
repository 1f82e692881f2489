"""FLOPs of a LoRA step over those of a forward pass, and its temporary memory, as the frozen base grows.

From the compiled programs; nothing runs. The batch is fixed. Two forward passes' worth is the least (the forward pass
itself and the gradient of its inputs), three would mean that gradients of the frozen weights are formed. Attention
scores cost three times their forward pass, whatever is frozen, so the ratio is given twice: at rows so short that they
do not count, and at rows of `length`.
"""

from typing import Any

import jax

from experiments.benchmarks import llama, measure
from experiments.benchmarks.row import Claim, Plan, Row
from experiments.benchmarks.row import ours as our_side

SUITE = "cpu"
FORMS = ("factored", "merged")
SHORT = 8


def settings(plan: Plan) -> dict[str, Any]:
    """Three widths of one model, the number of tokens fixed."""
    if plan.toy:
        return {"model": llama.TOY, "widths": [16, 32, 64], "batch": 2, "length": 16, "rank": 2, "dtype": "float32"}
    return {"model": llama.SMALL, "widths": [256, 512, 1024], "batch": 8, "length": 128, "rank": 8, "dtype": "float32"}


def sized(model: dict[str, Any], width: int) -> dict[str, Any]:
    """The model at another width."""
    inner = round(width * model["intermediate_size"] / model["hidden_size"])
    return {**model, "hidden_size": width, "intermediate_size": inner}


def programs(given: dict[str, Any]) -> tuple[Any, Any, llama.Work]:
    """(forward pass to the loss, LoRA step), compiled, and the work that they do."""
    work = llama.work(given)
    step, state = llama.stepper(work)
    batch = work.batches[0]

    def forward(variables, batch):
        return work.task.loss(work.base.apply(variables, **work.task.inputs(batch)), batch)

    once = jax.jit(forward).lower(work.base.variables, batch).compile()
    return once, step.lower(state, work.base.variables, batch).compile(), work


def row(plan: Plan) -> Row:
    given = settings(plan)
    claims = [
        Claim(f"step over forward, width {n}, no attention", f"ratio_short_{n}", target=("<=", 2.10))
        for n in given["widths"]
    ]
    claims += [Claim(f"step over forward, width {n}, with attention", f"ratio_{n}") for n in given["widths"]]
    claims += [
        Claim(
            f"largest weights held in temporaries as the base grows, {form}", f"weights_held_{form}", target=("<=", 1.1)
        )
        for form in FORMS
    ]
    return Row((our_side("flops", given),), tuple(claims))


def ours(settings: dict[str, Any]) -> dict[str, float]:
    """Of every width: both ratios, and the bytes."""
    out: dict[str, float] = {}
    tokens = settings["batch"] * settings["length"]
    for width in settings["widths"]:
        given = {**settings, "model": sized(settings["model"], width)}
        once, step, work = programs(given)
        out[f"ratio_{width}"] = measure.flops(step) / measure.flops(once)
        out[f"forward_flops_{width}"] = measure.flops(once)
        out |= {f"step_{width}_temporary_bytes_{form}": _temporaries(work, form) for form in FORMS}
        out[f"weights_{width}_bytes"] = work.weight_bytes
        once, step, _ = programs({**given, "batch": tokens // SHORT, "length": SHORT})
        out[f"ratio_short_{width}"] = measure.flops(step) / measure.flops(once)
    return out | {f"weights_held_{form}": _held(settings, out, form) for form in FORMS}


def _temporaries(work: llama.Work, form: str) -> int:
    """Of a step in one form: which one is chosen changes with the width, and with it what grows."""
    step, state = llama.stepper(work, form=form)
    return measure.temporaries(step.lower(state, work.base.variables, work.batches[0]).compile())


def _held(settings: dict[str, Any], found: dict[str, float], form: str) -> float:
    """How many of the largest weight's bytes the temporaries grow by, beyond what grows with the width itself.

    t(n) = a + b n + c n^2; from three widths n, 2n, 4n: t(4n) - 3 t(2n) + 2 t(n) = 6 c n^2.
    """
    n, *_ = widths = settings["widths"]
    small, middle, large = (found[f"step_{w}_temporary_bytes_{form}"] for w in widths)
    model = sized(settings["model"], n)
    return (large - 3 * middle + 2 * small) / 6 / (4 * n * model["intermediate_size"])
