"""Arms that train together: each as if alone, none touched by another, for methods of every kind."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import standin

import lora_jax as lj
from lora_jax import feed, records
from lora_jax.ablation.running.fit import fit_together
from lora_jax.data.row_store import RowStores
from lora_jax.errors import UserError
from lora_jax.models import reseeded
from lora_jax.train import TrainSettings, fit

MODEL = {
    "model_type": "llama", "vocab_size": standin.VOCAB, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16,
    "initializer_range": 0.3,
}  # fmt: skip
PLAIN = TrainSettings(steps=4, batch_size=4, learning_rate=1e-2, log_every=1, eval_every=2, eps=1e-3, buckets=[6])
OTHER = dataclasses.replace(PLAIN, learning_rate=3e-2, weight_decay=0.1, clip_norm=0.0, warmup=2)
SPLITS = standin.make_splits(24, 6, 4)
ALIKE = {
    "lora: ranks, layers, scales": [
        (lj.lora(rank=1, alpha=4, layers="last:1"), PLAIN), (lj.lora(rank=3, dropout=0.0), OTHER),
        (lj.lora(rank=2, targets="q,up", scaling="alpha/sqrt(r)"), dataclasses.replace(PLAIN, lora_plus_ratio=4.0)),
    ],
    "lora with dropout": [(lj.lora(rank=2, dropout=0.3), PLAIN), (lj.lora(rank=1, dropout=0.3, alpha=1), OTHER)],
    "dora: ranks, layers": [(lj.dora(rank=1, layers=[1]), PLAIN), (lj.dora(rank=3), OTHER)],
    "loha: ranks": [(lj.loha(rank=1), PLAIN), (lj.loha(rank=2, layers="first:1"), OTHER)],
    "ia3: layers": [(lj.ia3(layers=[0]), PLAIN), (lj.ia3(), OTHER)],
    "bottleneck": [(lj.bottleneck(size=3), PLAIN), (lj.bottleneck(size=3, layers="last:1"), OTHER)],
    "adalora: a penalty, an edited update": [(lj.adalora(rank=2), PLAIN), (lj.adalora(rank=2), OTHER)],
    "vera: shared frozen arrays": [(lj.vera(rank=3), PLAIN), (lj.vera(rank=3), OTHER)],
    "layers: the base in place": [(lj.layers(layers="last:1"), PLAIN), (lj.layers(layers="last:2"), OTHER)],
}  # fmt: skip


def together(folder, arms, splits=SPLITS, **options):
    """{index: (saved delta, losses, summary or why it failed)}."""
    base, saved, why = options.pop("base", None) or lj.from_config(MODEL), {}, {}
    before = jax.tree.map(np.array, base.variables)
    fit_together(
        base, [method for method, _ in arms], standin.make_task(), splits, [own for _, own in arms],
        [folder / str(i) for i in range(len(arms))], folder / "pack",
        saves=[lambda where, delta, i=i: saved.update({i: delta}) for i in range(len(arms))],
        ended=lambda i, reason: why.update({i: reason}), **options,
    )  # fmt: skip
    assert standin.same(base.variables, before)
    return {i: (saved.get(i), lines(folder / str(i)), why.get(i)) for i in range(len(arms))}


def lines(folder, split="train"):
    return [r["loss"] for r in records.read_jsonl(folder / "metrics.jsonl") if r["split"] == split]


SLOW = ("dora", "loha", "ia3", "lora with dropout", "bottleneck", "vera")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * k.startswith(SLOW)) for k in ALIKE])
def test_an_arm_of_a_pack_is_the_run_alone(kind, tmp_path):
    """Losses to 1e-4 relative, trained arrays to 1e-4 of their largest value plus 1e-4.

    Adam's eps lies above the rounding of gradients near zero, which it would blow up to a whole step.
    """
    arms = ALIKE[kind]
    found = together(tmp_path / "pack", arms)
    for i, (method, own) in enumerate(arms):
        alone = fit(lj.from_config(MODEL), method, standin.make_task(), SPLITS, own, tmp_path / f"alone{i}", echo=None)
        delta, losses, why = found[i]
        assert why == "" and len(losses) == 4
        np.testing.assert_allclose(losses, lines(tmp_path / f"alone{i}"), rtol=1e-4)
        assert jax.tree.structure(delta) == jax.tree.structure(alone.delta)
        close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 + 1e-4 * float(jnp.max(jnp.abs(b))))  # noqa: E731
        jax.tree.map(close, delta, alone.delta)
        summary = records.read_json(tmp_path / "pack" / str(i) / "summary.json")
        assert {**summary, **ignored(summary)} == {**dict(alone), "arms_together": len(arms), **ignored(summary)}
        for split in ("dev", "test"):
            np.testing.assert_allclose(summary[split]["loss"], alone[split]["loss"], rtol=1e-4)
    # The arms are different runs, not copies of one.
    assert not np.allclose(found[0][1], found[1][1], rtol=1e-6)


ROWS = dataclasses.replace(PLAIN, share_rows=True, buckets=None, log_every=1)
SEEDS = {
    "buckets": (lj.lora(rank=2, layers="last:1"), dataclasses.replace(PLAIN, buckets=[4, 6], batch_size=2), "off"),
    "rows that are shared, dropout, the prefix cached": (lj.lora(rank=2, layers="last:1", dropout=0.3), ROWS, "on"),
}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k == "buckets")) for k in SEEDS])
def test_arms_with_different_seeds_are_the_runs_alone(kind, tmp_path):
    """Order of the data, first delta, frozen fresh weight and masks are those of the own seed; two arms share one."""
    method, own, cache = SEEDS[kind]
    own, seeds = dataclasses.replace(own, prefix_cache=cache), (5, 0, 5)
    batches = [
        feed.make_batches(standin.make_task(), SPLITS["train"], own, seed=seed, training=True) for seed in seeds[:2]
    ]
    assert batches[0][0]["tokens"].shape != batches[1][0]["tokens"].shape, "so one of them is filled up"
    arms = [(method, own), (method, own), (method, dataclasses.replace(own, learning_rate=3e-2))]
    base = dataclasses.replace(lj.from_config(MODEL), fresh=("lm_head/kernel",))
    bases = [reseeded(base, seed) for seed in seeds]
    stores = RowStores(1e8)
    found = together(tmp_path / "pack", arms, base=bases[0], bases=bases, seeds=seeds, stores=stores)
    assert bool(stores._stores) == (cache == "on")
    assert found[2][1][0] == found[0][1][0] and found[2][1][3] != found[0][1][3], "one seed, two learning rates"
    for i, seed in enumerate(seeds[:2]):
        alone = fit(
            bases[i], method, standin.make_task(), SPLITS, arms[i][1], tmp_path / f"alone{i}", seed=seed, echo=None
        )
        np.testing.assert_allclose(found[i][1], lines(tmp_path / f"alone{i}"), rtol=1e-4)
        close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 + 1e-4 * float(jnp.max(jnp.abs(b))))  # noqa: E731
        jax.tree.map(close, found[i][0], alone.delta)
        own_lines = [
            [(r["step"], r["tokens"]) for r in records.read_jsonl(folder / "metrics.jsonl") if r["split"] == "train"]
            for folder in (tmp_path / "pack" / str(i), tmp_path / f"alone{i}")
        ]
        assert own_lines[0] == own_lines[1]
        manifests = [
            records.read_json(f / "manifest.json") for f in (tmp_path / "pack" / str(i), tmp_path / f"alone{i}")
        ]
        assert manifests[0]["identity"] == manifests[1]["identity"]
    assert not np.allclose(found[0][1], found[1][1], rtol=1e-3)


def ignored(summary):
    return {name: summary[name] for name in ("seconds", "dev", "test", "best")}


def test_an_arm_that_diverges_leaves_the_others_bit_unchanged(tmp_path):
    good = (lj.lora(rank=2), PLAIN)
    wild = (lj.lora(rank=3), dataclasses.replace(PLAIN, learning_rate=1e30, clip_norm=0.0))
    calm = (lj.lora(rank=3), PLAIN)
    with_wild = together(tmp_path / "wild", [good, wild, good])
    with_calm = together(tmp_path / "calm", [good, calm, good])
    assert "training diverged" in with_wild[1][2] and with_wild[1][0] is None
    assert not (tmp_path / "wild" / "1" / "summary.json").exists()
    for i in (0, 2):
        assert with_wild[i][1] == with_calm[i][1] and with_wild[i][2] == ""
        assert standin.same(with_wild[i][0], with_calm[i][0])


def test_each_arm_stops_by_its_own_patience_and_keeps_its_best(tmp_path):
    """The first arm's dev loss falls to 2.26 at step 4 and is 2.42 at step 6; the other goes on to the end."""
    base = dataclasses.replace(PLAIN, steps=12, eval_every=2)
    hasty = dataclasses.replace(base, learning_rate=0.3, patience=1, clip_norm=0.0)
    arms = [(lj.lora(rank=2, alpha=2), hasty), (lj.lora(rank=1), base)]
    found = together(tmp_path / "pack", arms)
    summaries = [records.read_json(tmp_path / "pack" / str(i) / "summary.json") for i in range(2)]
    assert summaries[0]["step"] < 12 == summaries[1]["step"] and summaries[0]["saved"] == "best"
    alone = fit(lj.from_config(MODEL), arms[0][0], standin.make_task(), SPLITS, hasty, tmp_path / "alone", echo=None)
    assert (alone["step"], alone["best"]["step"]) == (summaries[0]["step"], summaries[0]["best"]["step"])
    np.testing.assert_allclose(summaries[0]["test"]["loss"], alone["test"]["loss"], rtol=1e-3)
    assert len(found[1][1]) == 12 and math.isclose(
        summaries[0]["best"]["dev"]["loss"], min(lines(tmp_path / "pack/0", "dev"))
    )


