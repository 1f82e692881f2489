"""A grid of 24 arms (four ranks, three choices of layers, two seeds) against PEFT, one arm after the other.

Ours is `experiments.ablate`, from the command to the report. The peer trains its arms in one process, so that imports
and tokenizing are paid once. With --peer_arms=k it trains k of them, as many of each choice of layers (which is what an
arm's time depends on), and the table says how many.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from experiments.benchmarks import sentences
from experiments.benchmarks.configs import grid, grid_toy
from experiments.benchmarks.row import Claim, Plan, Row, command, peer
from lora_jax.ablation import results
from lora_jax.errors import UserError

SUITE = "cpu"


def row(plan: Plan) -> Row:
    file, count = (grid_toy, 2) if plan.toy else (grid, 200)
    arms = all_arms(plan, file)
    chosen = some(arms, len(file.LAYERS), plan.peer_arms)
    flags = {"config": f"experiments/benchmarks/configs/{Path(file.__file__).name}", "workdir": "{scratch}/grid"}
    flags |= {**sentences.overrides(plan), "config.train.steps": count}
    kinds = Counter(str(arm["layers"]) for arm in arms)
    settings = {**sentences.peer_settings(plan, count), "arms": chosen, "arms_by_layers": kinds}
    sides = (command("experiments.ablate", flags, read=_read), peer("sst2", settings, "peft"))
    # The flag of today's call may differ from that of the row in the CSV, so the words are the same for both.
    what = f"{len(arms)} arms, wall clock, PEFT's in proportion to the arms it trained"
    claims = (
        Claim(what, "grid_seconds", other="peft", better="lower", target=(">=", 10.0)),
        Claim("mean dev accuracy of the arms trained", "dev_accuracy", other="peft"),
        Claim("arms that PEFT trained", "measured_arms", side="peft"),
    )
    return Row(sides, claims)


def all_arms(plan: Plan, file: Any) -> list[dict[str, Any]]:
    """The arms as the peer wants them: rank, layer numbers (None = all), seed."""
    total = sentences.layers(plan)
    numbers = {"all": None} | {f"last:{n}": list(range(total - n, total)) for n in range(1, total)}
    return [
        {"rank": rank, "layers": numbers[layers], "seed": seed}
        for rank in file.RANKS
        for seed in file.SEEDS
        for layers in file.LAYERS
    ]


def some(arms: list[dict[str, Any]], kinds: int, count: int) -> list[dict[str, Any]]:
    """So many of the arms (0 = all), as many of every choice of layers, spread over ranks and seeds.

    Raises:
      UserError: a number that is no multiple of the choices of layers, or more than there are.
    """
    if count == 0 or count == len(arms):
        return arms
    if count < 0 or count > len(arms) or count % kinds:
        raise UserError(
            f"--peer_arms={count}: expected 0 (all {len(arms)}) or a multiple of {kinds} up to {len(arms)}, so that "
            "every choice of layers is measured as often"
        )
    groups = [arms[i : i + kinds] for i in range(0, len(arms), kinds)]
    share = count // kinds
    return [arm for i in range(share) for arm in groups[i * len(groups) // share]]


def _read(scratch: Path, seconds: float) -> dict[str, float]:
    rows = results.read_results(scratch / "grid" / "results.csv")
    done = [row for row in rows if row["status"] == "done"]
    if len(done) < len(rows):
        raise RuntimeError(f"{len(rows) - len(done)} of {len(rows)} arms failed")
    accuracy = sum(float(row["dev.accuracy"]) for row in done) / len(done)
    return {"grid_seconds": seconds, "dev_accuracy": accuracy, "measured_arms": len(done)}
