"""LoRA on the last 2 of 6 layers for 10 epochs: what lies below computed once for all epochs, or at every step.

Both sides are ours. The checkpoint's dropout is off on both, since with it the lower layers differ at every step.
"""

from experiments.benchmarks import sentences
from experiments.benchmarks.row import Claim, Plan, Row, Side, command

SUITE = "cpu"


def row(plan: Plan) -> Row:
    claims = (
        Claim("training and its evaluations, cache off over on", "training_seconds", "ours", "uncached", "lower",
              (">=", 3.0)),
        Claim("whole command, cache off over on", "wall_seconds", "ours", "uncached", "lower"),
        Claim("dev accuracy", "dev_accuracy", "ours", "uncached"),
    )  # fmt: skip
    return Row((_side(plan, "on", "ours"), _side(plan, "off", "uncached")), claims)


def _side(plan: Plan, cache: str, name: str) -> Side:
    flags = sentences.flags(
        plan, adapter__layers="last:2", model__dropout=0.0, train__steps=0, train__epochs=2 if plan.toy else 10,
        data__limit=16 if plan.toy else 1000, train__prefix_cache=cache,
    )  # fmt: skip
    return command("experiments.train", flags, name, read=sentences.read_run, warm=True)