def test_settings_that_cannot_differ_are_refused(tmp_path):
    arms = [(lj.lora(rank=1), PLAIN), (lj.lora(rank=1), dataclasses.replace(PLAIN, steps=5))]
    with pytest.raises(UserError, match="must agree in train.steps, but have 4 and 5"):
        together(tmp_path, arms)


@pytest.mark.parametrize("seeds", [(), pytest.param((0, 3), marks=pytest.mark.slow)])
def test_a_pack_that_was_stopped_goes_on_bit_for_bit(tmp_path, monkeypatch, seeds):
    """The process is stopped by a signal at step 3, with a line owed and the optimizer's slots in the checkpoint."""
    import os
    import signal

    own = dataclasses.replace(PLAIN, log_every=2, eval_every=4, steps=6)
    arms = [(lj.lora(rank=2), own), (lj.lora(rank=1), dataclasses.replace(own, learning_rate=3e-2, patience=3))]
    straight = together(tmp_path / "straight", arms, seeds=seeds)

    from lora_jax.ablation.running import fit as module

    original = module.make_batches

    def stopping(*args):
        batches = original(*args)
        one = type(batches["train"])
        monkeypatch.setattr(one, "__getitem__", _stops(one.__getitem__, lambda: os.kill(os.getpid(), signal.SIGINT)))
        return batches

    monkeypatch.setattr(module, "make_batches", stopping)
    with pytest.raises(lj.train.Interrupted):
        together(tmp_path / "broken", arms, seeds=seeds)
    monkeypatch.undo()
    resumed = together(tmp_path / "broken", arms, seeds=seeds)
    for i in range(2):
        assert resumed[i][1] == straight[i][1] and standin.same(resumed[i][0], straight[i][0])


def _stops(original, stop):
    def get(self, step):
        if step == 3:
            stop()
        return original(self, step)

    return get


def test_arms_share_a_prefix_that_is_computed_once(tmp_path):
    """Both arms adapt the last layer alone; with the cache their losses are those without."""
    own = dataclasses.replace(PLAIN, steps=10, log_every=1, eval_every=5)  # 24 rows of 4: rows come again
    arms = [(lj.lora(rank=2, layers="last:1"), own), (lj.lora(rank=1, layers="last:1"), own)]
    off = [(method, dataclasses.replace(settings, prefix_cache="off")) for method, settings in arms]
    stores = RowStores(1e8)
    cached, plain = together(tmp_path / "on", arms, stores=stores), together(tmp_path / "off", off)
    kept = list(stores._stores.values())
    assert kept and all(store.present.all() for store in kept)
    for i in range(2):
        np.testing.assert_allclose(cached[i][1], plain[i][1], rtol=1e-5)
