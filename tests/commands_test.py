"""The commands on a small world, end to end: what one writes, the next one reads."""

import contextlib
import io
import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax.analyze import analyze
from lora_jax.export import load_peft
from lora_jax.models import load_pretrained
from tests import commands

PAIRS = [{"prompt": f"count {i % 4}", "completion": f"{i % 4} and {i % 4 + 1}"} for i in range(16)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Flags of a run that has something to learn, and its work directory."""
    folder = tmp_path_factory.mktemp("world")
    model = commands.make_model(folder / "model")
    data = commands.write(folder / "data", train=PAIRS, dev=PAIRS[:4], test=PAIRS[4:7])
    flags = (
        f"--config.model.path={model}", f"--config.data.path={data}", "--config.train.steps=30",
        "--config.train.batch_size=8", "--config.train.eval_batch_size=4", "--config.train.learning_rate=0.02",
        "--config.train.schedule=constant", "--config.adapter.rank=4", "--config.generate.score=2",
        "--config.generate.max_new_tokens=8",
    )  # fmt: skip
    return (*flags, f"--workdir={folder / 'run'}"), folder / "run"


@pytest.fixture(scope="module")
def trained(world):
    """The finished run and what it printed."""
    flags, folder = world
    return folder, finished("train", *flags)


@pytest.fixture(scope="module")
def evaluated(trained):
    """The finished run, evaluated on its test split."""
    folder, _ = trained
    finished("evaluate", f"--workdir={folder}", "--split=test")
    return folder


def finished(name, *arguments):
    """What a command that must end well printed. (Fixtures of a module have no capsys.)"""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        ended = commands.run(name, *arguments)
    assert ended == 0, err.getvalue()
    return out.getvalue()


def test_train_shows_and_writes(trained):
    folder, out = trained
    shown = ["what trains", "first output equals the base's exactly", "learned", "before training", "after training"]
    for part in [*shown, "exact match", f"experiments.evaluate --workdir={folder}"]:
        assert part in out, part
    files = ["config.json", "manifest.json", "metrics.jsonl", "summary.json", "predictions", "checkpoints", "adapter"]
    assert {p.name for p in folder.iterdir()} >= set(files)
    assert (folder / "adapter" / "adapter_config.json").exists(), "PEFT has lora, so its format is written"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["step"] == 30 and summary["saved"] == "last"
    config = json.loads((folder / "config.json").read_text())
    assert config["adapter"]["rank"] == 4 and config["train"]["steps"] == 30
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["overrides"]["adapter.rank"] == 4


def test_training_improved_dev(trained):
    _, out = trained
    line = next(x for x in out.splitlines() if x.strip().startswith("loss ") and "->" in x)
    before, after = (float(x) for x in line.split("loss")[1].split("->"))
    assert after < before - 0.5


def test_evaluate_finds_the_same_numbers(evaluated):
    folder = evaluated
    summary = json.loads((folder / "summary.json").read_text())
    found = json.loads((folder / "evaluation" / "test.json").read_text())
    assert found["examples"] == 3
    assert found["loss"] == pytest.approx(summary["test"]["loss"], rel=1e-6)
    assert 0 <= found["exact_match"] <= 1 and found["bleu"] >= 0
    rows = [json.loads(line) for line in (folder / "evaluation" / "test.jsonl").read_text().splitlines()]
    assert [row["references"] for row in rows] == [[p["completion"]] for p in PAIRS[4:7]]


def test_generate_uses_the_adapter_and_the_template(evaluated, capsys):
    folder = evaluated
    ended = commands.command(capsys, "generate", f"--workdir={folder}", "--prompt=count 1", "--prompt=count 2")
    assert ended.code == 0, ended.err
    rows = [json.loads(line) for line in (folder / "evaluation" / "test.jsonl").read_text().splitlines()]
    known = {row["prompt"]: row["text"] for row in rows}
    assert known["count 1"] != ""
    assert ended.out.removesuffix("\n").split("\n") == [known["count 1"], known["count 2"]]


def test_export_to_peft(trained, capsys, tmp_path):
    folder, _ = trained
    ended = commands.command(capsys, "export", f"--workdir={folder}", "--format=peft", f"--out={tmp_path / 'peft'}")
    assert ended.code == 0, ended.err
    ours, theirs = (load_file(d / "adapter_model.safetensors") for d in (folder / "adapter", tmp_path / "peft"))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_export_merged(trained, capsys, tmp_path):
    folder, _ = trained
    out = tmp_path / "merged"
    ended = commands.command(capsys, "export", f"--workdir={folder}", "--format=hf", f"--out={out}")
    assert ended.code == 0, ended.err
    merged = load_pretrained(out)
    base = load_pretrained(json.loads((folder / "config.json").read_text())["model"]["path"])
    assert merged.fingerprint != base.fingerprint
    assert merged.tokenizer.get_vocab() == base.tokenizer.get_vocab()


def test_analyze_tells_what_was_trained(trained, capsys):
    folder, _ = trained
    ended = commands.command(capsys, "analyze", f"--workdir={folder}", "--references", f"--against={folder}")
    assert ended.code == 0, ended.err
    base = load_pretrained(json.loads((folder / "config.json").read_text())["model"]["path"])
    adapter, delta = load_peft(folder / "adapter", base)
    report = analyze(adapter, delta, base.variables, base.sites, references=True)
    rows = [json.loads(line) for line in (folder / "analysis" / "updates.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == list(delta) and len(rows) == 14
    assert [row["norm"] for row in rows] == [row.norm for row in report.rows] and min(
        row.norm for row in report.rows
    ) > 0
    assert str(report) in ended.out, "the table with its references"
    assert "directions shared" in ended.out
    pairs = [json.loads(line) for line in (folder / "analysis" / "against.jsonl").read_text().splitlines()]
    assert [row["path"] for row in pairs] == list(delta)
    assert all(row["all_in"] == pytest.approx(1) for row in pairs), "the run is like itself"


def test_analyze_against_what_is_no_run(trained, capsys, tmp_path):
    folder, _ = trained
    for wrong, message in (
        (tmp_path, "is not the directory of a run"),
        (tmp_path / "x", "--against=.*no such directory"),
    ):
        ended = commands.command(capsys, "analyze", f"--workdir={folder}", f"--against={wrong}")
        assert ended.code == 2 and re.search(message, ended.err) and ended.err.count("\n") == 1


def test_classification(capsys, tmp_path, world):
    rows = [{"text": f"word {i}", "label": "even" if i % 2 == 0 else "odd"} for i in range(8)]
    data = commands.write(tmp_path / "data", train=rows, dev=rows)
    flags = [f for f in world[0] if "workdir" not in f and "data.path" not in f and "steps" not in f]
    flags += [f"--config.data.path={data}", "--config.task.name=classification", "--config.train.steps=1"]
    folder = tmp_path / "run"
    ended = commands.command(capsys, "train", *flags, f"--workdir={folder}")
    assert ended.code == 0, ended.err
    assert "score/kernel" in ended.out and "lora, rank 4" in ended.out
    ended = commands.command(capsys, "evaluate", f"--workdir={folder}", "--split=dev")
    assert ended.code == 0, ended.err
    summary = json.loads((folder / "summary.json").read_text())
    found = json.loads((folder / "evaluation" / "dev.json").read_text())
    assert found["loss"] == pytest.approx(summary["dev"]["loss"]), "the saved adapter holds the head"
    assert found["accuracy"] == summary["dev"]["accuracy"]
    ended = commands.command(capsys, "generate", f"--workdir={folder}", "--prompt=x")
    assert ended.code == 2 and "generates no text" in ended.err
