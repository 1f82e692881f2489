"""What the table says of measurements: medians, ratios the right way round, targets, and what does not count."""

import pytest

from experiments.benchmarks import table
from experiments.benchmarks.row import Claim, Row, unit
from lora_jax.errors import UserError


def found(**sides):
    """Measurements of the row `r`: side=[value of repeat 0, 1, ...]; None leaves one out."""
    return [
        one
        for side, values in sides.items()
        for repeat, value in enumerate(values)
        if value is not None
        for one in table.measurements("r", side, repeat, {"x_seconds": value}, {"a": 1}, {"jax": "1"}, "2026-01-01")
    ]


def line(claim, measured, judge=True):
    lines = table.table({"r": Row((), (claim,))}, measured, judge)
    return dict(zip(table.HEAD, lines[1]))


MEASURED = found(ours=[99, 2.0, 1.0, 4.0], peft=[None, 6.0, 8.0, 4.0])


@pytest.mark.parametrize(
    ("better", "ratio", "spread"),
    [("lower", "3", "1 to 8"), ("higher", "0.333", "0.125 to 1"), ("share", "0.333", "0.125 to 1")],
)
def test_ratio_of_medians_and_range_of_pairs(better, ratio, spread):
    """Medians are 2 and 6; the run that warmed up (99) does not count."""
    shown = line(Claim("x", "x_seconds", other="peft", better=better), MEASURED)
    assert (shown["ratio"], shown["range"]) == (ratio, spread)
    assert (shown["value"], shown["its value"], shown["n"]) == ("2 s", "6 s", "3/3")


@pytest.mark.parametrize(
    ("claim", "reached"),
    [
        (Claim("x", "x_seconds", other="peft", better="lower", target=(">=", 3.0)), "yes"),
        (Claim("x", "x_seconds", other="peft", better="lower", target=(">=", 3.1)), "no"),
        (Claim("x", "x_seconds", other="peft", better="share", target=("<=", 0.3)), "no"),
        (Claim("x", "x_seconds", target=("<=", 2.0)), "yes"),
        (Claim("x", "x_seconds", target=("<=", 1.9)), "no"),
        (Claim("x", "x_seconds"), ""),
    ],
)
def test_targets(claim, reached):
    assert line(claim, MEASURED)["reached"] == reached
    assert line(claim, MEASURED, judge=False)["reached"] == "", "toy sizes are never judged"


def test_a_side_without_a_number_is_said_and_not_judged():
    shown = line(Claim("x", "x_seconds", other="peft", target=(">=", 0.0)), found(ours=[None, 1.0]))
    assert (shown["its value"], shown["ratio"], shown["reached"]) == ("not measured", "", "")


def test_a_row_without_measurements_has_no_lines():
    assert table.table({"other": Row((), (Claim("x", "y"),))}, MEASURED, True) == [table.HEAD]


def test_csv_round_trip(tmp_path):
    table.write(tmp_path / "cpu.csv", MEASURED)
    assert table.read(tmp_path / "cpu.csv") == MEASURED
    head, first, *_ = (tmp_path / "cpu.csv").read_text().splitlines()
    assert head == "row,side,repeat,name,value,unit,settings,versions,date" and ",99.0,s," in first
    assert table.read(tmp_path / "none.csv") == []
    (tmp_path / "wrong.csv").write_text("a,b\n")
    with pytest.raises(UserError, match="wrong.csv is not a CSV of this benchmark"):
        table.read(tmp_path / "wrong.csv")


def test_the_table_goes_between_the_markers_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    begin, end = table.BEGIN.format("cpu"), table.END.format("cpu")
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    table.fill(
        page, "cpu", table.markdown(table.table({"r": Row((), (Claim("a|b", "x_seconds"),))}, MEASURED, True), ["so"])
    )
    text = page.read_text()
    assert text.startswith(f"before\n{begin}\n") and text.endswith(f"{end}\nafter\n") and "old" not in text
    assert "| r | a/b | ours | 2 s |" in text and "* so" in text
    with pytest.raises(UserError, match="expected a page with the lines '<!-- gpu:"):
        table.fill(page, "gpu", "")


@pytest.mark.parametrize(
    ("name", "word"),
    [("tokens_per_second", "tokens/s"), ("new_tokens_per_second", "tokens/s"), ("wall_seconds", "s"),
     ("max_rss_bytes", "bytes"), ("weight_bits", "bits"), ("dev_accuracy", "1")],
)  # fmt: skip
def test_units(name, word):
    assert unit(name) == word
