"""Every mistake that a user is likely to make: exit code 2, one message that helps, no traceback, nothing written."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import commands

ROOT = Path(__file__).parents[1]
PAIRS = [{"prompt": f"count {i}", "completion": f"{i} and {i + 1}"} for i in range(8)]
CLASSES = [{"text": f"word {i}", "label": "even" if i % 2 == 0 else "odd"} for i in range(8)]
SMALL = ("--config.train.steps=2", "--config.train.batch_size=4", "--config.train.eval_batch_size=4")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return commands.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return commands.write(tmp_path_factory.mktemp("pairs"), train=PAIRS, dev=PAIRS[:3])


@pytest.fixture
def fails(capsys, tmp_path, model, pairs):
    """Runs experiments.train with a mistake; returns the message after checking how it ended."""

    def run(*arguments: str, model_path=model, data_path=pairs) -> str:
        folder = tmp_path / "run"
        ended = commands.command(
            capsys, "train", f"--workdir={folder}", f"--config.model.path={model_path}",
            f"--config.data.path={data_path}", *SMALL, *arguments,
        )  # fmt: skip
        assert ended.code == 2, ended
        assert ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended.err
        assert "Traceback" not in ended.err + ended.out
        assert not folder.exists(), "a start that failed must not claim its work directory"
        return ended.err

    return run


CLASSIFY = "--config.task.name=classification"


def test_missing_file(fails, pairs, tmp_path):
    message = fails(data_path=tmp_path / "nowhere.jsonl")
    assert "nowhere.jsonl" in message
    shutil.copy(pairs / "train.jsonl", tmp_path / "pears.jsonl")
    message = fails(data_path=tmp_path / "pairs.jsonl")
    assert "pairs.jsonl" in message and "pears.jsonl" in message


def test_broken_json_line(fails, tmp_path):
    text = '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion"\n'
    message = fails(data_path=commands.write(tmp_path / "d", train=text, dev=PAIRS))
    assert "train.jsonl line 2" in message


def test_record_without_the_field(fails, tmp_path):
    rows = [*PAIRS, {"question": "a", "completion": "b"}]
    message = fails(data_path=commands.write(tmp_path / "d", train=rows, dev=PAIRS))
    assert "train.jsonl line 9" in message and "{prompt}" in message and "question" in message


def test_field_that_no_record_has(fails):
    message = fails("--config.data.fields.prompt=promt")
    assert "promt" in message and "prompt" in message


def test_empty_split(fails, tmp_path):
    message = fails(data_path=commands.write(tmp_path / "d", train="", dev=PAIRS))
    assert "train" in message


def test_one_class_only(fails, tmp_path):
    rows = [{"text": "a", "label": "same"}] * 4
    message = fails(CLASSIFY, data_path=commands.write(tmp_path / "d", train=rows, dev=rows))
    assert "at least two classes" in message and "same" in message


def test_label_of_dev_unseen_in_train(fails, tmp_path):
    dev = [*CLASSES[:2], {"text": "b", "label": "prime"}]
    message = fails(CLASSIFY, data_path=commands.write(tmp_path / "d", train=CLASSES, dev=dev))
    assert "dev.jsonl line 3" in message and "'prime'" in message and "even, odd" in message


def test_pattern_that_matches_no_site(fails):
    message = fails(r"--config.adapter.targets=.*/q_porj/kernel")
    assert "'.*/q_porj/kernel' matches none" in message and "/self_attn/q_proj/kernel" in message


def test_rank_zero(fails):
    assert "rank 0 everywhere" in fails("--config.adapter.rank=0")


def test_rank_above_the_smaller_side(fails):
    message = fails("--config.adapter.rank=17", "--config.adapter.targets=q")
    assert "17" in message and "16" in message and "q_proj" in message


def test_layer_that_the_model_does_not_have(fails):
    assert "2 layers" in fails("--config.adapter.layers=last:3")


def test_unknown_names(fails):
    assert "did you mean 'lora'" in fails("--config.adapter.method=lroa")
    assert "did you mean 'classification'" in fails("--config.task.name=clasification")
    assert "did you mean 'train.steps'" in fails("--config.train.step=3")


def test_unknown_model_type(fails, model, tmp_path):
    other = shutil.copytree(model, tmp_path / "m")
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace('"llama"', '"lama"'))
    message = fails(model_path=other)
    assert "'lama'" in message and "llama" in message


def test_wrong_type_in_an_override(fails):
    assert "--config.train.steps=many: expected an integer" in fails("--config.train.steps=many")


def test_model_that_does_not_exist(fails, tmp_path):
    assert "no directory" in fails(model_path=tmp_path / "none")


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("config.json", "config.json"),
        ("model.safetensors", "model.safetensors"),
        ("tokenizer.json", "has no tokenizer"),
    ],
)
def test_incomplete_model_directory(fails, model, tmp_path, removed, message):
    other = shutil.copytree(model, tmp_path / "m")
    (other / removed).unlink()
    text = fails(model_path=other)
    assert message in text and str(other) in text


def test_truncated_weights(fails, model, tmp_path):
    other = shutil.copytree(model, tmp_path / "m")
    file = other / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors" in fails(model_path=other)


def test_more_mesh_devices_than_there_are(fails):
    message = fails("--config.mesh.fsdp=64")
    assert "mesh.fsdp=64" in message and "64 devices" in message and "there are 8" in message


def test_batch_that_does_not_divide(fails):
    message = fails("--config.mesh.data=3")
    assert "train.batch_size=4 does not divide by 3" in message and "3 or 6" in message


def test_workdir_is_needed(capsys):
    ended = commands.command(capsys, "train")
    assert ended.code == 2 and "--workdir=DIR is needed" in ended.err


def test_workdir_that_is_a_file(capsys, tmp_path):
    (tmp_path / "f").write_text("")
    ended = commands.command(capsys, "train", f"--workdir={tmp_path / 'f'}")
    assert ended.code == 2 and "is a file" in ended.err


def test_workdir_of_another_config(capsys, tmp_path, model, pairs):
    world = (f"--config.model.path={model}", f"--config.data.path={pairs}", *SMALL, f"--workdir={tmp_path}")
    first = commands.command(capsys, "train", *world)
    assert first.code == 0, first.err
    kept = (tmp_path / "summary.json").read_bytes()
    ended = commands.command(capsys, "train", *world, "--config.adapter.rank=3", "--config.seed=1")
    assert ended.code == 2
    assert "adapter.rank is None there and 3 here; seed is 0 there and 1 here" in ended.err
    assert (tmp_path / "summary.json").read_bytes() == kept
    again = commands.command(capsys, "train", *world, "--config.train.log_every=1", "--config.generate.show=1")
    assert again.code == 0 and "nothing to do" in again.out
    assert (tmp_path / "summary.json").read_bytes() == kept

    ended = commands.command(capsys, "evaluate", f"--workdir={tmp_path}", "--split=tset")
    assert ended.code == 2 and "did you mean 'test'" in ended.err
    ended = commands.command(capsys, "evaluate", f"--workdir={tmp_path}", "--split=test")
    assert ended.code == 2 and "no split 'test'; it has train, dev" in ended.err
    ended = commands.command(capsys, "evaluate", f"--workdir={tmp_path}", "--config.adapter.rank=3")
    assert ended.code == 2 and "adapter.rank is None there and 3 here" in ended.err
    ended = commands.command(capsys, "generate", f"--workdir={tmp_path}")
    assert ended.code == 2 and "--prompt='...' is needed" in ended.err
    ended = commands.command(capsys, "export", f"--workdir={tmp_path}", "--format=pfet")
    assert ended.code == 2 and "did you mean 'peft'" in ended.err
    ended = commands.command(capsys, "export", f"--workdir={tmp_path}", "--format=hf", f"--out={tmp_path}")
    assert ended.code == 2 and "not an empty directory" in ended.err

    (tmp_path / "summary.json").unlink()
    ended = commands.command(capsys, "evaluate", f"--workdir={tmp_path}")
    assert ended.code == 2 and "is not finished" in ended.err
    (tmp_path / "config.json").write_text("{")
    ended = commands.command(capsys, "evaluate", f"--workdir={tmp_path}")
    assert ended.code == 2 and "not finished" in ended.err
    ended = commands.command(capsys, "evaluate", f"--workdir={tmp_path / 'nowhere'}")
    assert ended.code == 2 and "there is no such directory" in ended.err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.train.stpes=3", "did you mean 'train.steps'"),
        ("--config.data.path=/no/such/file.jsonl", "/no/such/file.jsonl"),
    ],
)
def test_a_real_process(tmp_path, argument, message):
    line = [sys.executable, "-m", "experiments.train", f"--workdir={tmp_path / 'run'}", argument]
    ended = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert message in ended.stderr and "Traceback" not in ended.stderr + ended.stdout
    assert not (tmp_path / "run").exists()
