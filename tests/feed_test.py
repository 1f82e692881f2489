"""Batches on their way: order, errors from the thread, an end on close; and steps in flight."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import UserError, feed, sharding


def test_order_is_kept_and_work_is_done_ahead():
    made = []

    def make(i):
        made.append(i)
        return i * i

    fed = feed.prefetch(range(6), make, depth=2)
    assert next(fed) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    # One handed out, two waiting, one in the thread's hands: never the whole split.
    assert made == [0, 1, 2, 3]
    assert list(fed) == [1, 4, 9, 16, 25]


def test_an_error_of_the_thread_comes_at_its_batch():
    def make(i):
        if i == 2:
            raise UserError("bad line 3")
        return i

    fed = feed.prefetch(range(5), make)
    assert [next(fed), next(fed)] == [0, 1]
    with pytest.raises(UserError, match="bad line 3"):
        next(fed)


def test_closing_ends_the_thread():
    def count():
        return sum(t.name == "batches" for t in threading.enumerate())

    before = count()
    fed = feed.prefetch(iter(int, 1), lambda x: x)
    next(fed)
    assert count() == before + 1
    fed.close()
    assert count() == before


def test_placing_counts_tokens_and_splits_the_rows():
    batch = {
        "tokens": np.ones((8, 3), np.int32),
        "segment_ids": np.tile([1, 1, 0], (8, 1)),
        "ids": np.arange(8)[:, None],
    }
    fed = feed.place(batch, sharding.make_mesh(2, 2))
    assert fed.tokens == 16 and fed.ids is batch["ids"]
    assert fed.arrays["tokens"].addressable_shards[0].data.shape == (2, 3)


def test_a_batch_without_a_target_is_an_error():
    batch = {"tokens": np.ones((2, 3), np.int32), "weights": np.zeros((2, 3), np.float32)}
    with pytest.raises(UserError, match="a batch has no token with a target"):
        feed.place(batch, None)
    assert feed.place(batch, None, check=False).tokens == 6


def test_throttle_waits_for_old_results_only(monkeypatch):
    waited = []
    monkeypatch.setattr(feed.jax, "block_until_ready", waited.append)
    throttle = feed.Throttle(depth=3)
    for i in range(5):
        throttle(i)
    assert waited == [0, 1]


def test_on_a_cpu_the_host_waits_for_each_result():
    work = jax.jit(lambda x: jax.lax.fori_loop(0, 200, lambda _, x: jnp.tanh(x @ x), x))
    result = work(jnp.ones((256, 256)))
    feed.Throttle()(result)
    assert result.is_ready()
