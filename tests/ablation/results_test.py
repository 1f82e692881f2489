"""results.csv: types survive, columns stay in order, and no moment shows half a file."""

import csv
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.ablation import results
from lora_jax.errors import UserError

ROOT = Path(__file__).parents[2]
ROW = {"arm": "a1", "status": "done", "reason": None, "adapter.rank": 4, "seed": 0, "dev.accuracy": 0.1 + 0.2}


@pytest.mark.parametrize(
    "value",
    [None, 0, -7, 10**20, 0.1 + 0.2, 1e-300, -0.0, float("inf"), True, False, "last:4", "all", "4", "1e5", "true", "",
     "nan", "[q, k]", "[1]", '"', "a,b\r\nc", "007", [1, 4], ["q", "k"], [], {"q": 4}, [None, 0.5], "ü漢"],
)  # fmt: skip
def test_a_value_reads_back_as_it_was(tmp_path, value):
    results.write_results(tmp_path / "r.csv", [{**ROW, "extra": value}, {"arm": "a2", "status": "done"}])
    back = results.read_results(tmp_path / "r.csv")[0]["extra"]
    assert (type(back), back) == (type(value), value)
    assert not isinstance(value, float) or math.copysign(1, back) == math.copysign(1, value)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.floats(allow_nan=False), st.integers()))
def test_any_field_is_decoded_to_what_was_encoded(value):
    back = results.decode(results.encode(value))
    assert (type(back), back) == (type(value), value)


def test_nan_reads_back_as_nan(tmp_path):
    results.write_results(tmp_path / "r.csv", [{**ROW, "dev.loss": float("nan")}])
    assert math.isnan(results.read_results(tmp_path / "r.csv")[0]["dev.loss"])


def test_an_arm_of_digits_stays_a_text_without_quotes(tmp_path):
    results.write_results(
        tmp_path / "r.csv", [{"arm": "1e567890", "status": "failed", "reason": "NaN at step 3\n\ud800"}]
    )
    with open(tmp_path / "r.csv", newline="") as file:
        assert next(csv.DictReader(file))["arm"] == "1e567890"
    [row] = results.read_results(tmp_path / "r.csv")
    assert row == {"arm": "1e567890", "status": "failed", "reason": "NaN at step 3\n\\ud800"}


def test_columns_do_not_depend_on_which_arm_ended_first(tmp_path):
    failed = {"arm": "b", "status": "failed", "reason": "x", "adapter.rank": 1, "adapter.layers": "all", "seed": 1}
    done = {"seed": 0, "test.loss": 1.0, "note": "mine", "seconds": 2.0, "dev.accuracy": 0.5, "arm": "a",
            "status": "done", "reason": None, "trainable_params": 9, "adapter.rank": 4,
            "adapter.layers": "all"}  # fmt: skip
    expected = ["arm", "status", "reason", "adapter.rank", "adapter.layers", "seed", "trainable_params", "dev.accuracy",
                "test.loss", "seconds", "note"]  # fmt: skip
    assert results.columns([done, failed]) == results.columns([failed, done]) == expected
    assert results.columns([done], axes=["seed", "adapter.layers", "adapter.rank"])[3:6] == [
        "seed", "adapter.layers", "adapter.rank"]  # fmt: skip
    results.write_results(tmp_path / "r.csv", [done, failed])
    rows = results.read_results(tmp_path / "r.csv")
    assert rows[0]["note"] == "mine" and rows[1]["note"] is None
    results.write_results(tmp_path / "r2.csv", rows)
    assert (tmp_path / "r2.csv").read_bytes() == (tmp_path / "r.csv").read_bytes()


def test_an_arm_is_replaced_in_its_place():
    rows = [{"arm": "a", "n": 1}, {"arm": "b", "n": 2}]
    assert results.replaced(rows, {"arm": "a", "n": 3}) == [{"arm": "a", "n": 3}, {"arm": "b", "n": 2}]
    assert results.replaced(rows, {"arm": "c", "n": 3}) == [*rows, {"arm": "c", "n": 3}]


def test_a_broken_table_is_refused(tmp_path):
    file = tmp_path / "r.csv"
    file.write_text("arm,status\na,done\nb\n")
    with pytest.raises(UserError, match=r"r.csv line 3: 1 fields, the header has 2"):
        results.read_results(file)
    file.write_text("name,status\na,done\n")
    with pytest.raises(UserError, match="have the column 'arm', got \\['name', 'status'\\]"):
        results.read_results(file)
    file.write_text("arm,status\na,done\na,failed\n")
    with pytest.raises(UserError, match="the arm 'a' has 2 rows"):
        results.read_results(file)
    with pytest.raises(ValueError, match="an arm of its own"):
        results.write_results(file, [ROW, ROW])
    with pytest.raises(TypeError, match="got set"):
        results.write_results(file, [{**ROW, "x": {1}}])
    assert results.read_results(tmp_path / "absent.csv") == []


WRITE_FOREVER = """
import itertools, sys
from lora_jax.ablation import results
for n in itertools.count(1):
    rows = [{"arm": f"arm{i}", "status": "done", "reason": "x" * 500, "seed": i, "dev.accuracy": n} for i in range(400)]
    results.write_results(sys.argv[1], rows)
    if n == 1:
        print("ready", flush=True)
"""


def test_the_file_is_whole_whenever_the_writer_is_killed(tmp_path):
    """Killed at other moments each time, and read all the while."""
    file, versions = tmp_path / "results.csv", set()
    for pause in (0.01, 0.033, 0.071):
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        writer = subprocess.Popen([sys.executable, "-c", WRITE_FOREVER, str(file)], env=env, stdout=subprocess.PIPE)
        try:
            assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
            end = time.monotonic() + pause
            while True:
                rows = results.read_results(file)
                assert len(rows) == 400 and len({row["dev.accuracy"] for row in rows}) == 1
                versions.add(rows[0]["dev.accuracy"])
                if time.monotonic() > end:
                    break
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        rows = results.read_results(file)
        assert len(rows) == 400 and len({row["dev.accuracy"] for row in rows}) == 1
    assert len(versions) > 1, "the writer never wrote while it was read"
