"""Greedy text: 30M Llama, 8 prompts, 128 new tokens each, against transformers' `generate` with its cache.

Random weights write no end token, so every text has its full length on both sides.
"""

from typing import Any

import numpy as np

import lora_jax as lj
from experiments.benchmarks import llama, measure
from experiments.benchmarks.row import Claim, Plan, Row, peer
from experiments.benchmarks.row import ours as our_side

SUITE = "cpu"


def settings(plan: Plan) -> dict[str, Any]:
    """Prompts of 32 tokens."""
    if plan.toy:
        return {"model": llama.TOY, "batch": 2, "prompt": 4, "new": 4, "calls": 1}
    return {"model": llama.SMALL, "batch": 8, "prompt": 32, "new": 128, "calls": 3}


def row(plan: Plan) -> Row:
    given = settings(plan)
    eager, static = ({**given, "static_cache": on} for on in (False, True))
    sides = (our_side("generate", given), peer("generate", eager, "transformers"),
             peer("generate", static, "transformers_static_compiled"))  # fmt: skip
    claims = (
        Claim("new tokens/s, over transformers", "new_tokens_per_second", other="transformers", target=(">=", 3.0)),
        Claim("new tokens/s, over a compiled static cache", "new_tokens_per_second", "ours", sides[2].name),
        Claim("first call (compiles), over transformers", "first_call_seconds", other="transformers", better="lower"),
    )
    return Row(sides, claims)


def ours(settings: dict[str, Any]) -> dict[str, float]:
    """`lora_jax.generate`, the whole call with its way to the host and back."""
    from lora_jax.generate import generate

    base = lj.from_config(settings["model"])
    draw = np.random.default_rng(0).integers(1, base.config.vocab_size, (settings["batch"], settings["prompt"]))
    found: list[int] = []

    def turn(i: int) -> None:
        del i
        texts = generate(base, base.variables, draw.tolist(), max_new_tokens=settings["new"], eos_ids=())
        found.append(sum(map(len, texts)))

    first, steady = measure.first_and_steady(turn, settings["calls"], warm=1)
    assert set(found) == {settings["batch"] * settings["new"]}, "a text ended before its length"
    return {
        "new_tokens_per_second": found[-1] / steady,
        "call_seconds": steady,
        "first_call_seconds": first,
    }
