"""What adalora promises beyond conformance: schedule, importance and masks by literal formulae and by PEFT."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import standin

import lora_jax as lj
from lora_jax.adapters import adalora as method
from lora_jax.adapters.parts.gated import rank_pattern
from lora_jax.train import TrainSettings, fit
from tests.adapters import kinds
from tests.lift.checks import bits_equal, noisy

RATE = 0.05


def started(total=20, kind="dense", **options):
    """(adapter, delta away from zero, as many gradients of its structure as there are steps)."""
    site = kinds.get(kind)
    options = {"rank": 2, "init_rank": 5, "tinit": 3, "tfinal": 4, "interval": 3} | options
    adapter = kinds.make("adalora", site, total_steps=total, **options)
    delta = noisy(adapter.init(jax.random.key(0), site.variables, site.sites))
    return adapter, delta, [noisy(jax.tree.map(jnp.zeros_like, delta), 1.0, seed=i) for i in range(total)]


def trained(adapter, delta, gradients, rate=RATE):
    """The delta after every update of plain gradient descent, and the last state."""
    tx = adapter.wrap(optax.sgd(rate))
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


def alive(delta):
    return {path: pattern for path, pattern in rank_pattern(delta).items()}


@pytest.mark.parametrize(("total", "tinit", "tfinal"), [(20, 3, 4), (97, 0, 0), (1000, 0.1, 0.5), (7, 0, 6)])
def test_the_budget_is_the_cubic_formula_at_every_step(total, tinit, tfinal):
    _, delta, _ = started(1)
    first, last = sum(sum(d.ranks) for d in delta.values()), sum(sum(d.budget) for d in delta.values())
    found = method.schedule(delta, total, tinit, tfinal, 3)
    t_i, t_f = (int(x * total) if x < 1 else x for x in (tinit, tfinal))
    budgets, pruned = [], jax.jit(jax.vmap(found.pruned))(jnp.arange(1, total + 1))
    for t in range(1, total + 1):
        if t <= t_i:
            budgets.append(first)
        elif t > total - t_f:
            budgets.append(last)
        else:
            budgets.append(int((first - last) * (1 - (t - t_i) / (total - t_f - t_i)) ** 3 + last))
    assert (first - np.asarray(pruned)).tolist() == budgets
    prunes = [t for t in range(1, total + 1) if bool(found.prunes(jnp.asarray(t)))]
    assert prunes == sorted({t for t in range(t_i + 1, total - t_f) if t % 3 == 0} | {total - t_f})


@pytest.mark.parametrize("importance", ["before", "after"])
@pytest.mark.parametrize("kind", ["dense", "scan", "heads out"])
def test_masks_are_those_of_a_literal_implementation(importance, kind):
    """numpy, triplet by triplet; a stack's layers compete as weights of their own."""
    adapter, delta, gradients = started(kind=kind, importance=importance)
    after, _ = trained(adapter, delta, gradients)
    p = {k: np.asarray(v, np.float64) for k, v in _flat(delta).items()}
    mean, spread = {k: 0 * v for k, v in p.items()}, {k: 0 * v for k, v in p.items()}
    dead_for_good = None
    for t, grads in enumerate(gradients, start=1):
        g = {k: np.asarray(v, np.float64) for k, v in _flat(grads).items()}
        new = {k: v - RATE * g[k] for k, v in p.items()}
        if t < 16:
            for k in p:
                i = np.abs((p if importance == "before" else new)[k] * g[k])
                mean[k] = 0.85 * mean[k] + 0.15 * i
                spread[k] = 0.85 * spread[k] + 0.15 * np.abs(i - mean[k])
        p = new
        if t > 3 and (t % 3 == 0 and t < 16 or t == 16):
            n = sum(len(v) for k, v in p.items() if k[-1] == "e")
            left = int((n - n // 5 * 2) * (1 - (t - 3) / 13) ** 3 + n // 5 * 2)
            s = {k: mean[k] * spread[k] for k in p}
            names = [k[:-1] for k in p if k[-1] == "e"]
            score = {
                (*k, i): s[*k, "e"][i] + s[*k, "a"][:, i].mean() + s[*k, "b"][i].mean() for k in names for i in range(5)
            }
            dead = sorted(score, key=score.get)[: n - left]
            dead_for_good = dead if t == 16 else None
            for k in dead:
                p[*k[:-1], "e"][k[-1]] = 0
        if dead_for_good:
            for k in dead_for_good:
                p[*k[:-1], "e"][k[-1]] = 0
        for k, v in _flat(after[t - 1]).items():
            np.testing.assert_allclose(v, p[k], rtol=1e-4, atol=1e-6, err_msg=f"step {t}, {k}")


def _flat(delta):
    """{(path, batch index, field): matrix with a triplet per column of a, row of b}."""
    out = {}
    for path, one in delta.items():
        for i in range(len(one.ranks)):
            out[path, i, "a"] = np.asarray(one.a).reshape(len(one.ranks), -1, one.e.shape[-1])[i]
            out[path, i, "e"] = np.asarray(one.e).reshape(len(one.ranks), -1)[i]
            out[path, i, "b"] = np.asarray(one.b).reshape(len(one.ranks), one.e.shape[-1], -1)[i]
    return out


def test_the_budget_is_met_exactly_and_then_fixed():
    adapter, delta, gradients = started()
    after, state = trained(adapter, delta, gradients)
    counts = [sum(int(p.sum()) for p in alive(d).values()) for d in after]
    assert counts[:5] == [10] * 5 and counts[15:] == [4] * 5, counts
    for d in after[16:]:
        bits_equal(alive(d), alive(after[15]))
    assert {type(x) for x in jax.tree.leaves(state)} == {type(jnp.zeros(()))}, "a checkpoint holds arrays alone"
    assert after[-1]["layers_0/kernel"].a.shape == (8, 5), "A and B stay as they are"


def test_a_pruned_triplet_may_come_back_until_the_end():
    adapter, delta, gradients = started(total=40, interval=1, importance="after", beta1=0.3, beta2=0.3)
    after, _ = trained(adapter, delta, gradients, rate=0.2)
    patterns = [np.concatenate([p.reshape(-1) for p in alive(d).values()]) for d in after]
    back = [t for t in range(1, 40) if np.any(patterns[t] & ~patterns[t - 1])]
    assert back and max(back) <= 35


def test_layers_that_are_left_out_never_live():
    adapter, delta, gradients = started(kind="scan", layers="last:1")
    (path, one), *_ = delta.items()
    assert one.ranks == (0, 5) and one.budget == (0, 2)
    second = lambda one: jax.tree.map(lambda x: x.at[0].set(0), one)  # noqa: E731
    after, _ = trained(adapter, {path: second(one)}, [{path: second(grads[path])} for grads in gradients])
    assert alive(after[-1])[path].sum(axis=1).tolist() == [0, 2]


def test_start_ranks():
    site = kinds.get("dense")

    def ranks(**options):
        made = kinds.make("adalora", site, **options).init(jax.random.key(0), site.variables, site.sites)
        return {p.split("/")[0]: (d.ranks, d.budget, d.scales) for p, d in made.items()}

    assert ranks(rank=3, alpha=10)["layers_0"] == ((5,), (3,), (2.0,))
    assert ranks(rank=6, alpha=8)["layers_0"] == ((8,), (6,), (1.0,)), "a weight of 8 x 8 has no rank 9"
    assert ranks(rank={"layers_0.*": 0, ".*": 2}, init_rank=4) == {"layers_1": ((4,), (2,), (1.0,))}
    with pytest.raises(lj.UserError, match="init_rank 1 is below rank 2 at 'layers_0/kernel'"):
        ranks(rank=2, init_rank=1)
    with pytest.raises(lj.UserError, match="rank 9 is above min"):
        ranks(rank=2, init_rank=9)


@pytest.mark.parametrize("kind", ["dense", "scan", "heads in"])
def test_penalty_by_hand(kind):
    _, delta, _ = started(kind=kind)
    flat = {k: np.asarray(v, np.float64) for k, v in _flat(delta).items()}
    grams = [v.T @ v if k[-1] == "a" else v @ v.T for k, v in flat.items() if k[-1] != "e"]
    squares = [((g - np.eye(5)) ** 2).sum() for g in grams]
    np.testing.assert_allclose(method.orthogonal_penalty(delta), sum(squares), rtol=1e-5)
    np.testing.assert_allclose(method.orthogonal_penalty(delta, "mean"), np.sqrt(squares).mean(), rtol=1e-5)
    assert started(kind=kind, orth_weight=0)[0].penalty is None
    np.testing.assert_allclose(started(kind=kind, orth_weight=0.3)[0].penalty(delta), 0.3 * sum(squares), rtol=1e-5)


def test_the_mean_penalty_has_gradients_where_a_layer_is_left_out():
    adapter, _, _ = started(kind="scan", layers="last:1", orthogonality="mean")
    site = kinds.get("scan")
    delta = adapter.init(jax.random.key(0), site.variables, site.sites)
    for x in jax.tree.leaves(jax.grad(adapter.penalty)(delta)):
        assert np.all(np.isfinite(x))
        if x.ndim > 2:
            assert not np.any(x[0]) and np.any(x[1])


@pytest.mark.peers
def test_masks_are_those_of_pefts_allocator():
    """The same weights and gradients into PEFT's RankAllocator: the same triplets live after every step."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    adapter, delta, gradients = started(importance="after")
    after, _ = trained(adapter, delta, gradients)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    config = peft.AdaLoraConfig(
        init_r=5, target_r=2, tinit=3, tfinal=4, deltaT=3, total_step=20, target_modules=["0", "1"]
    )
    theirs = peft.get_peft_model(model, config)
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=RATE)
    layers = [(theirs.base_model.model[i], f"layers_{i}/kernel") for i in range(2)]

    def paired(tree):
        for layer, path in layers:
            one = tree[path]
            for field, value in (("A", one.a.T), ("E", one.e[:, None]), ("B", one.b.T)):
                yield getattr(layer, f"lora_{field}")["default"], torch.tensor(np.asarray(value))

    with torch.no_grad():
        for p, value in paired(delta):
            p.copy_(value)
    for t, grads in enumerate(gradients, start=1):
        for p, value in paired(grads):
            p.grad = value
        optimizer.step()
        theirs.base_model.update_and_allocate(t)
        for p, value in paired(after[t - 1]):
            np.testing.assert_allclose(p.detach().numpy(), value.numpy(), rtol=1e-4, atol=1e-6, err_msg=f"step {t}")
    assert sum(int(p.sum()) for p in alive(after[-1]).values()) == 4


@pytest.mark.peers
def test_the_mean_penalty_is_pefts():
    torch = pytest.importorskip("torch")
    _, delta, _ = started()
    norms = []
    for one in delta.values():
        for p in (torch.tensor(np.asarray(one.a.T)), torch.tensor(np.asarray(one.b))):
            norms.append(torch.norm(p @ p.T - torch.eye(5), p="fro"))
    np.testing.assert_allclose(method.orthogonal_penalty(delta, "mean"), float(sum(norms) / len(norms)), rtol=1e-5)


def run(workdir, adapter, **settings):
    settings = {"steps": 12, "batch_size": 8, "learning_rate": 2e-2, "log_every": 4} | settings
    base, splits = standin.make_base(), standin.make_splits()
    return fit(base, adapter, standin.make_task(), splits, TrainSettings(**settings), workdir, seed=5, echo=None)


@pytest.mark.parametrize("settings", [{}, {"steps": 0, "epochs": 4.0}])
def test_a_real_run_ends_with_the_budget(tmp_path, settings):
    """In a chain with weights trained in place; `fit` tells the method how long the run is."""
    ours = lj.adalora(rank=2, targets="(up|down)/kernel", interval=2)
    summary = run(tmp_path, lj.chain(ours, lj.full(targets="down/bias")), **settings)
    pattern = rank_pattern(summary.delta)
    assert set(pattern) == {"up/kernel", "down/kernel"} and sum(int(p.sum()) for p in pattern.values()) == 4
    assert math.isfinite(summary["dev"]["loss"])


def test_the_length_of_the_run_must_be_known():
    with pytest.raises(lj.UserError, match=r"give adalora\(total_steps=...\)"):
        lj.adalora().wrap(optax.sgd(0.1))
    told = lj.adapters.for_steps(lj.chain(lj.chain(lj.adalora()), lj.adalora(total_steps=7), lj.lora()), 50)
    first, second, third = told.spec["adapters"]
    assert first["adapters"][0]["total_steps"] == 50 and second["total_steps"] == 7 and "total_steps" not in third
    same = lj.lora()
    assert lj.adapters.for_steps(same, 50) is same


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"orthogonality": "mena"}, "adalora: orthogonality='mena' is unknown; did you mean 'mean'?"),
        ({"importance": "aftr"}, "adalora: importance='aftr' is unknown; did you mean 'after'?"),
        ({"beta1": 1.0}, "beta1=1.0: expected a number from 0 to below 1"),
        ({"beta2": -0.1}, "beta2=-0.1: expected a number from 0 to below 1"),
        ({"tinit": -1}, "tinit=-1: give a number of steps, or a fraction of all steps below 1"),
        ({"tfinal": 2.5}, "tfinal=2.5: a number of steps must be whole"),
        ({"interval": 0}, "interval=0: expected a whole number of steps, at least 1"),
        ({"orth_weight": -1}, "orth_weight=-1: expected a number of at least 0"),
        ({"total_steps": 2.0}, "total_steps=2.0: expected a whole number of at least 1"),
        ({"tinit": 8, "tfinal": 2, "total_steps": 10}, "tinit=8 and tfinal=2 leave none of the run's 10 steps"),
    ],
)
def test_mistakes(options, message):
    site = kinds.get("dense")
    with pytest.raises(lj.UserError) as caught:
        adapter = lj.adalora(rank=2, **options)
        delta = adapter.init(jax.random.key(0), site.variables, site.sites)
        tx = adapter.wrap(optax.sgd(0.1))
        tx.update(delta, tx.init(delta), delta)
    assert message in str(caught.value)
