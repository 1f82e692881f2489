"""A whole fine-tuning run: MiniLM on `sst2`, 300 steps of 32 uniformly drawn sentences, from the command to the exit.

Start-up, compiling (from an empty cache, unless the side says otherwise), evaluations and saving are in the seconds.
"""

from experiments.benchmarks import sentences
from experiments.benchmarks.row import Claim, Plan, Row, command, peer

SUITE = "cpu"


def row(plan: Plan) -> Row:
    count = sentences.steps(plan, 300)
    flags = sentences.flags(plan, train__steps=count, seed="{repeat}")
    arm = {"rank": 8, "layers": None, "seed": "{repeat}"}
    settings = {**sentences.peer_settings(plan, count), "arms": [arm]}
    sides = (
        command("experiments.train", flags, read=sentences.read_run),
        command("experiments.train", flags, "ours_cached", read=sentences.read_run, warm=True),
        peer("sst2", settings, "peft"),
    )
    claims = (
        Claim("whole command, nothing compiled before", "wall_seconds", other="peft", better="lower", target=(">=", 3)),
        Claim("whole command, compiled before", "wall_seconds", "ours_cached", "peft", "lower"),
        Claim("dev accuracy", "dev_accuracy", other="peft"),
        Claim("test accuracy", "test_accuracy", other="peft"),
    )
    return Row(sides, claims, ("sst2: repeat i trains with seed i on both sides",))
