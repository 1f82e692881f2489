"""What an arm cost is the sum over all processes that worked on it, killed ones up to their last log line."""

import types

import pytest

from lora_jax import records
from lora_jax.ablation.running import execute, expense
from lora_jax.stopping import Interrupted


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless told."""
    now = types.SimpleNamespace(at=100.0)
    monkeypatch.setattr(expense.time, "perf_counter", lambda: now.at)
    return now


class Killed(BaseException):
    """Nobody catches it."""


def seconds(workdir, arm="a"):
    return records.read_json(execute.run_folder(workdir, arm) / "cost.json")["seconds"]


def test_a_resumed_arm_costs_all_its_processes(tmp_path, monkeypatch, clock):
    """Stopped by a signal after 5 s, killed 3 s after a line at 4 s, then failed after 2 s, and tried again for 1 s."""
    arm = types.SimpleNamespace(id="a", values={})

    def process(script):
        monkeypatch.setattr(execute, "_alone", lambda arm, workdir, tick, stores: script(tick))
        execute.execute([arm], tmp_path)

    def passes(*events, end=None):
        def script(tick):
            for number in events:
                clock.at += number
                if number is not events[-1]:
                    tick(1, 10)
            if end is not None:
                raise end

        return script

    with pytest.raises(Interrupted):
        process(passes(5.0, end=Interrupted(15, 3, tmp_path)))
    assert seconds(tmp_path) == 5
    with pytest.raises(Killed):
        process(passes(4.0, 3.0, end=Killed()))
    assert seconds(tmp_path) == 9
    process(passes(2.0, end=OSError("no room")))
    assert seconds(tmp_path) == 11 and execute.status(execute.run_folder(tmp_path, "a")) == "failed"
    (execute.run_folder(tmp_path, "a") / "failure.json").unlink()
    process(passes(1.0))
    assert seconds(tmp_path) == 12


def test_arms_of_a_pack_share_its_time_and_one_that_ended_costs_no_more(tmp_path, clock):
    folders = {name: tmp_path / name for name in "ab"}
    records.write_json(folders["b"] / "cost.json", {"seconds": 100.0, "peak_memory_mb": 1e9})
    found = expense.Expense(folders, count=2)
    clock.at += 6
    found.close("a")
    clock.at += 4
    found.note()
    clock.at += 1
    found.note(least=expense.EVERY)  # too soon
    cost = {name: records.read_json(folder / "cost.json") for name, folder in folders.items()}
    assert (cost["a"]["seconds"], cost["b"]["seconds"]) == (3, 105)
    assert cost["b"]["peak_memory_mb"] == 1e9 > cost["a"]["peak_memory_mb"] > 0
