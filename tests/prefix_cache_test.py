"""The prefix cache changes the time of a run and not its result."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import standin
from lift.checks import noisy

import lora_jax as lj
from lora_jax import UserError, prefix_cache, records, tasks
from lora_jax.data import Batches
from lora_jax.data.row_store import RowStores
from lora_jax.lift import lift
from lora_jax.models import base as models
from lora_jax.train import TrainSettings, fit

UPPER = lj.lora(rank=2, targets="down/kernel")
SETTINGS = TrainSettings(
    steps=10, batch_size=8, learning_rate=2e-2, eval_every=5, log_every=1, schedule="constant", buckets=[4, 6]
)


def run(workdir, mode, *, base=None, adapter=UPPER, stores=None, **changes):
    """(summary, training losses, lines shown)."""
    settings, shown = dataclasses.replace(SETTINGS, prefix_cache=mode, **changes), []
    base = base or standin.make_base()
    task, splits = standin.make_task(), standin.make_splits()
    summary = fit(base, adapter, task, splits, settings, workdir, echo=shown.append, stores=stores)
    rows = records.read_jsonl(Path(workdir) / "metrics.jsonl")
    return summary, [r["loss"] for r in rows if r["split"] == "train"], shown


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run(tmp_path_factory.mktemp("off") / "w", "off")


@pytest.fixture
def fills(monkeypatch):
    """How many blocks of rows were computed."""
    count, own = [], prefix_cache.CachedBatches._fill
    monkeypatch.setattr(prefix_cache.CachedBatches, "_fill", lambda self, block: (count.append(1), own(self, block)))
    return count


def equal(one, other, rtol=1e-5):
    np.testing.assert_allclose(one[1], other[1], rtol=rtol)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one[0].delta, other[0].delta)
    for split in ("dev", "test"):
        np.testing.assert_allclose(one[0][split]["loss"], other[0][split]["loss"], rtol=rtol)


def said(lines, text):
    return [line for line in lines if text in line]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_cached_equals_uncached(tmp_path, plain, fills, accumulate):
    found = run(tmp_path / "w", "auto", accumulate=accumulate)
    equal(found, plain)
    # 24 rows of train and 10 of dev in blocks of 8, once, though 80 and 20 rows were read.
    assert len(fills) == 3 + 2
    assert len(said(found[2], "is computed once")) == 2 and not said(plain[2], "prefix cache")


def test_the_step_reads_what_was_kept(tmp_path, plain, monkeypatch):
    fill = prefix_cache.CachedBatches._fill

    def zero(self, block):
        fill(self, block)
        for buffer in self._store._buffers:
            buffer[:] = 0

    monkeypatch.setattr(prefix_cache.CachedBatches, "_fill", zero)
    found = run(tmp_path / "w", "auto", steps=4, eval_every=0)  # 32 rows of 24
    assert min(abs(np.subtract(found[1], plain[1][:4]))) > 1e-2


def test_on_disk(tmp_path, plain, fills):
    found = run(tmp_path / "w", "auto", prefix_cache_gb=0.0, prefix_cache_disk_gb=1.0)
    equal(found, plain)
    assert len(fills) == 5 and said(found[2], f"in {tmp_path / 'w' / 'prefix_cache'}")
    assert not (tmp_path / "w" / "prefix_cache").exists()  # nobody needs it any more


def test_too_large_for_the_limits(tmp_path, plain, fills):
    found = run(tmp_path / "w", "auto", prefix_cache_gb=1e-6)
    equal(found, plain, rtol=1e-6)
    assert not fills and len(said(found[2], "prefix cache off for")) == 2


@pytest.mark.parametrize(
    ("adapter", "changes"),
    [(lj.lora(rank=2), {}), (UPPER, {"steps": 3, "eval_every": 0})],
    ids=["adapter at the bottom", "nothing is read twice"],
)
def test_auto_is_off_where_nothing_is_gained(tmp_path, fills, adapter, changes):
    assert not said(run(tmp_path / "w", "auto", adapter=adapter, **changes)[2], "prefix cache") and not fills


def test_dropout_of_the_base(tmp_path, plain, fills):
    """auto leaves such a run alone; on trains it without dropout, says so, and is another run."""
    dropping = standin.make_base(0.5)
    off, auto = run(tmp_path / "off", "off", base=dropping), run(tmp_path / "auto", "auto", base=dropping)
    assert auto[1] == off[1] and said(auto[2], "own dropout") and not fills
    on = run(tmp_path / "on", "on", base=dropping)
    equal(on, plain)
    assert len(fills) == 5 and said(on[2], "own dropout is off")
    assert max(abs(np.subtract(on[1], off[1]))) > 1e-3
    with pytest.raises(UserError, match="prefix_cache"):
        run(tmp_path / "on", "auto", base=dropping)
    lower = {"adapter": lj.lora(rank=2), "steps": 2, "eval_every": 0}  # no prefix, but arms of one ablation train alike
    equal(run(tmp_path / "lower", "on", base=dropping, **lower), run(tmp_path / "none", "off", **lower))
    run(tmp_path / "auto", "off", base=dropping)  # a finished run is the same run with the cache or without


def test_runs_share_what_they_have_in_common(tmp_path, fills):
    stores = RowStores(1e9)
    run(tmp_path / "a", "auto", stores=stores)
    run(tmp_path / "b", "auto", stores=stores, learning_rate=1e-3)
    assert len(fills) == 5


def batches_of(base, adapter, task, examples, stores=None, **options):
    delta = noisy(adapter.init(jax.random.key(0), base.variables, base.sites))
    paths = prefix_cache.adapted_paths(adapter, base.variables, delta)
    batches = Batches(examples, batch_size=4, **options)
    return delta, batches, prefix_cache.for_run(base, paths, task, {"train": batches}, stores or RowStores(1e9))


def test_a_row_has_the_same_bits_whatever_came_first():
    task = standin.make_task()
    examples = [task.encode(r) for r in standin.make_records(22)]
    one, other = (batches_of(standin.make_base(), UPPER, task, examples)[2] for _ in range(2))
    given = [one.batches["train"][i] for i in range(8)]
    for i in (7, 3, 0, 5):
        assert standin.same(other.batches["train"][i], given[i])


BERT = dict(
    model_type="bert", vocab_size=30, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("adapter", "rows"),
    [
        (lj.lora(2, 4, targets="q,v", layers="last:1"), {"packing": True}),
        (lj.head(), {"packing": True}),
        (lj.head(), {}),
        (lj.lora(2, 4, targets="q,v", layers="last:1"), {"share_rows": True}), (lj.head(), {"share_rows": True}),
    ],
    ids=["lora, packed rows", "head, packed rows", "head", "lora, shared rows", "head, shared rows"],
)  # fmt: skip
def test_rows_of_a_classifier(adapter, rows):
    base = models.from_config(BERT, num_labels=2)
    base = dataclasses.replace(base, variables=noisy(base.variables))
    rng = np.random.default_rng(0)
    examples = [
        {
            "tokens": rng.integers(1, 30, n).astype(np.int32), "token_type_ids": np.zeros(n, np.int32),
            "labels": np.int32(n % 2), "pool_at": np.int32(0),
        }
        for n in rng.integers(3, 12, 14)
    ]  # fmt: skip
    task = dataclasses.replace(standin.make_task(), inputs=tasks.base.inputs)
    delta, batches, cached = batches_of(base, adapter, task, examples, max_length=24, buckets=1, **rows)
    bound, seen = adapter.bind(base.variables, delta), 0
    apply, whole = jax.jit(lift(cached.apply)), jax.jit(lift(base.apply))
    for batch, with_frontier in zip(batches.in_order(), cached.batches["train"].in_order(), strict=True):
        real = batch["ids"] >= 0
        inputs = cached.task.inputs(with_frontier)
        expected, out = whole(bound, **task.inputs(batch)), apply(bound, **inputs)
        np.testing.assert_allclose(out[real], expected[real], rtol=1e-5, atol=1e-5)
        assert np.abs(out - whole(base.variables, **task.inputs(batch)))[real].min() > 1e-6
        # What the frontier was computed from is not read again.
        broken = {**inputs, "frontier": jax.tree.map(jnp.zeros_like, inputs["frontier"])}
        assert np.abs(apply(bound, **broken) - expected)[real].max() > 1e-3
        seen += real.sum()
    again = cached.batches["train"]
    for step in range(3):  # other rows side by side than in order
        inputs, expected = cached.task.inputs(again[step]), whole(bound, **task.inputs(batches[step]))
        real = batches[step]["ids"] >= 0
        np.testing.assert_allclose(apply(bound, **inputs)[real], expected[real], rtol=1e-5, atol=1e-5)
    assert seen == 14 and cached.share > (0.9 if adapter.spec["method"] == "head" else 0.4)


def test_arms_that_train_together_share_one_frontier():
    """vmap over deltas, the frontier of their common paths un-batched; a quantized base."""
    base = models.quantized(models.from_config({**BERT, "hidden_size": 16}), "nf4")
    adapter = lj.lora(2, 4, targets="v", layers="last:1")
    examples = [{"tokens": np.arange(1, n, dtype=np.int32)} for n in (4, 7, 6, 5)]
    task = dataclasses.replace(standin.make_task(), inputs=tasks.base.inputs)
    delta, batches, cached = batches_of(base, adapter, task, examples, buckets=1)
    other = noisy(delta, seed=5)
    arms = jax.tree.map(lambda a, b: jnp.stack([a, b]), delta, other)
    inputs = cached.task.inputs(cached.place(batches[0]))

    @jax.jit
    def run(apply_inputs):
        apply = lift(cached.apply)
        return jax.vmap(lambda d: apply(adapter.bind(base.variables, d), **apply_inputs))(arms)

    real = batches[0]["segment_ids"] > 0
    for out, one in zip(run(inputs), (delta, other), strict=True):
        expected = jax.jit(lift(base.apply))(adapter.bind(base.variables, one), **task.inputs(batches[0]))
        np.testing.assert_allclose(out[real], expected[real], rtol=1e-4, atol=1e-5)


def test_which_paths_an_adapter_changes():
    base = models.from_config(BERT, num_labels=2)
    for adapter, expected in (
        (lj.lora(2, 4, targets="q", layers="last:1"), {"encoder/layer_1/attention/query/kernel"}),
        (lj.head(targets="classifier/.*"), {"classifier/kernel", "classifier/bias"}),
        (lj.prefix(length=2, hidden=0), None),
    ):
        shapes = jax.eval_shape(lambda v, a=adapter: a.init(jax.random.key(0), v, base.sites), base.variables)
        assert prefix_cache.adapted_paths(adapter, base.variables, shapes) == expected


def test_an_unknown_mode_is_named():
    with pytest.raises(UserError, match=r"train.prefix_cache='yes': expected auto, on or off"):
        TrainSettings(steps=1, prefix_cache="yes")
