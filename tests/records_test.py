"""Records, writers, the manifest, progress lines, and what ends a run."""

import json
import math
import os
import signal
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import UserError, manifest, progress, records
from lora_jax.stopping import Best, Diverged, Interrupted, Signals


def test_plain_json_of_what_a_run_holds(tmp_path):
    records.write_json(
        tmp_path / "deep" / "x.json", {"a": np.float32(0.5), "b": math.nan, "c": (jnp.int32(3), tmp_path)}
    )
    assert records.read_json(tmp_path / "deep" / "x.json") == {"a": 0.5, "b": None, "c": [3, str(tmp_path)]}
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    records.write_json(tmp_path / "x.json", 1)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        records.write_json(tmp_path / "x.json", 2)
    assert records.read_json(tmp_path / "x.json") == 1


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = records.MetricsFile(path, lambda r: True)
    for step in (1, 2, 3):
        first.write({"step": step, "split": "train", "loss": jnp.float32(step)})
    first.close()
    with open(path, "a") as file:
        file.write('{"step": 4, "spl')  # a crash in the middle of a line
    again = records.MetricsFile(path, lambda r: r["step"] <= 2)
    again.write({"step": 3, "split": "train", "loss": 9.0})
    again.close()
    assert [r["loss"] for r in records.read_jsonl(path)] == [1.0, 2.0, 9.0]


def test_a_missing_writer_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"tensorboardX, which is not installed: pip install 'lora_jax\[tensorboard\]'"):
        records.make_writers(["tensorboard"], tmp_path)
    with pytest.raises(UserError, match=r"pip install 'lora_jax\[wandb\]', or set log.wandb to false"):
        records.make_writers(["wandb"], tmp_path)
    with pytest.raises(UserError, match="no writer 'tensorbord'; did you mean 'tensorboard'"):
        records.make_writers(["tensorbord"], tmp_path)


def test_tensorboard_writes_event_files(tmp_path):
    pytest.importorskip("tensorboardX")
    (writer,) = records.make_writers(["tensorboard"], tmp_path)
    writer.write({"step": 1, "split": "dev", "loss": 0.5, "note": "text is left out"})
    writer.close()
    assert any(p.stat().st_size for p in (tmp_path / "tensorboard").iterdir())


def test_wandb_works_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (writer,) = records.make_writers(["wandb"], tmp_path, {"seed": 0})
    writer.write({"step": 1, "split": "dev", "loss": 0.5})
    writer.close()
    assert list((tmp_path / "wandb").rglob("*.wandb"))


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_writers_send_each_number_under_its_split(tmp_path, monkeypatch, name):
    """With a recorder in the package's place: what reaches it, not how it is stored."""
    sent = {}

    class Recorder:
        def __init__(self, *_, **__): ...
        def add_scalar(self, key, value, step):
            sent[key] = (value, step)

        def log(self, values, step):
            sent.update({k: (v, step) for k, v in values.items()})

        def close(self):
            sent["closed"] = True

        finish = close  # fmt: skip

    fake = type(sys)("fake")
    fake.SummaryWriter, fake.init = Recorder, Recorder
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (writer,) = records.make_writers([name], tmp_path)
    writer.write({"step": 7, "split": "dev", "loss": np.float32(0.5), "nan": math.nan})
    writer.close()
    assert sent == {"dev/loss": (0.5, 7), "closed": True}


def test_manifest_holds_what_results_depend_on(monkeypatch):
    monkeypatch.setenv("NPROC", "3")
    monkeypatch.setenv("JAX_TEST_ONLY", "x")
    monkeypatch.setenv("API_TOKEN", "secret")
    found = manifest.collect({"seed": 4}, extra={"config": {"a": 1}})
    text = json.dumps(records.plain(found))
    assert found["machine"]["threads"] == 3 and found["environment"]["JAX_TEST_ONLY"] == "x"
    assert "secret" not in text
    assert found["packages"]["jax"] and found["devices"]["platform"] == "cpu" and found["devices"]["count"] == 8
    assert found["identity"] == {"seed": 4} and found["config"] == {"a": 1}
    assert found["command"][0] == sys.executable


def test_manifest_of_another_run_is_refused_and_of_the_same_continued(tmp_path):
    path = tmp_path / "manifest.json"
    manifest.open_run(path, manifest.collect({"seed": 0, "targets": ("q", "v")}))
    manifest.open_run(path, manifest.collect({"seed": 0, "targets": ("q", "v")}))
    assert len(records.read_json(path)["resumed"]) == 1
    with pytest.raises(UserError, match="belongs to another run: there seed is 0, here it is 1"):
        manifest.open_run(path, manifest.collect({"seed": 1, "targets": ("q", "v")}))
    with pytest.raises(UserError, match=r"there targets\[1\] is 'v', here it is 'o'"):
        manifest.open_run(path, manifest.collect({"seed": 0, "targets": ("q", "o")}))


def test_best_keeps_the_first_of_equals():
    best = Best("accuracy", "max")
    assert [best.update(s, {"accuracy": a}) for s, a in [(1, 0.5), (2, 0.5), (3, 0.7), (4, 0.6)]] == [
        True,
        False,
        True,
        False,
    ]
    assert (best.step, best.since, best.metrics) == (3, 1, {"accuracy": 0.7})
    low = Best("loss", "min")
    assert low.update(1, {"loss": 2.0}) and low.update(2, {"loss": 1.0}) and not low.update(3, {"loss": 1.5})


def test_signals_are_noted_and_handlers_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        assert not signals.stopped()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.caught == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_messages_say_where_to_go_on(tmp_path):
    stopped = Interrupted(signal.SIGINT, 12, tmp_path)
    assert stopped.code == 130 and "stopped by SIGINT at step 12" in str(stopped)
    diverged = Diverged(7, "the loss is nan", 5, tmp_path)
    assert diverged.code == 3 and f"the last good checkpoint is {tmp_path / '5'}" in str(diverged)
    assert "there is no checkpoint from before" in str(Diverged(1, "x", None, tmp_path))


def test_lines():
    record = {
        "step": 5,
        "split": "dev",
        "loss": 0.51234,
        "accuracy": 0.75,
        "tokens_per_second": 12345.6,
        "seconds": 1.0,
    }
    assert progress.line(record, 20) == "step 5/20  dev    loss 0.5123  accuracy 0.75  12,346 tokens/s"
    assert progress.duration(3700) == "1:01:40" and progress.duration(75.4) == "1:15"
    said = []
    with progress.Progress(20, 0, said.append) as shown:
        shown.show(record)
        shown.say("hello")
    assert said == [progress.line(record, 20), "hello"]
