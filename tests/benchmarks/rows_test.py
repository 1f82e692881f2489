"""Every row of every suite: its claims speak of what its sides measure, and at toy size everything runs."""

import json
import math

import pytest

from experiments.benchmarks import llama, sentences, table
from experiments.benchmarks.configs import grid
from experiments.benchmarks.row import PEERS, Plan, module, names, suites
from experiments.benchmarks.rows import gpu_step
from experiments.benchmarks.rows import grid as grid_row
from lora_jax.errors import UserError
from tests import commands

PLANS = {"toy": Plan(True, "data", "model"), "real": Plan(False, "data", "model")}
ROWS = [name for suite in suites() for name in names(suite)]


def test_the_suites_have_their_rows():
    assert suites() == ["cpu", "gpu"]
    issue = {"step", "memory", "sst2", "flops", "prefix", "grid", "generate", "quant", "startup"}
    assert set(names("cpu")) == issue and set(names("gpu")) == {"gpu_step", "gpu_packed", "gpu_nf4"}


@pytest.mark.parametrize("size", PLANS)
@pytest.mark.parametrize("name", ROWS)
def test_claims_name_sides_and_sides_name_programs(name, size):
    row = module(name).row(PLANS[size])
    known = [side.name for side in row.sides]
    assert len(set(known)) == len(known)
    for claim in row.claims:
        assert claim.side in known and (claim.other is None or claim.other in known)
        assert claim.better in ("higher", "lower", "share") and claim.what
        assert claim.target is None or claim.target[0] in (">=", "<=")
    for side in row.sides:
        script = next((part for part in side.argv if part.startswith(str(PEERS))), None)
        assert script is None or (PEERS / script).is_file()
        assert module(name).__doc__ and json.dumps(side.settings)


@pytest.mark.parametrize("name", ROWS)
def test_both_sides_do_the_same_work(name):
    """What both sides are told, they are told alike, save what the sides are there to differ in."""
    differ = {"compile", "static_cache", "arms", "quant"}
    shared: dict = {}
    for side in module(name).row(PLANS["real"]).sides:
        for key, value in side.settings.items():
            if key not in differ and key != "config.train.prefix_cache":
                assert shared.setdefault(key, value) == value, f"{key} of {side.name}"


def test_the_peer_trains_what_the_config_says():
    """The settings that go to PEFT's script are those of configs/sst2_minilm.py and the defaults of training."""
    from configs import sst2_minilm

    cfg, given = sst2_minilm.get_config(), sentences.peer_settings(PLANS["real"], 300)
    for key in ("batch_size", "eval_every", "steps"):
        assert given[key] == cfg.train[key]
    assert given["alpha"] == cfg.adapter.alpha and given["max_length"] == cfg.data.max_length
    arm = next(s for s in module("sst2").row(PLANS["real"]).sides if s.name == "peft").settings["arms"][0]
    assert arm["rank"] == cfg.adapter.rank and arm["layers"] is None
    from lora_jax.adapters import learning_rate

    assert given["learning_rate"] == (cfg.train.learning_rate or learning_rate("lora"))


def test_arms_that_the_peer_trains():
    arms = grid_row.all_arms(PLANS["real"], grid)
    assert len(arms) == 24 and len(grid.sweep()) == 24
    assert grid_row.some(arms, 3, 0) == arms and grid_row.some(arms, 3, 24) == arms
    few = grid_row.some(arms, 3, 6)
    assert sorted(map(str, (arm["layers"] for arm in few))) == ["None"] * 2 + ["[3, 4, 5]"] * 2 + ["[5]"] * 2
    assert len({arm["rank"] for arm in few}) == 2
    for wrong in (5, -3, 27):
        with pytest.raises(UserError, match=f"--peer_arms={wrong}: expected 0 .all 24. or a multiple of 3 up to 24"):
            grid_row.some(arms, 3, wrong)
    part, whole = (module("grid").row(plan) for plan in (Plan(False, "data", "model", peer_arms=6), PLANS["real"]))
    assert [len(row.sides[1].settings["arms"]) for row in (part, whole)] == [6, 24]
    assert part.claims == whole.claims, "a table of the CSV alone is not worded by today's flags"
    assert "measured_arms" in {claim.value for claim in part.claims}, "the table says how many it was"


@pytest.mark.slow
def test_remat_and_micro_batches_are_what_memory_takes():
    settings = {"model": llama.TOY, "batch": 2, "length": 8, "rank": 2, "dtype": "float32"}
    assert gpu_step.fitting(settings, limit=math.inf) == (False, 1)
    assert gpu_step.fitting(settings, limit=0) == (True, 2)


def test_the_command_measures_and_writes(tmp_path, capsys):
    """One real row through the real flags, in its own process."""
    arguments = ("--toy", "--rows=step", "--sides=ours", "--repeats=1", f"--out={tmp_path}")
    ended = commands.command(capsys, "benchmark", *arguments)
    assert ended.code == 0, ended.err
    assert "TOY SIZES" in ended.out and "share of the matmul peak" in ended.out
    found = {one.name: one.value for one in table.read(tmp_path / "cpu-toy.csv")}
    assert (
        found["tokens_per_second"] > 0
        and 0 < found["peak_share"] < 1
        and found["wall_seconds"] > found["start_seconds"]
    )
    assert found["matrix_params"] == 4 * 32**2 + 3 * 32 * 48 + 32 * 128
    assert "| step | share of the matmul peak | ours |" in (tmp_path / "cpu-toy.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows=stepp"], "--rows=stepp: the suite cpu has no such row; did you mean 'step'"),
        (["--suite=gpuu"], "--suite=gpuu: did you mean 'gpu'"),
        (["--repeats=0"], "--repeats=0, --minutes=60: expected 1 or more"),
        (["--threads=9999"], "--threads=9999: expected 0 .all. to"),
        (["--toy", "--docs=x.md"], "--docs with --toy"),
        (["--workdir=x"], "takes no --config and no --workdir"),
        (["--rows=sst2", "--data=nowhere"], "the rows sst2 need sst2, and .*nowhere has no train.jsonl"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, capsys):
    import re

    ended = commands.command(capsys, "benchmark", *arguments, f"--out={tmp_path / 'out'}")
    assert ended.code == 2 and re.search(message, ended.err), ended.err


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.parametrize("suite", ["cpu", "gpu"])
def test_a_whole_suite_at_toy_size(suite, tmp_path, capsys):
    pytest.importorskip("peft")
    ended = commands.command(capsys, "benchmark", f"--suite={suite}", "--toy", "--repeats=1", f"--out={tmp_path}")
    assert ended.code == 0, ended.err
    assert "FAILED" not in ended.out and "not measured" not in ended.out


def test_packed_arms_run():
    """In this process: the one row that builds on inner parts of the package."""
    own = next(s for s in module("gpu_packed").row(PLANS["toy"]).sides if s.name == "arms_2")
    assert module("gpu_packed").ours(dict(own.settings))["tokens_per_second"] > 0
