"""One step: micro-batches, the frozen base, donation, dropout keys, penalty, meshes, no recompilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import standin

import lora_jax as lj
from lora_jax import optim, sharding, trees
from lora_jax.data import Batches
from lora_jax.step import delta_of, init_state, make_train_step, step_keys
from lora_jax.train import state_shardings

TASK = standin.make_task()
BATCHES = Batches([TASK.encode(r) for r in standin.make_records(24)], batch_size=8, buckets=[6])
LORA = lj.lora(rank=2, init="a_zero")


def make_tx():
    # An epsilon far above rounding: else Adam turns gradients of about 1e-9 into full updates, in any direction.
    return optim.make_optimizer(1e-2, clip_norm=1.0, eps=1e-5)


def set_up(base, adapter, **options):
    delta = adapter.init(jax.random.key(1), base.variables, base.sites)
    mask = adapter.trainable(delta)
    step = make_train_step(lj.lift(base.apply), adapter, TASK, make_tx(), mask, **options)
    return step, init_state(delta, mask, make_tx(), seed=3), mask


def go(step, state, mask, variables, steps=3):
    numbers = []
    for i in range(steps):
        state, found = step(state, variables, BATCHES[i])
        numbers.append(jax.device_get(found))
    return jax.device_get(delta_of(state, mask)), numbers


def run(base, adapter, steps=3, **options):
    return go(*set_up(base, adapter, **options), base.variables, steps)


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.fixture(scope="module")
def compiled():
    """(step, state, mask) of plain LoRA on one device; the state is for copying, since a step donates it."""
    return set_up(standin.make_base(), LORA)


@pytest.fixture
def plain(compiled):
    step, state, mask = compiled
    return step, jax.tree.map(lambda x: jnp.array(x, copy=True), state), mask


@pytest.fixture(scope="module")
def alone(compiled):
    """(delta, numbers) after three steps of it."""
    step, state, mask = compiled
    return go(step, jax.tree.map(lambda x: jnp.array(x, copy=True), state), mask, standin.make_base().variables)


def test_the_update_is_that_of_the_mean_loss_over_targets():
    """Against jax.grad of the plain model, for a kernel trained in place."""
    base = standin.make_base()
    delta, (numbers,) = run(base, lj.full(targets="down/kernel"), steps=1)
    batch = BATCHES[0]

    def mean_loss(kernel):
        outputs = base.apply(trees.replace(base.variables, {"down/kernel": kernel}), batch["tokens"])
        total, weight = TASK.loss(outputs, batch)
        return total / weight

    kernel = base.variables["params"]["down"]["kernel"]
    loss, gradient = jax.jit(jax.value_and_grad(mean_loss))(kernel)
    np.testing.assert_allclose(numbers["loss_sum"] / numbers["weight"], loss, rtol=1e-6)
    np.testing.assert_allclose(numbers["grad_norm"], np.linalg.norm(gradient), rtol=1e-5)
    gradient = gradient / max(1.0, np.linalg.norm(gradient))
    expected = kernel - 1e-2 * gradient / (abs(gradient) + 1e-5)  # AdamW's first update
    np.testing.assert_allclose(delta["down/kernel"].value, expected, rtol=1e-4, atol=1e-5)


def test_accumulated_equals_one_large_batch(alone):
    """Rows of a batch have 1 to 5 target tokens, so that a mean of means would differ."""
    delta, numbers = run(standin.make_base(), LORA, accumulate=4)
    close(numbers, alone[1], rtol=2e-5)
    close(delta, alone[0], rtol=1e-3, atol=1e-5)


def test_only_trainable_leaves_have_slots_and_move():
    base = standin.make_base()
    frozen_a = LORA._replace(
        trainable=lambda delta: {p: type(one)(**{**vars(one), "a": False, "b": True}) for p, one in delta.items()}
    )
    step, state, mask = set_up(base, frozen_a)
    sizes = {x.size for x in jax.tree.leaves(state.opt_state)}
    assert sizes == {1, 2 * 16, 2 * 12}  # the counters, and B of `up` and of `down`
    state = state._replace(frozen=jax.tree.map(jnp.ones_like, state.frozen))
    before = jax.device_get(delta_of(state, mask))["up/kernel"]
    after = go(step, state, mask, base.variables, 1)[0]["up/kernel"]
    assert standin.same(after.a, before.a) and not standin.same(after.b, before.b)


def test_the_base_is_bit_unchanged_although_the_delta_starts_as_its_own_arrays():
    base = standin.make_base()
    before = jax.tree.map(np.array, base.variables)
    delta, _ = run(base, lj.full(), steps=2)
    assert standin.same(base.variables, before)
    assert not standin.same(delta["up/kernel"].value, before["params"]["up"]["kernel"])


def test_the_state_is_donated_and_the_base_is_not(plain):
    base, (step, state, _) = standin.make_base(), plain
    old = jax.tree.leaves((state.trainable, state.opt_state))
    step(state, base.variables, BATCHES[0])
    assert all(leaf.is_deleted() for leaf in old)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(base.variables))


def test_later_steps_and_other_seeds_do_not_recompile(plain):
    step, state, mask = plain
    go(step, state._replace(seed=state.seed + 5), mask, standin.make_base().variables)
    assert step._cache_size() == 1


def test_dropout_follows_seed_step_and_micro_batch():
    cases = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)]
    draws = [np.asarray(jax.random.key_data(jnp.stack(step_keys(jnp.uint32(s), jnp.int32(i), m)))) for s, i, m in cases]
    assert len({d.tobytes() for d in draws}) == 4 and draws[0].tobytes() == draws[4].tobytes()
    assert draws[0][0].tobytes() != draws[0][1].tobytes()


@pytest.mark.parametrize("where", ["adapter", "base"])
def test_dropout_reaches_the_adapter_and_the_base(where, alone):
    base = standin.make_base(dropout=0.5 if where == "base" else 0.0)
    adapter = lj.lora(rank=2, init="a_zero", dropout=0.5 if where == "adapter" else 0.0)
    step, state, mask = set_up(base, adapter)
    again = jax.tree.map(lambda x: jnp.array(x, copy=True), state)
    first, _ = go(step, state, mask, base.variables)
    assert not standin.same(first, alone[0])
    assert standin.same(first, go(step, again, mask, base.variables)[0])


def test_a_penalty_is_added_once_whatever_the_micro_batches(alone):
    base = standin.make_base()
    adapter = LORA._replace(penalty=lambda d: 3.0 * sum(jnp.sum(e.b**2) for e in d.values()))
    whole, numbers = run(base, adapter)
    cut, found = run(base, adapter, accumulate=4)
    close(cut, whole, rtol=1e-3, atol=1e-5)
    close(found, numbers, rtol=1e-4)
    b = LORA.init(jax.random.key(1), base.variables, base.sites)
    np.testing.assert_allclose(numbers[0]["penalty"], 3 * sum(np.sum(np.square(e.b)) for e in b.values()), rtol=1e-5)
    assert numbers[0]["grad_norm"] > 1.01 * alone[1][0]["grad_norm"]


@pytest.mark.parametrize("sizes", [(2, 2, 2), (8, 1, 1)])
def test_a_mesh_gives_the_result_of_one_device(sizes, alone):
    """Three AdamW steps in float32; sums in another order, hence the tolerance."""
    base, mesh = standin.make_base(), sharding.make_mesh(*sizes)
    _, state, mask = set_up(base, LORA)
    specs = sharding.base_specs(base.variables, base.family.sharding, mesh)
    places = state_shardings(state, mask, specs, mesh)
    variables = sharding.place_base(base.variables, specs, mesh)
    step = make_train_step(lj.lift(base.apply), LORA, TASK, make_tx(), mask, out_shardings=places)
    state = jax.device_put(state, places)
    with sharding.use(mesh):
        for i in range(3):
            batch = jax.device_put(BATCHES[i], sharding.sharding(mesh, sharding.BATCH))
            state, found = step(state, variables, batch)
            close(jax.device_get(found), alone[1][i], rtol=1e-4)
    assert step._cache_size() == 1
    close(jax.device_get(delta_of(state, mask)), alone[0], rtol=1e-3, atol=1e-5)
    if sizes == (2, 2, 2):
        assert state.trainable["up/kernel"].b.sharding.spec == jax.sharding.PartitionSpec(None, "tensor")
        assert state.opt_state[1].mu["up/kernel"].b.sharding == state.trainable["up/kernel"].b.sharding
