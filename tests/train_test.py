"""Whole runs: what they write, how they end, and that a broken one goes on bit for bit."""

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import standin
import train_run

import lora_jax as lj
from lora_jax import UserError, evaluate, records, sharding, trees
from lora_jax.checkpoint import Checkpoints
from lora_jax.data import Batches
from lora_jax.train import Diverged, Interrupted, TrainSettings, fit

LORA = lj.lora(rank=2)
SHORT = TrainSettings(
    steps=6, batch_size=8, learning_rate=2e-2, eval_every=3, log_every=2, schedule="constant", buckets=[6]
)


def run(workdir, settings=SHORT, *, adapter=LORA, base=None, task=None, splits=None, **options):
    base, task = base or standin.make_base(), task or standin.make_task()
    return fit(base, adapter, task, splits or standin.make_splits(), settings, workdir, echo=None, **options)


def rows(workdir, split):
    return [r for r in records.read_jsonl(Path(workdir) / "metrics.jsonl") if r["split"] == split]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(work directory, summary, what was shown, what `save` got) of one short run."""
    workdir, shown, saved = tmp_path_factory.mktemp("run") / "w", [], {}
    base = standin.make_base()
    before = jax.tree.map(np.array, base.variables)
    summary = fit(
        base, LORA, standin.make_task(), standin.make_splits(), SHORT, workdir, echo=shown.append, save=saved.setdefault
    )  # fmt: skip
    assert standin.same(base.variables, before)
    return workdir, summary, shown, saved


def test_what_a_run_writes(done):
    workdir, summary, shown, saved = done
    assert {p.name for p in workdir.iterdir()} == {
        "manifest.json",
        "metrics.jsonl",
        "summary.json",
        "predictions",
        "checkpoints",
    }
    assert records.read_json(workdir / "summary.json") == summary
    assert set(summary) == {"step", "trainable_params", "total_params", "seconds", "dev", "test", "best", "saved"}
    assert summary["step"] == 6 and summary["saved"] == "last"
    # rank 2 on `up` (8 to 16) and `down` (16 to 12); the base has those, their biases and 12 embeddings of 8
    assert summary["trainable_params"] == 2 * (8 + 16) + 2 * (16 + 12)
    assert summary["total_params"] == 12 * 8 + 8 * 16 + 16 + 16 * 12 + 12
    assert [r["step"] for r in rows(workdir, "train")] == [2, 4, 6]
    assert [r["step"] for r in rows(workdir, "dev")] == [3, 6]
    assert [r["step"] for r in rows(workdir, "test")] == [6]
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_second", "tokens", "seconds"} <= set(
        rows(workdir, "train")[0]
    )
    assert rows(workdir, "dev")[-1]["loss"] == summary["dev"]["loss"]
    assert summary["best"]["dev"]["loss"] == min(r["loss"] for r in rows(workdir, "dev"))
    for split, count in (("dev", 10), ("test", 7)):
        lines = records.read_jsonl(workdir / "predictions" / f"{split}.jsonl")
        assert [line["id"] for line in lines] == list(range(count))
    assert list(saved) == [workdir / "adapter"] and saved[workdir / "adapter"] is summary.delta
    assert any("step 6/6" in line for line in shown)
    found = records.read_json(workdir / "manifest.json")["identity"]
    assert found["base"] == standin.make_base().fingerprint and found["adapter"]["method"] == "lora"


def test_reported_numbers_are_those_of_the_delta(done):
    """Test loss from the merged weights by plain numpy, example by example."""
    _, summary, _, _ = done
    base, task = standin.make_base(), standin.make_task()
    dense, total, weight = LORA.merge(base.variables, summary.delta), 0.0, 0.0
    for record in standin.make_splits()["test"]:
        e = task.encode(record)
        logits = np.asarray(base.apply(dense, e["tokens"][None])[0], np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= sum(w * logp[i, t] for i, (t, w) in enumerate(zip(e["targets"], e["weights"], strict=True)))
        weight += e["weights"].sum()
    np.testing.assert_allclose(summary["test"]["loss"], total / weight, rtol=1e-5)


def test_the_train_loss_is_the_mean_over_tokens_since_the_last_line(done):
    """At a learning rate of 0 the loss of each window is known."""
    workdir = done[0].parent / "frozen"
    run(workdir, dataclasses.replace(SHORT, steps=4, learning_rate=0.0, eval_every=0))
    base, task = standin.make_base(), standin.make_task()
    batches = Batches([task.encode(r) for r in standin.make_splits()["train"]], batch_size=8, buckets=[6])
    sums = [task.loss(base.apply(base.variables, batches[i]["tokens"]), batches[i]) for i in range(4)]
    expected = [sum(float(total) for total, _ in w) / sum(float(n) for _, n in w) for w in (sums[:2], sums[2:])]
    np.testing.assert_allclose([r["loss"] for r in rows(workdir, "train")], expected, rtol=1e-5)
    assert abs(expected[0] - expected[1]) > 1e-3
    assert rows(workdir, "train")[0]["learning_rate"] == 0.0


def test_a_finished_run_is_not_run_again(done):
    workdir, summary, _, _ = done
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file() and p.name != "manifest.json"}
    again = run(workdir)
    assert again == summary and standin.same(again.delta, summary.delta)
    assert {p: p.read_bytes() for p in before} == before


@pytest.mark.parametrize(
    "change,message",
    [
        ({"seed": 1}, "belongs to another run: there seed is 0, here it is 1"),
        (
            {"settings": dataclasses.replace(SHORT, learning_rate=1e-2)},
            "there train.learning_rate is 0.02, here it is 0.01",
        ),
        ({"adapter": lj.lora(rank=1)}, "there adapter.rank is 2, here it is 1"),
        ({"splits": standin.make_splits(train=23)}, r"there data\.train is"),
    ],
)
def test_a_work_directory_of_another_run_is_refused(done, change, message):
    with pytest.raises(UserError, match=message):
        run(done[0], **change)


def test_no_dev_and_no_test(tmp_path):
    summary = run(tmp_path, dataclasses.replace(SHORT, steps=2), splits={"train": standin.make_records(9), "dev": []})
    assert summary["dev"] == summary["test"] == {} and summary["best"] == {"step": None, "dev": {}}
    assert not (tmp_path / "predictions").exists()


def test_early_stopping_saves_and_tests_the_best(tmp_path):
    """At a rate far too high the loss on dev rises from some evaluation on."""
    settings = dataclasses.replace(SHORT, steps=60, learning_rate=3.0, eval_every=2, patience=2, clip_norm=0.0)
    summary = run(tmp_path, settings)
    losses = {r["step"]: r["loss"] for r in rows(tmp_path, "dev")}
    best = min(losses, key=losses.get)
    assert summary["best"]["step"] == best and summary["step"] == best + 4 == max(losses) < 60
    assert summary["saved"] == "best" and summary["dev"]["loss"] == losses[max(losses)]
    # The saved delta is that of the best step: it has the best step's loss on dev.
    base, task = standin.make_base(), standin.make_task()
    batches = Batches([task.encode(r) for r in standin.make_splits()["dev"]], batch_size=8, buckets=[6])
    step = evaluate.make_eval_step(lj.lift(base.apply), LORA, task)
    found = evaluate.evaluate(step, base.variables, summary.delta, task, batches).metrics["loss"]
    assert found == losses[best] != losses[max(losses)]
    assert rows(tmp_path, "test")[0]["step"] == best


def test_divergence_keeps_the_last_good_checkpoint(tmp_path):
    """The loss becomes NaN from step 5 on: through a batch, as it does through a token that overflows."""
    task = standin.make_task()
    poisoned = dataclasses.replace(
        task, loss=lambda o, b: (jnp.where(b["step"][0, 0] >= 4, jnp.nan, task.loss(o, b)[0]), task.loss(o, b)[1])
    )  # fmt: skip

    class Numbered(Batches):
        def __getitem__(self, step):
            return {**super().__getitem__(step), "step": np.full((8, 1), step, np.int32)}

    import lora_jax.feed as module

    original, module.Batches = module.Batches, Numbered
    try:
        settings = dataclasses.replace(SHORT, steps=12, checkpoint_every=2, log_every=12, eval_every=0)
        with pytest.raises(
            Diverged, match=r"training diverged: the loss is nan .* at step 5; the last good checkpoint is .*4"
        ) as info:
            run(tmp_path, settings, task=poisoned, splits={"train": standin.make_records(24)})
    finally:
        module.Batches = original
    assert info.value.code == 3 and info.value.checkpoint == 4
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [2, 4]
    assert not (tmp_path / "summary.json").exists()


def test_an_infinite_gradient_counts_as_divergence(tmp_path):
    """sqrt at 0: the loss is finite, its derivative is not."""
    adapter = LORA._replace(penalty=lambda d: jnp.sqrt(jnp.sum(d["up/kernel"].b ** 2)))
    with pytest.raises(Diverged, match="gradient's norm nan at step 1; there is no checkpoint"):
        run(tmp_path, adapter=adapter)


def test_epochs_and_fractions_of_them():
    settings = TrainSettings(epochs=2.5)
    assert settings.total(10) == 25 and settings.total(3) == 8
    assert TrainSettings(epochs=0.1).total(3) == 1


@pytest.mark.parametrize(
    "options,message",
    [
        ({}, "train.steps=0 and train.epochs=0: set exactly one"),
        ({"steps": 3, "epochs": 1.0}, "train.steps=3 and train.epochs=1: set exactly one"),
        ({"steps": -1}, "train.steps=-1: expected a whole number of at least 0"),
        ({"steps": 2.5}, "train.steps=2.5: expected a whole number"),
        ({"steps": 3, "batch_size": 0}, "train.batch_size=0: expected a whole number of at least 1"),
        ({"steps": 3, "learning_rate": math.nan}, "train.learning_rate=nan: expected a number"),
        ({"steps": 3, "b1": 1.0}, "train.b1=1.0: expected a number from 0 to below 1"),
        ({"steps": 3, "schedule": "cosne"}, "did you mean 'cosine'"),
        ({"steps": 3, "warmup": 5}, "train.warmup=5 steps, but the run has 3"),
        ({"steps": 3, "patience": 2}, "train.patience=2 counts evaluations, but train.eval_every is 0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(UserError, match=message):
        TrainSettings(**options)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"splits": {"train": []}}, "no training examples"),
        (
            {"mesh": lambda: sharding.make_mesh(2, 2), "settings": dataclasses.replace(SHORT, batch_size=6)},
            "train.batch_size=6 does not divide by 4",
        ),
        ({"settings": dataclasses.replace(SHORT, accumulate=3)}, "does not divide by 3"),
        (
            {"adapter": lj.full(targets="down/bias"), "settings": dataclasses.replace(SHORT, lora_plus_ratio=4.0)},
            "trains only value",
        ),
    ],
)
def test_what_a_user_can_get_wrong(tmp_path, options, message):
    if "mesh" in options:
        options = {**options, "mesh": options["mesh"]()}
    with pytest.raises(UserError, match=message):
        run(tmp_path, **options)


def test_a_mesh_of_eight_gives_the_run_of_one_device(done, tmp_path):
    """Six steps in float32: losses to 1e-4, factors to 1e-3 (Adam magnifies rounding where gradients vanish)."""
    workdir, summary, _, _ = done
    there = run(tmp_path, mesh=sharding.make_mesh(2, 2, 2))
    for name in ("dev", "test"):
        np.testing.assert_allclose(there[name]["loss"], summary[name]["loss"], rtol=1e-4)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-3),
        jax.device_get(there.delta),
        jax.device_get(summary.delta),
    )


@pytest.mark.parametrize("split,step", [("dev", 3), ("train", 6)])
def test_a_signal_saves_and_the_run_goes_on(done, tmp_path, split, step):
    """In this process: SIGINT while the first evaluation is written, or just before the last one starts."""

    class Interrupt:
        def write(self, record):
            if (record["split"], record["step"]) == (split, step):
                os.kill(os.getpid(), signal.SIGINT)

        def close(self):
            pass

    with pytest.raises(Interrupted, match=f"stopped by SIGINT at step {step}; saved in {tmp_path}") as info:
        run(tmp_path, writers=[Interrupt()])
    assert info.value.code == 130
    summary = run(tmp_path)
    assert standin.same(summary.delta, done[1].delta)
    assert (summary["dev"], summary["test"], summary["best"]) == (done[1]["dev"], done[1]["test"], done[1]["best"])
    assert [r["step"] for r in rows(tmp_path, "dev")] == [3, 6]


def spawn(workdir, seconds, cache):
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    env["PYTHONPATH"] = os.pathsep.join(
        [str(Path(train_run.__file__).parents[1]), str(Path(train_run.__file__).parent)]
    )
    command = [sys.executable, train_run.__file__, str(workdir), str(seconds)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_lines(process, workdir, count):
    """Waits until metrics.jsonl has so many lines."""
    path, deadline = Path(workdir) / "metrics.jsonl", time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def content(workdir):
    """All that a run leaves, times and speeds aside; leaf hashes stand for the checkpoint's arrays."""
    timing = ("seconds", "tokens_per_second")
    out = {
        "metrics": [
            {k: v for k, v in r.items() if k not in timing} for r in records.read_jsonl(workdir / "metrics.jsonl")
        ],
        "summary": {k: v for k, v in records.read_json(workdir / "summary.json").items() if k not in timing},
        "predictions": {p.name: p.read_text() for p in (workdir / "predictions").iterdir()},
    }
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        newest = max(checkpoints.steps())
        meta = json.loads((workdir / "checkpoints" / str(newest) / "meta" / "metadata").read_text())
        out["state"] = newest, [(leaf["name"], leaf["sha256"]) for leaf in meta["leaves"]]
    return out


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs, shared by the processes."""
    return tmp_path_factory.mktemp("cache")


def test_killed_terminated_and_resumed_equals_unbroken_bit_for_bit(tmp_path, cache):
    """kill -9 at a random moment, resumed, SIGTERM at another, resumed: every number and every bit of the state."""
    straight = spawn(tmp_path / "straight", 0, cache)
    assert straight.wait(240) == 0, straight.communicate()[0]

    chance, workdir = random.Random(), tmp_path / "broken"
    lines = chance.randint(1, 6)
    process = spawn(workdir, 0.15, cache)
    wait_for_lines(process, workdir, lines)
    time.sleep(chance.random() * 0.3)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert not (workdir / "summary.json").exists()

    process = spawn(workdir, 0.3, cache)
    wait_for_lines(process, workdir, 8)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 143, said
    assert "stopped by SIGTERM at step" in said

    process = spawn(workdir, 0, cache)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said
    assert "going on from step" in said
    assert content(workdir) == content(tmp_path / "straight"), f"killed after {lines} lines"


def test_a_second_interrupt_ends_at_once(tmp_path, cache):
    process = spawn(tmp_path / "w", 60, cache)  # it hangs in its first record
    wait_for_lines(process, tmp_path / "w", 1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130


def test_a_full_delta_trains_every_leaf(tmp_path):
    base = standin.make_base()
    summary = run(tmp_path, dataclasses.replace(SHORT, steps=2, weight_decay=0.1), adapter=lj.full())
    assert summary["trainable_params"] == summary["total_params"] == trees.count(base.variables)
