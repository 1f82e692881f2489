"""Exact evaluation: every example once, whatever the batch size; one value per example in order."""

import jax
import numpy as np
import pytest
import standin

import lora_jax as lj
from lora_jax import evaluate
from lora_jax.data import Batches

TASK = standin.make_task()
RECORDS = standin.make_records(11)
EXAMPLES = [TASK.encode(r) for r in RECORDS]
LORA = lj.lora(rank=2)


@pytest.fixture(scope="module")
def world():
    base = standin.make_base()
    delta = jax.tree.map(lambda x: x + 0.1, LORA.init(jax.random.key(0), base.variables, base.sites))
    return base, delta, evaluate.make_eval_step(lj.lift(base.apply), LORA, TASK)


def by_hand(base, delta):
    """Loss of each example by itself, no batch and no padding, from the merged weights."""
    dense, out = LORA.merge(base.variables, delta), []
    for e in EXAMPLES:
        logits = np.asarray(base.apply(dense, e["tokens"][None])[0], np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        out.append(-sum(w * logp[i, t] for i, (t, w) in enumerate(zip(e["targets"], e["weights"], strict=True))))
    return out


@pytest.mark.parametrize("batch_size", [4, 11])
def test_sums_are_exact_with_an_uneven_last_batch(world, batch_size):
    base, delta, step = world
    batches = Batches(EXAMPLES, batch_size=batch_size, buckets=[6])
    found = evaluate.evaluate(step, base.variables, delta, TASK, batches)
    losses, weight = by_hand(base, delta), sum(e["weights"].sum() for e in EXAMPLES)
    np.testing.assert_allclose(found.metrics["loss"], sum(losses) / weight, rtol=1e-5)
    np.testing.assert_allclose(found.values["loss"], losses, rtol=1e-5)
    assert found.tokens == sum(len(e["tokens"]) for e in EXAMPLES)


def test_the_delta_counts_and_none_is_the_base(world):
    base, delta, step = world
    batches = Batches(EXAMPLES, batch_size=4, buckets=[6])
    alone = evaluate.make_eval_step(base.apply, None, TASK)
    bare = evaluate.evaluate(alone, base.variables, None, TASK, batches).metrics["loss"]
    adapted = evaluate.evaluate(step, base.variables, delta, TASK, batches).metrics["loss"]
    assert abs(bare - adapted) > 1e-2


def test_predictions_are_one_line_per_example_in_order(world):
    base, delta, step = world

    class Shuffled(Batches):
        def in_order(self):
            return reversed(list(super().in_order()))

    found = evaluate.evaluate(step, base.variables, delta, TASK, Shuffled(EXAMPLES, batch_size=4, buckets=[6]))
    lines = evaluate.predictions(TASK, RECORDS, found)
    assert [line["id"] for line in lines] == list(range(11))
    assert [line["tokens"] for line in lines] == [r.values["tokens"] for r in RECORDS]
    np.testing.assert_allclose([line["loss"] for line in lines], by_hand(base, delta), rtol=1e-5)


def test_an_example_that_is_missing_or_comes_twice_is_an_error(world):
    base, delta, step = world

    class Twice(Batches):
        def in_order(self):
            return [next(super().in_order())] * 2

    with pytest.raises(RuntimeError, match="every example exactly once"):
        evaluate.evaluate(step, base.variables, delta, TASK, Twice(EXAMPLES, batch_size=4, buckets=[6]))


def test_it_stops_when_told(world):
    base, delta, step = world
    batches = Batches(EXAMPLES, batch_size=4, buckets=[6])
    answers = iter([False, True])
    assert evaluate.evaluate(step, base.variables, delta, TASK, batches, stop=lambda: next(answers)) is None
