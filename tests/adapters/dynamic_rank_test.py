"""What dynamic_rank promises beyond the conformance suite: scores, pruning and penalty against literal formulae."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import standin

import lora_jax as lj
from lora_jax.adapters import dynamic_rank as method
from lora_jax.adapters.parts.gated import rank_pattern
from lora_jax.train import TrainSettings, fit
from tests.adapters import kinds
from tests.lift.checks import bits_equal, noisy

RATE = 0.1
KINDS = ["dense", "scan", "heads out"]


def started(total=20, kind="dense", **options):
    """(adapter, delta away from zero, as many gradients of its structure as there are steps)."""
    site = kinds.get(kind)
    options = {"rank": 2, "init_rank": 5, "start": 3, "end": 15, "interval": 4} | options
    adapter = kinds.make("dynamic_rank", site, total_steps=total, **options)
    delta = noisy(adapter.init(jax.random.key(0), site.variables, site.sites))
    return adapter, delta, [noisy(jax.tree.map(jnp.zeros_like, delta), 1.0, seed=i) for i in range(total)]


def trained(adapter, delta, gradients):
    """The delta after every update of plain gradient descent, and the last state."""
    tx = adapter.wrap(optax.sgd(RATE))
    traced = []

    @jax.jit
    def step(grads, state, delta):
        traced.append(1)
        updates, state = tx.update(grads, state, delta)
        return optax.apply_updates(delta, updates), state

    state, out = tx.init(delta), []
    for grads in gradients:
        delta, state = step(grads, state, delta)
        out.append(delta)
    assert len(traced) == 1, "one program for the whole schedule"
    return out, state


def flat(delta):
    """{(path, batch index, field): matrix with a part per column of a, row of b}."""
    out = {}
    for path, one in delta.items():
        n, r = len(one.ranks), one.e.shape[-1]
        for i in range(n):
            out[path, i, "a"] = np.asarray(one.a, np.float64).reshape(n, -1, r)[i]
            out[path, i, "e"] = np.asarray(one.e, np.float64).reshape(n, r)[i]
            out[path, i, "b"] = np.asarray(one.b, np.float64).reshape(n, r, -1)[i]
    return out


def literal_scores(p):
    """{(path, batch index, part): score}, every product formed."""
    out = {}
    for path, i in {k[:2]: None for k in p}:
        a, e, b = (p[path, i, f] for f in "aeb")
        parts = [e[j] * np.outer(a[:, j], b[j]) for j in range(len(e))]
        for j, part in enumerate(parts):
            out[path, i, j] = np.linalg.norm(part) / np.linalg.norm(sum(parts))
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_scores_by_hand(kind):
    _, delta, _ = started(kind=kind)
    expected = literal_scores(flat(delta))
    found = method.scores(delta)
    for (path, i, j), score in expected.items():
        own = found[path].reshape(len(delta[path].ranks), -1)
        np.testing.assert_allclose(own[i, j], score, rtol=1e-4)


@pytest.mark.parametrize("revive", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_pruning_is_that_of_a_literal_implementation(kind, revive):
    adapter, delta, gradients = started(kind=kind, revive=revive)
    after, _ = trained(adapter, delta, gradients)
    p, mean, dead = flat(delta), {}, []
    n = sum(sum(one.ranks) for one in delta.values())
    for t, grads in enumerate(gradients, start=1):
        g = flat(grads)
        p = {k: v - RATE * g[k] for k, v in p.items()}
        held = [] if revive and t < 15 else dead
        # A dead part's update is undone after it was watched.
        if t <= 15:
            now = literal_scores(p)
            mean = {k: 0.9 * mean.get(k, 0.0) + 0.1 * s for k, s in now.items()}
        if 3 <= t <= 15 and ((t - 3) % 4 == 0 or t == 15):
            share = (5 - 2) / 5 * ((t - 3) / 12) ** 3
            order = sorted(mean, key=lambda k: (revive or k not in dead, mean[k]))
            dead = held = order[: math.floor(n * share + 1e-9)]
        for path, i, j in held:
            p[path, i, "e"][j] = 0
        for k, v in flat(after[t - 1]).items():
            np.testing.assert_allclose(v, p[k], rtol=1e-4, atol=1e-5, err_msg=f"step {t}, {k}")
    assert len(dead) == n * 3 // 5


@pytest.mark.parametrize(("total", "start", "end"), [(20, 3, 15), (1000, 0.15, 0.5), (40, 0, 40)])
def test_the_number_of_live_parts_at_every_step(total, start, end):
    _, delta, _ = started()
    found = method.schedule(delta, total, start, end, 4)
    first, last = (int(x * total) if x < 1 else x for x in (start or 1, end))
    pruned = np.asarray(jax.vmap(found.pruned)(jnp.arange(1, total + 1)))
    for t in range(1, total + 1):
        share = min(1.0, max(0.0, (t - first) / (last - first))) ** 3
        assert pruned[t - 1] == int((10 - 4) * share), t
    prunes = [t for t in range(1, total + 1) if bool(found.prunes(jnp.asarray(t)))]
    assert prunes == sorted({*range(first, last, 4), last})


def test_the_budget_is_met_exactly_and_pruned_parts_stay_pruned():
    adapter, delta, gradients = started(interval=1, beta=0.1)
    # Each update outweighs all before it, so that the dead would win if they could.
    grown = [{p: dataclasses.replace(g, e=g.e * 4.0**i) for p, g in gs.items()} for i, gs in enumerate(gradients)]
    after, state = trained(adapter, delta, grown)
    alive = [np.concatenate([p.reshape(-1) for p in rank_pattern(d).values()]) for d in after]
    assert alive[0].sum() == 10 and [int(p.sum()) for p in alive[14:]] == [4] * 6
    assert all(not np.any(new & ~old) for old, new in zip(alive, alive[1:], strict=False))
    assert {type(x) for x in jax.tree.leaves(state)} == {type(jnp.zeros(()))}, "a checkpoint holds arrays alone"


def test_with_revive_a_part_may_come_back_until_the_end():
    adapter, delta, gradients = started(revive=True)
    after, _ = trained(adapter, delta, gradients)
    alive = [np.concatenate([p.reshape(-1) for p in rank_pattern(d).values()]) for d in after]
    assert alive[10].sum() < 10 and alive[11].sum() == 10, "the update after the pruning opens all gates"
    assert [int(p.sum()) for p in alive[14:]] == [4] * 6
    for p in alive[15:]:
        bits_equal(p, alive[14])


@pytest.mark.parametrize("kind", KINDS)
def test_penalty_by_hand(kind):
    adapter, delta, _ = started(kind=kind, penalty_weight=0.3)
    variances = []
    for k, v in flat(delta).items():
        if k[-1] != "e":
            variances += list(np.var(v, axis=0 if k[-1] == "a" else 1, ddof=1))
    np.testing.assert_allclose(adapter.penalty(delta), 0.3 * np.mean(variances), rtol=1e-5)
    assert started(penalty_weight=0)[0].penalty is None


def test_layers_that_are_left_out_count_nowhere():
    site = kinds.get("scan")
    adapter = kinds.make("dynamic_rank", site, layers="last:1", penalty_weight=1.0)
    ((path, one),) = adapter.init(jax.random.key(0), site.variables, site.sites).items()
    assert one.ranks == (0, 3) and not np.any(one.a[0]) and np.all(np.any(one.a[1], axis=0))
    of_one = [np.var(x, axis=-1, ddof=1).mean() for x in (np.asarray(one.a[1]).T, np.asarray(one.b[1]))]
    np.testing.assert_allclose(adapter.penalty({path: one}), np.mean(of_one), rtol=1e-5)


def test_first_values():
    """Uniform within sqrt(6 / fan_in) and sqrt(6 / rank), gates shut."""
    site = kinds.get("dense")
    delta = lj.dynamic_rank(rank=2, init_rank=4, targets=site.weights).init(
        jax.random.key(0), site.variables, site.sites
    )
    a, b = (np.concatenate([np.ravel(getattr(one, n)) for one in delta.values()]) for n in "ab")
    for values, bound in ((a, math.sqrt(6 / 8)), (b, math.sqrt(6 / 4))):
        assert 0.9 * bound < np.abs(values).max() <= bound and abs(values.mean()) < 0.2 * bound
    assert not any(np.any(one.e) for one in delta.values())


def test_a_real_run_ends_with_the_budget(tmp_path):
    """In a chain with weights trained in place; `fit` tells the method how long the run is."""
    ours = lj.dynamic_rank(rank=2, targets="(up|down)/kernel", interval=2)
    settings = TrainSettings(steps=12, batch_size=8, learning_rate=2e-2, log_every=4)
    adapter = lj.chain(lj.full(targets="down/bias"), ours)
    base, splits = standin.make_base(), standin.make_splits()
    summary = fit(base, adapter, standin.make_task(), splits, settings, tmp_path, seed=5, echo=None)
    pattern = rank_pattern(summary.delta)
    assert set(pattern) == {"up/kernel", "down/kernel"} and sum(int(p.sum()) for p in pattern.values()) == 4
    assert math.isfinite(summary["dev"]["loss"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1.0}, "beta=1.0: expected a number from 0 to below 1"),
        ({"start": "early"}, "start='early': give a number of steps, or a fraction of all steps below 1"),
        ({"interval": 1.5}, "interval=1.5: expected a whole number of steps, at least 1"),
        ({"penalty_weight": True}, "penalty_weight=True: expected a number of at least 0"),
        ({"revive": "yes"}, "dynamic_rank: revive='yes' is unknown"),
        ({}, "give dynamic_rank(total_steps=...)"),
        ({"start": 6, "end": 6, "total_steps": 10}, "start=6 and end=6 leave none of the run's 10 steps"),
    ],
)
def test_mistakes(options, message):
    site = kinds.get("dense")
    with pytest.raises(lj.UserError) as caught:
        adapter = lj.dynamic_rank(rank=2, **options)
        delta = adapter.init(jax.random.key(0), site.variables, site.sites)
        tx = adapter.wrap(optax.sgd(0.1))
        tx.update(delta, tx.init(delta), delta)
    assert message in str(caught.value)
