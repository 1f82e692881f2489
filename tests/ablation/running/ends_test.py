"""How arms end, and what a second command does about it: the real command, in this process."""

import types

import pytest

from lora_jax import records
from lora_jax.ablation import results
from lora_jax.ablation.running import execute, run
from tests import commands
from tests.ablation import grids

RANKS = 'axis("adapter.rank", [1, 2, {last}])'


def ablate(capsys, file, *more):
    workdir = file.parent / "grid"
    ended = commands.command(capsys, "ablate", f"--config={file}", f"--workdir={workdir}", *more)
    rows = results.read_results(workdir / "results.csv") if workdir.exists() else []
    return ended, {row["adapter.rank"]: row for row in rows}


def test_a_dry_run_prints_the_arms_and_writes_nothing(capsys, tmp_path):
    ended, rows = ablate(capsys, grids.world(tmp_path, RANKS.format(last=4), steps=2), "--dry_run")
    assert ended.code == 0 and all(f"rank={rank}" in ended.out for rank in (1, 2, 4)) and not rows
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "grid.py", "model"]


def test_an_arm_that_cannot_be_is_a_row_with_its_reason(capsys, tmp_path):
    file = grids.world(tmp_path, RANKS.format(last=99), steps=2)
    ended, rows = ablate(capsys, file)
    assert ended.code == 0, ended.err
    assert [row["status"] for row in rows.values()] == ["done", "done", "failed"]
    assert "rank 99 is above min(fan_in, fan_out) = 16" in rows[99]["reason"] and "== failed" in ended.out
    before = grids.ended(tmp_path / "grid")

    edited = file.read_text().replace("= 2, 4, 4", "= 3, 4, 4")
    assert edited != file.read_text()
    file.write_text(edited)
    ended, rows = ablate(capsys, file, "--arms_together=1")
    assert ended.code == 0 and "2 to train in 2 packs" in ended.out, "an edited field reuses nothing"
    assert [row["step"] for row in rows.values()] == [3, 3, None] and {row["arm"] for row in rows.values()}.isdisjoint(
        before
    )
    after = grids.ended(tmp_path / "grid")
    assert {arm: after[arm] for arm in before} == before, "and leaves what the old grid made"


def test_where_every_arm_fails_the_command_does(capsys, tmp_path):
    ended, rows = ablate(capsys, grids.world(tmp_path, 'axis("adapter.rank", [98, 99])', steps=2))
    assert ended.code == 2 and ended.err.count("\n") == 1
    assert "no arm has a result, all 2 failed; rank=98: rank 98 is above" in ended.err
    assert [row["status"] for row in rows.values()] == ["failed"] * 2


def test_a_pack_that_fails_is_halved_and_an_unforeseen_error_is_one_arms_own(capsys, tmp_path, monkeypatch):
    together, fit, sizes = execute.fit_together, execute.fit, []

    def no_room(base, methods, *args, **kwargs):
        sizes.append(len(methods))
        if len(methods) > 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return together(base, methods, *args, **kwargs)

    def broken(*args, **kwargs):
        raise OSError("the disk\nis on fire")

    monkeypatch.setattr(execute, "fit_together", no_room)
    monkeypatch.setattr(execute, "fit", broken)
    file = grids.world(tmp_path, RANKS.format(last=4), steps=2)
    ended, rows = ablate(capsys, file)
    assert ended.code == 0 and sizes == [3, 2], ended.err
    assert [row["status"] for row in rows.values()] == ["done", "done", "failed"]
    assert rows[4]["reason"] == "OSError: the disk is on fire"
    failure = records.read_json(tmp_path / "grid" / "runs" / rows[4]["arm"] / "failure.json")
    assert "in broken" in failure["traceback"]

    monkeypatch.setattr(execute, "fit", fit)
    before = grids.ended(tmp_path / "grid")
    ended, rows = ablate(capsys, file)
    assert ended.code == 0 and rows[4]["status"] == "failed" and grids.ended(tmp_path / "grid") == before
    ended, rows = ablate(capsys, file, "--retry_failed")
    assert ended.code == 0 and [row["status"] for row in rows.values()] == ["done"] * 3
    assert rows[4]["reason"] is None and not list((tmp_path / "grid").glob("runs/*/failure.json"))


@pytest.fixture
def begun(tmp_path):
    """Four arms of which a process began pack 'ab' and pack 'cd', one after the other."""
    arms = [types.SimpleNamespace(id=name) for name in "abcd"]

    def begin(ids, step=None):
        records.write_json(execute.begun_file(tmp_path, ids), {"arms": list(ids)})
        if step is not None:
            (execute.pack_folder(tmp_path, ids) / str(step)).mkdir(parents=True)

    return arms, begin, tmp_path


def ids(packs):
    return ["".join(arm.id for arm in pack) for pack in packs]


def test_a_pack_with_a_checkpoint_goes_on_as_it_began(begun):
    arms, begin, workdir = begun
    planned = [arms[:3], arms[3:]]
    begin("ab", step=3)
    assert ids(run.unfinished(arms, planned, workdir, most=16)) == ["ab", "c", "d"]
    assert ids(run.unfinished(arms, planned, workdir, most=1)) == ["abc", "d"], "too large by now"
    assert ids(run.unfinished(arms[1:], [arms[1:]], workdir, most=16)) == ["bcd"], "an arm is gone"


def test_a_pack_with_an_arm_that_ended_goes_on_as_it_began(begun):
    arms, begin, workdir = begun
    begin("ab")
    assert ids(run.unfinished(arms, [arms], workdir, most=16)) == ["abcd"], "nothing to go on with"
    records.write_json(execute.run_folder(workdir, "a") / "failure.json", {"reason": "x"})
    assert ids(run.unfinished(arms, [arms], workdir, most=16)) == ["ab", "cd"]
    records.write_json(execute.run_folder(workdir, "b") / "summary.json", {})
    assert ids(run.unfinished(arms, [arms], workdir, most=16)) == ["cd"]


def test_of_two_packs_with_one_arm_the_later_goes_on(begun):
    arms, begin, workdir = begun
    begin("abcd", step=3)
    begin("bc", step=6)
    assert ids(run.unfinished(arms, [arms], workdir, most=16)) == ["bc", "ad"]
