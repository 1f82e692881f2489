"""A grid is killed at any moment, and the same command finishes it: real processes, the real command."""

import random
import shutil
import signal
import threading
import time

import pytest

from lora_jax.ablation import results
from tests.ablation import grids


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return grids.world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def straight(file):
    """The grid without a disturbance: its work directory and what it printed."""
    workdir = file.parent / "straight"
    return workdir, grids.finish(grids.spawn(file, workdir))


class Reader(threading.Thread):
    """Reads results.csv all the time: `wrong` is what it found broken."""

    def __init__(self, path, arms):
        super().__init__(daemon=True)
        self.path, self.arms, self.reads, self.wrong, self.over = path, arms, 0, [], threading.Event()

    def run(self):
        while not self.over.wait(0.005):
            if not self.path.exists():
                continue
            try:
                rows = results.read_results(self.path)
            except Exception as error:
                self.wrong.append(repr(error))
                continue
            self.reads += 1
            if len(rows) != self.arms or any(row["status"] == "done" and row["dev.loss"] is None for row in rows):
                self.wrong.append(rows)

    def stop(self):
        self.over.set()
        self.join()


def disturb(file, workdir, number, chance):
    """Starts the command and sends a signal at a random moment of its work; returns its exit code and output."""
    before = grids.ended(workdir)
    process, lines = grids.spawn(file, workdir), chance.choice([0, 0, *range(1, 100)])
    shown, deadline = "", time.monotonic() + 240
    while process.poll() is None and "\ntraining" not in shown:  # from here on a signal must find it ready
        shown += process.stdout.readline()
    while process.poll() is None and grids.lines(workdir) < lines:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(chance.random() * (0.2 if lines else 2.0))
    process.send_signal(number)
    out = shown + process.communicate(timeout=240)[0]
    after = grids.ended(workdir)
    assert {arm: after[arm] for arm in before} == before, "an arm that had ended was touched"
    return process.returncode, out


def survive(file, workdir, straight, numbers):
    seed = random.randrange(10**6)
    chance, reader = random.Random(seed), Reader(workdir / "results.csv", 8)
    reader.start()
    try:
        for number in numbers:
            code, out = disturb(file, workdir, number, chance)
            assert code in (0, -number if number == signal.SIGKILL else 128 + number), (seed, out)
            if code == 128 + number:
                assert "Run the same command to go on" in out and "Traceback" not in out, (seed, out)
        before = grids.ended(workdir)
        grids.finish(grids.spawn(file, workdir))
    finally:
        reader.stop()
    after = grids.ended(workdir)
    assert {arm: after[arm] for arm in before} == before, seed
    found, wanted = grids.outcome(workdir), grids.outcome(straight)
    assert found.keys() == wanted.keys(), seed
    assert [key for key in wanted if found[key] != wanted[key]] == [], f"not as undisturbed (random seed {seed})"
    assert reader.reads > 10 and not reader.wrong, (seed, reader.wrong[:1])


def test_killed_and_terminated_it_ends_as_undisturbed_bit_for_bit(file, straight, tmp_path):
    survive(file, tmp_path / "grid", straight[0], [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL])


@pytest.mark.slow
def test_killed_twenty_times(file, straight, tmp_path):
    survive(file, tmp_path / "grid", straight[0], [signal.SIGKILL] * 20)


def test_failed_arms_are_rows_with_their_reason_and_the_others_are_done(straight):
    workdir, out = straight
    rows = {row["label"]: row for row in results.read_results(workdir / "results.csv")}
    failed = [row for label, row in rows.items() if "1e+38" in label]
    assert len(rows) == 8 and [row["status"] for row in rows.values()].count("done") == 6
    assert [row["status"] for row in failed] == ["failed"] * 2
    assert all(row["reason"].startswith("training diverged: the loss is nan") for row in failed)
    assert "6 arms done, 2 failed" in out and out.count("training diverged") == 4, "when it happens, and at the end"
    stopped = [row["step"] for label, row in rows.items() if "1e-09" in label]
    assert stopped == [16, 16] and {row["step"] for row in rows.values() if row["status"] == "done"} == {16, 40}


def test_a_finished_grid_trains_only_what_is_added_to_it(file, straight, tmp_path):
    workdir = shutil.copytree(straight[0], tmp_path / "grid")
    before = grids.ended(workdir)
    grown = grids.world(file.parent, grids.ENDS.replace("range(2)", "[0, 1, 2]"))
    try:
        out = grids.finish(grids.spawn(grown, workdir))
    finally:
        grids.world(file.parent)
    after = grids.ended(workdir)
    assert "12 arms: 6 done, 2 failed, 4 to train in 1 packs" in out
    assert {arm: after[arm] for arm in before} == before and len(after) == 12
