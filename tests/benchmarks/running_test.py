"""How sides are run: in turns, each in a process of its own, alike; what becomes of one that fails or is not here."""

import dataclasses
import json
import os
import resource
import sys

import pytest

from experiments.benchmarks import processes
from experiments.benchmarks.processes import Machine
from experiments.benchmarks.row import Claim, Plan, Row, Side
from experiments.benchmarks.running import Bench
from lora_jax.errors import UserError

MACHINE = Machine(threads=1, huge_pages=True, accelerator=False, minutes=1)
# Writes what the process sees, and a line into a file that all processes of a test share.
SEES = """
import json, os, pathlib, sys
cache = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]); known = cache.exists(); cache.mkdir(exist_ok=True)
with open(sys.argv[1], "a") as file: file.write(sys.argv[2] + " ")
pathlib.Path(os.environ["BENCHMARK_RESULT"]).write_text(json.dumps({
    "cores": len(os.sched_getaffinity(0)), "threads": int(os.environ["OMP_NUM_THREADS"]), "known": known,
    "own": cache in pathlib.Path(os.environ["XDG_CACHE_HOME"]).parents,
    "huge": "hugetlb=1" in os.environ.get("GLIBC_TUNABLES", ""), "cpu": os.environ.get("JAX_PLATFORMS") == "cpu"}))
"""


def side(name, code, *arguments, **fields):
    return Side(name, (sys.executable, "-c", code, *map(str, arguments)), {"work": "same"}, **{"needs": (), **fields})


def bench(tmp_path, *sides, repeats=2, names=None, machine=MACHINE):
    row = Row(sides, (Claim("x", "x", sides[0].name),))
    return Bench({"row": row}, machine, tmp_path / "cpu.csv", repeats, names, Plan(True, "no data", "no model"))


def values(found, name, **where):
    return [one.value for one in found if one.name == name and all(getattr(one, k) == v for k, v in where.items())]


def test_sides_take_turns_and_get_the_same_machine(tmp_path):
    turns = tmp_path / "turns"
    one = bench(tmp_path, side("a", SEES, turns, "a{repeat}", warm=True), side("b", SEES, turns, "b{repeat}"))
    one.run(["row"])
    assert turns.read_text().split() == ["a0", "a1", "b1", "a2", "b2"]
    for name, value in (("cores", 1), ("threads", 1), ("huge", 1), ("cpu", 1), ("own", 1)):
        assert values(one.found, name) == [value] * 5
    assert values(one.found, "known", side="a") == [0, 1, 1], "what a warm side compiled is kept"
    assert values(one.found, "known", side="b") == [0, 0], "and of any other not"
    assert all(seconds > 0 for seconds in values(one.found, "wall_seconds")) and not one.failed
    assert json.loads(one.found[0].settings) == {"work": "same", "threads": 1, "huge_pages": True, "toy": True}


def test_threads_and_huge_pages_can_be_changed(tmp_path):
    cores = len(os.sched_getaffinity(0))
    one = bench(tmp_path, side("a", SEES, tmp_path / "turns", "a"), repeats=1, machine=Machine(cores, False, True, 1))
    before = os.environ.get("JAX_PLATFORMS")
    one.run(["row"])
    assert values(one.found, "cores") == [cores] and values(one.found, "huge") == [0]
    assert values(one.found, "cpu") == [before == "cpu"], "an accelerator is not hidden"
    assert len(os.sched_getaffinity(0)) == cores, "this process keeps its own"


def test_the_memory_of_a_process_is_measured(tmp_path):
    # A process counts what its parent held when it was started, so it must hold more to be seen.
    least = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + 100_000_000
    one = bench(tmp_path, side("big", f"x = b'x' * {least}"), side("small", ""), repeats=1)
    one.run(["row"])
    big, small = (values(one.found, "max_rss_bytes", side=name)[0] for name in ("big", "small"))
    assert least <= big < 1.2 * least and small < least


def test_a_side_that_fails_is_said_once_and_the_others_go_on(tmp_path):
    one = bench(tmp_path, side("a", "print('first'); raise SystemExit('no luck')"), side("b", ""))
    one.run(["row"])
    assert one.failed == ["row, a: no luck"] and not one.absent
    assert len(values(one.found, "wall_seconds", side="b")) == 2
    assert "FAILED: row, a: no luck" in one.said()
    assert one.table()[1][3] == "not measured"


def test_what_is_not_here_is_no_failure(tmp_path):
    lacks = side("a", f"print('no CUDA here'); raise SystemExit({processes.ABSENT})")
    one = bench(tmp_path, lacks, side("b", "", needs=("no_such_package",)), repeats=1)
    one.run(["row"])
    assert not one.failed
    assert sorted(one.absent) == ["row, a: no CUDA here", "row, b: no_such_package not installed (the extra `peers`)"]


def test_a_process_that_takes_too_long_is_stopped(tmp_path):
    slow = side("a", "import time; time.sleep(60)")
    one = bench(tmp_path, slow, repeats=1, machine=MACHINE._replace(minutes=0.005))
    one.run(["row"])
    assert "longer than 0.005 minutes" in one.failed[0]


def test_results_that_cannot_be_read_are_a_failure(tmp_path):
    one = bench(tmp_path, side("a", "", read=lambda scratch, seconds: json.loads((scratch / "no").read_text())))
    one.run(["row"])
    assert len(one.failed) == 1 and "its results cannot be read" in one.failed[0]


def test_earlier_rows_stay_and_measured_sides_are_replaced(tmp_path):
    write = "import json, os; open(os.environ['BENCHMARK_RESULT'], 'w').write(json.dumps({'x': %d}))"
    first = bench(tmp_path, side("a", write % 1), side("b", write % 2), repeats=1)
    first.run(["row"])
    again = bench(tmp_path, side("a", write % 3), side("b", write % 4), repeats=1, names=["a"])
    again.run(["row"])
    assert values(again.found, "x", side="a") == [3] and values(again.found, "x", side="b") == [2]
    assert bench(tmp_path, side("a", ""), side("b", "")).found == again.found, "the CSV has it"


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="--sides=ourz: no row has such a side; did you mean 'ours'"):
        bench(tmp_path, side("ours", ""), names=["ourz"])
    needy = dataclasses.replace(side("ours", ""), settings={"data": "no data"})
    with pytest.raises(UserError, match="the rows row need sst2, and no data has no train.jsonl: give --data=DIR"):
        bench(tmp_path, needy).run(["row"])
