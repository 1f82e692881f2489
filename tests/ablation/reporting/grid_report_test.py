"""The report of a grid: what is in it, what it says of unfinished and failed grids, and that it needs nothing else."""

import csv
import re
from html.parser import HTMLParser

import pytest

from lora_jax import records
from lora_jax.ablation.reporting import report
from lora_jax.errors import UserError
from tests import commands
from tests.ablation import worlds
from tests.ablation.worlds import M

BASE = {"adapter.rank": 8, "adapter.layers": "all"}


class Links(HTMLParser):
    """Collects what a page refers to, and checks that tags are closed."""

    def __init__(self, text):
        super().__init__()
        self.links, self.open, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in ("meta", "img", "link", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def page(path):
    found = Links((path / "report.html").read_text())
    return found, " ".join(" ".join(found.text).split())


def table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    worlds.write(folder, worlds.rows(worlds.RANK_GRID, worlds.rank_effect), base=BASE, seconds=7322, commit="abc1234",
                 question="Which <rank> & layers?", versions={"jax": "0.10.2"})  # fmt: skip
    return folder, report.write(folder)


def test_all_files_are_there_and_named(finished):
    folder, written = finished
    names = [str(path.relative_to(folder)) for path in written]
    assert names[:4] == ["report.html", "report.md", "groups.csv", "effects.csv"] and all(p.exists() for p in written)
    assert {"plots/rank.png", "plots/rank.csv", "plots/layers_by_rank.png", "plots/pareto.png"} < set(names)
    assert sorted(p.name for p in (folder / "plots").iterdir()) == sorted(p.name for p in written[4:])


def test_the_page_is_one_file_that_loads_nothing(finished):
    folder, written = finished
    found, _ = page(folder)
    assert not found.open, "every tag is closed"
    images = [path for path in written if path.suffix == ".png"]
    assert len([link for link in found.links if link.startswith("data:image/png;base64,")]) == len(images)
    assert all(link.startswith("data:") for link in found.links)
    assert not re.search(r"<script|@import|url\(|https?://", (folder / "report.html").read_text())


def test_the_page_says_what_was_asked_run_and_found(finished):
    folder, _ = finished
    _, text = page(folder)
    asked = ["Which <rank> & layers?", "python -m experiments.ablate --config=x.py"]
    ran = ["54 done", "2 h 2 min", "abc1234", "jax 0.10.2"]
    for part in [*asked, *ran, "Against the baseline rank=8, layers=all", "of 872 examples", "the baseline"]:
        assert part in text, part
    assert "+-" not in text and "\u00b1" in text
    assert "<rank>" not in (folder / "report.html").read_text(), "text is escaped"


def test_the_text_for_a_pull_request_has_the_table_and_the_verdicts_of_groups_csv(finished):
    folder, _ = finished
    text = (folder / "report.md").read_text()
    assert text.startswith("# Which <rank> & layers?\n\n```\npython -m experiments.ablate")
    lines = [line for line in text.splitlines() if line.startswith("| 4 | last:1 | 12,288 |")]
    [row] = [r for r in table(folder / "groups.csv") if r["group"] == "rank=4, layers=last:1" and r["metric"] == M]
    verdict = row["verdict"].replace(" after Holm over 17 comparisons", "").replace("+-", "\u00b1")
    assert len(lines) == 1 and lines[0].endswith(f"| {verdict} |") and row["baseline"] == "rank=8, layers=all"
    for name in re.findall(r"\]\((plots/[^)]*)\)", text):
        assert (folder / name).exists()
    body = text[text.index("## All groups") :]
    assert len({line.count(" | ") for line in body.splitlines() if line.startswith("| ")}) == 1, (
        "a row for every column"
    )
    assert [r["metric"] for r in table(folder / "groups.csv")][::18] == [M, "dev.loss", "seconds"]
    assert len(table(folder / "effects.csv")) == 7


def test_methods_are_compared_at_their_best_and_by_the_test_split(tmp_path):
    rows = worlds.rows(worlds.METHOD_GRID, worlds.method_effect, test=True)
    worlds.write(tmp_path, rows, base={"adapter.method": "lora", "train.learning_rate": 3e-4})
    report.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    part = text[text.index("## Each choice at its best learning rate") : text.index("All 40 groups")]
    lines = {line.split(" | ")[0][2:]: line for line in part.splitlines() if line.startswith("| ")}
    assert len(lines) == 11 and "| 0.001 | 4 | 3 |" in lines["lora"] and "| the baseline |" in lines["lora"]
    assert "| 0.0003 (lowest) |" in lines["full"] and "| 0.01 (highest) |" in lines["ia3"]
    assert list(lines)[-1] == "head", "the best choice first"
    assert "worse by 0.1" in lines["head"] and "test.accuracy" in lines["choice"]
    assert "Against the baseline method=lora" in text and "WARNING" in text and "compared by test.accuracy" in text
    assert "| a0021 | full | 0.01 | 0 | failed | diverged: the loss is NaN at step 12 |" in text
    base = {row["baseline"] for row in table(tmp_path / "groups.csv") if row["metric"] == M} - {""}
    assert base == {"method=lora, learning_rate=0.001"}, "the table of all groups compares with the same arms"
    report.write(tmp_path, baseline={"adapter.method": "full", "train.learning_rate": 1e-2})
    assert "Against the baseline method=full" in (tmp_path / "report.md").read_text()


def test_the_baseline_is_what_was_asked_for_else_the_config_else_the_first(tmp_path):
    rows = worlds.rows(worlds.cells(adapter__rank=[1, 4, 8], seed=range(3)), lambda c: 0.8)
    four, eight, absent = ({"adapter.rank": rank} for rank in (4, 8, 64))
    for base, given, found in (({}, None, 1), (eight, None, 8), (eight, four, 4), (absent, None, 1),
                               ({"model.path": "x", **four}, "rank=8", 8)):  # fmt: skip
        worlds.write(tmp_path, rows, base=base, curves=False)
        report.write(tmp_path, baseline=given)
        assert f"Against the baseline rank={found} " in (tmp_path / "report.md").read_text()
    with pytest.raises(UserError, match="no groups are {'adapter.rank': 3}"):
        report.write(tmp_path, baseline={"adapter.rank": 3})


def test_a_grid_without_grid_json_or_curves_or_seeds_still_has_a_report(tmp_path):
    rows = worlds.rows(worlds.cells(adapter__rank=[1, 4], seed=[0]), lambda c: 0.8)
    worlds.write(tmp_path, rows, curves=False)
    (tmp_path / "grid.json").unlink()
    report.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert (
        text.startswith(f"# {tmp_path.name}\n")
        and "at least 2 seeds" in text
        and "how many there are is not known" in text
    )
    records.write_jsonl(tmp_path / "runs" / "a0000" / "predictions" / "dev.jsonl", [{"id": i} for i in range(50)])
    report.write(tmp_path)
    assert "of 50 examples one is 0.02" in (tmp_path / "report.md").read_text()


def test_unfinished_and_failed_grids_say_so(tmp_path):
    rows = worlds.rows(worlds.cells(adapter__rank=[1, 4], seed=range(2)), lambda c: None)
    worlds.write(tmp_path, rows)
    written = report.write(tmp_path)
    assert len(written) == 4 and "Nothing yet" in page(tmp_path)[1] and "diverged: the loss is NaN" in page(tmp_path)[1]
    worlds.write(tmp_path, worlds.rows(worlds.RANK_GRID, worlds.rank_effect)[:30])
    about = records.read_json(tmp_path / "grid.json")
    about["arms"] += [{"id": f"later{i}", "label": "", "axes": {}} for i in range(24)]
    records.write_json(tmp_path / "grid.json", about)
    report.write(tmp_path)
    assert "30 done, 24 not run" in page(tmp_path)[1] and "24 arms of the grid have not run" in page(tmp_path)[1]


def test_rows_of_arms_that_have_not_run_are_no_failures(tmp_path):
    rows = worlds.rows(worlds.cells(adapter__rank=[1, 4], seed=range(3)), lambda c: None if c["seed"] == 2 else 0.8)
    for row in rows:
        row |= {"status": "missing", "reason": None} if row["status"] == "failed" else {}
    worlds.write(tmp_path, rows, curves=False)
    report.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert (
        "4 done, 2 not run" in text and "failed" not in text and "left out" not in text and "2 seeds a choice" in text
    )
    worlds.write(tmp_path, [{**row, "status": "missing"} for row in rows], curves=False)
    report.write(tmp_path)
    assert "0 done, 6 not run" in (tmp_path / "report.md").read_text()


def test_figures_of_an_earlier_report_are_not_left_behind(tmp_path):
    worlds.write(tmp_path, worlds.rows(worlds.RANK_GRID, worlds.rank_effect), curves=False)
    report.write(tmp_path)
    worlds.write(tmp_path, worlds.rows(worlds.cells(adapter__rank=[4], seed=[0, 1]), lambda c: 0.8), curves=False)
    (tmp_path / "plots" / "mine.txt").write_text("kept")
    report.write(tmp_path)
    assert [p.name for p in (tmp_path / "plots").iterdir()] == ["mine.txt"]


def test_a_column_that_is_no_axis_tells_nothing_apart(tmp_path):
    rows = worlds.rows(worlds.cells(adapter__rank=[1, 4], seed=range(3)), lambda c: 0.8)
    for i, row in enumerate(rows):
        row["best.step"] = i
    worlds.write(tmp_path, rows, axes=["adapter.rank", "seed"], curves=False)
    report.write(tmp_path)
    assert [row["n"] for row in table(tmp_path / "groups.csv")][:2] == ["3", "3"]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="has no results.csv with an arm in it: run experiments.ablate there first"):
        report.write(tmp_path)
    worlds.write(tmp_path, worlds.rows(worlds.cells(adapter__rank=[1], seed=[0]), lambda c: 0.8), curves=False)
    with pytest.raises(UserError, match="no arm has the metric 'dev.acuracy'; did you mean 'dev.accuracy'"):
        report.write(tmp_path, metric="dev.acuracy")


def test_the_command(tmp_path, capsys):
    worlds.write(tmp_path, worlds.rows(worlds.cells(adapter__rank=[1, 4], seed=range(3)), lambda c: 0.8), curves=False)
    ended = commands.command(
        capsys, "report", f"--workdir={tmp_path}", "--baseline=adapter.rank=4", "--metric=dev.loss"
    )
    assert (
        ended.code == 0 and "Against the baseline rank=4" in ended.out and f"open {tmp_path}/report.html" in ended.out
    )
    assert "dev loss; less is better" in ended.out
    for wrong, message in (
        (
            "--baseline=rank=4",
            "--baseline=rank=4: expected AXIS=VALUE with an axis of the grid; did you mean 'adapter.rank'",
        ),
        ("--baseline=adapter.rank", "expected AXIS=VALUE"),
        ("--config.seed=3", "takes no --config"),
        (f"--workdir={tmp_path}/none", "has no results.csv"),
    ):
        ended = commands.command(capsys, "report", f"--workdir={tmp_path}", wrong)
        assert ended.code == 2 and message in ended.err and ended.err.count("\n") == 1
