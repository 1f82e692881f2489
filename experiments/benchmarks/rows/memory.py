"""The most memory that a process with the step of `step` ever holds, over the bytes of its frozen weights.

The whole process counts, libraries and compiler included, as /usr/bin/time sees it. `training_bytes` leaves out what
was held when the model stood ready.
"""

from experiments.benchmarks.row import Claim, Plan, Row
from experiments.benchmarks.rows import step

SUITE = "cpu"


def row(plan: Plan) -> Row:
    given = {**step.settings(plan), "steps": 2 if plan.toy else 5}
    claims = (
        Claim("peak RSS over the weights, of PEFT's", "over_weights_bytes", "ours", "peft", "share", ("<=", 0.6)),
        Claim("the same, of PEFT compiled", "over_weights_bytes", "ours", "peft_compiled", "share"),
        Claim("peak RSS since the model is there, of PEFT's", "training_bytes", "ours", "peft", "share"),
    )
    return Row(step.sides(given), claims)
