"""FLOPs of a LoRA step over those of a forward pass, and its temporary memory, as the frozen base grows.

From the compiled programs; nothing runs. The batch is fixed, and once twice as large, which tells what a program holds
for its tokens from what it holds for its weights. Two forward passes' worth is the least (the forward pass
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
        Claim(f"temporaries beside the tokens' own, of the largest weight, {form}", f"held_{form}", target=("<=", 1.1))
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
        twice = llama.work({**given, "batch": 2 * settings["batch"]})
        for form in FORMS:
            one, two = temporaries(work, form), temporaries(twice, form)
            out |= {f"step_{width}_temporary_bytes_{form}": one, f"step_{width}_held_bytes_{form}": held(one, two)}
        out[f"weights_{width}_bytes"] = work.weight_bytes
        once, step, _ = programs({**given, "batch": tokens // SHORT, "length": SHORT})
        out[f"ratio_short_{width}"] = measure.flops(step) / measure.flops(once)
    return out | {f"held_{form}": max(_of_largest(settings, out, form)) for form in FORMS}


def held(one: float, two: float) -> float:
    """Bytes of temporaries that are there however many tokens there are: t(n) = a + b n, from n and 2 n tokens.

    Activations are the b: at a fixed width every one of them grows with the tokens. The a is copies of weights, merged
    or transposed, and gradients, of frozen weights or of the delta. Only at a size at which the compiler orders both
    programs alike: with arrays of a few KiB it does not, and what is left over is noise.
    """
    return 2 * one - two


def temporaries(work: llama.Work, form: str) -> int:
    """Of a step in one form: which one is chosen changes with width and tokens, and with it what is held."""
    step, state = llama.stepper(work, form=form)
    return measure.temporaries(step.lower(state, work.base.variables, work.batches[0]).compile())


def _of_largest(settings: dict[str, Any], found: dict[str, float], form: str) -> list[float]:
    """At every width: what is held, of the bytes of the largest weight that is adapted."""
    inner = {n: sized(settings["model"], n)["intermediate_size"] for n in settings["widths"]}
    return [found[f"step_{n}_held_bytes_{form}"] / (4 * n * inner[n]) for n in settings["widths"]]
