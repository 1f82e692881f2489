"""Schedules, AdamW, clipping, weight decay, LoRA+, and the split into trainable and frozen leaves."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import UserError, optim
from lora_jax.lift import Axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pair:
    a: Any
    b: Any
    axes: Axes = dataclasses.field(default=Axes((), (0,), (1,)), metadata={"static": True})
    layout: ClassVar = {"a": ("batch", "fan_in", "rank"), "b": ("batch", "rank", "fan_out")}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Copy:
    value: Any
    axes: Axes = dataclasses.field(default=Axes(), metadata={"static": True})
    layout: ClassVar = {}


def delta():
    return {"x/kernel": Pair(a=jnp.full((3, 2), 0.5), b=jnp.full((2, 4), -0.25))}


def gradients():
    return {"x/kernel": Pair(a=jnp.arange(6.0).reshape(3, 2) - 2.0, b=jnp.ones((2, 4)))}


def one_update(tx, params, grads):
    updates, _ = tx.update(grads, tx.init(params), params)
    return optax.apply_updates(params, updates)


def by_hand(p, g, step, lr, *, b1=0.9, b2=0.999, eps=1e-8, decay=0.0, m=0.0, v=0.0):
    """One AdamW update in float64, from the paper."""
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    hat_m, hat_v = m / (1 - b1**step), v / (1 - b2**step)
    return p - lr * (hat_m / (np.sqrt(hat_v) + eps) + decay * p), m, v


@pytest.mark.parametrize(
    "kind,count,expected",
    [
        ("constant", 0, 0.0),  # warm-up of 4 steps: the first update has rate 0
        ("constant", 2, 0.5),
        ("constant", 4, 1.0),
        ("constant", 19, 1.0),
        ("linear", 4, 1.0),
        ("linear", 12, 0.5),
        ("linear", 20, 0.0),
        ("cosine", 3, 0.75),
        ("cosine", 12, 0.5),
        ("cosine", 8, 0.5 * (1 + math.cos(math.pi / 4))),
    ],
)
def test_schedule(kind, count, expected):
    rate = optim.make_schedule(kind, 2e-3, 20, warmup=4)
    np.testing.assert_allclose(rate(count), 2e-3 * expected, atol=1e-9)


def test_warmup_is_steps_or_a_fraction():
    assert optim.warmup_steps(0.06, 201) == 13  # rounded up
    assert optim.warmup_steps(10.0, 201) == 10
    assert optim.warmup_steps(0, 201) == 0


@pytest.mark.parametrize(
    "warmup,message",
    [(2.5, "must be whole"), (-1, "a number of steps"), (20, "the run has 20"), (True, "give a number")],
)
def test_bad_warmup(warmup, message):
    with pytest.raises(UserError, match=message):
        optim.make_schedule("linear", 1e-3, 20, warmup)


def test_unknown_schedule_names_the_nearest():
    with pytest.raises(UserError, match="train.schedule='cosin'.*did you mean 'cosine'"):
        optim.make_schedule("cosin", 1e-3, 20)


def test_adamw_equals_the_formula_over_three_steps():
    tx = optim.make_optimizer(1e-2, weight_decay=0.1, eps=1e-3, b1=0.8, b2=0.95)
    params, state = delta(), None
    state = tx.init(params)
    p, m, v = np.asarray(params["x/kernel"].a, np.float64), 0.0, 0.0
    for step in (1, 2, 3):
        grads = jax.tree.map(lambda g, s=step: g * s, gradients())
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        g = np.asarray(grads["x/kernel"].a, np.float64)
        p, m, v = by_hand(p, g, step, 1e-2, b1=0.8, b2=0.95, eps=1e-3, decay=0.1, m=m, v=v)
    np.testing.assert_allclose(params["x/kernel"].a, p, rtol=1e-6)


def test_clipping_bounds_the_global_norm():
    # eps far above the gradients makes the update proportional to the clipped gradient.
    grads, tx = gradients(), optim.make_optimizer(1e6, clip_norm=0.1, eps=1e6)
    free = optim.make_optimizer(1e6, eps=1e6)
    norm = float(optax.global_norm(grads))
    moved, far = (jax.tree.map(jnp.subtract, delta(), one_update(t, delta(), grads)) for t in (tx, free))
    np.testing.assert_allclose(moved["x/kernel"].a, far["x/kernel"].a * 0.1 / norm, rtol=1e-4, atol=1e-6)


def test_only_matrices_and_factors_decay():
    whole = lambda shape, **axes: Copy(jnp.ones(shape), Axes(**axes))  # noqa: E731
    tree = {
        "kernel": whole((3, 4), fan_in=(0,), fan_out=(1,)),
        "bias": whole((4,), batch=()),
        "stacked bias": whole((2, 4), batch=(0,)),  # two axes, and no matrix
        "heads bias": whole((2, 4), batch=()),
        "lora": Pair(jnp.ones((3, 2)), jnp.ones((2, 4))),
    }
    mask = optim.decay_mask(tree)
    assert [mask[k].value for k in ("kernel", "bias", "stacked bias", "heads bias")] == [True, False, False, False]
    assert mask["lora"].a is True and mask["lora"].b is True
    tx = optim.make_optimizer(1.0, weight_decay=0.5)
    out = one_update(tx, tree, jax.tree.map(jnp.zeros_like, tree))
    np.testing.assert_allclose(out["kernel"].value, 0.5)
    np.testing.assert_array_equal(out["stacked bias"].value, 1.0)


def test_a_vector_of_an_entry_does_not_decay():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Scale:
        s: Any
        axes: Axes = dataclasses.field(default=Axes((0,), (1,), (2,)), metadata={"static": True})
        layout: ClassVar = {"s": ("batch", "fan_out")}

    assert optim.decay_mask({"x": Scale(jnp.ones((5, 4)))})["x"].s is False


def test_lora_plus_multiplies_the_rate_of_b_alone():
    plain = one_update(optim.make_optimizer(1e-2, weight_decay=0.1), delta(), gradients())["x/kernel"]
    plus = one_update(optim.make_optimizer(1e-2, weight_decay=0.1, lora_plus_ratio=16.0), delta(), gradients())[
        "x/kernel"
    ]
    start = delta()["x/kernel"]
    np.testing.assert_array_equal(plus.a, plain.a)
    np.testing.assert_allclose(plus.b - start.b, 16 * (plain.b - start.b), rtol=1e-5)


def test_lora_plus_without_b_is_an_error():
    with pytest.raises(
        UserError, match="lora_plus_ratio needs trainable factors called 'b'; this adapter trains only value"
    ):
        optim.make_optimizer(1e-2, lora_plus_ratio=4.0).init({"x": Copy(jnp.ones((3, 4)))})


def test_split_and_join():
    tree = delta()
    mask = {"x/kernel": Pair(a=False, b=True)}
    chosen, rest = optim.split(tree, mask)
    assert chosen["x/kernel"].a is None and rest["x/kernel"].b is None
    assert len(jax.tree.leaves(chosen)) == len(jax.tree.leaves(rest)) == 1
    joined = optim.join(mask, chosen, rest)
    assert jax.tree.structure(joined) == jax.tree.structure(tree)
    np.testing.assert_array_equal(joined["x/kernel"].a, tree["x/kernel"].a)
    # Slots exist for the trainable leaf alone: Adam keeps two of its size, and nothing of A's.
    slots = optim.make_optimizer(1e-2).init(chosen)
    assert sorted(x.shape for x in jax.tree.leaves(slots) if x.ndim) == [(2, 4), (2, 4)]
