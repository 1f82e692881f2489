"""Checkpoints: round trip, what stays, what a damaged or foreign one says."""

import jax
import jax.numpy as jnp
import pytest
import standin

from lora_jax import UserError, sharding
from lora_jax.checkpoint import Checkpoints


def make_state(value=0.0, rank=2):
    return {
        "delta": {"layers_0/q/kernel": (jnp.full((4, rank), value), None)},
        "half": jnp.full((3,), value, jnp.bfloat16),
        "step": jnp.asarray(int(value), jnp.int32),
    }


def test_round_trip_with_meta(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.steps() == []
        checkpoints.save(3, make_state(3.0), {"pending": [[0.1, None]], "best": {"loss": 1e-30}})
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.steps() == [3]
        assert checkpoints.meta(3) == {"pending": [[0.1, None]], "best": {"loss": 1e-30}}
        assert standin.same(checkpoints.restore(3, make_state()), make_state(3.0))


def test_the_newest_and_the_best_stay(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (5, 10, 15, 20, 25):
            checkpoints.save(step, make_state(step), {}, best=10 if step >= 10 else 5)
        checkpoints.wait()
        assert checkpoints.steps() == [10, 20, 25]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(30, make_state(30), {}, best=10)
        checkpoints.save(35, make_state(35), {}, best=35)
        checkpoints.wait()
        assert checkpoints.steps() == [35]


def test_a_step_can_be_saved_again(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, make_state(1.0), {"n": 1})
        checkpoints.save(4, make_state(2.0), {"n": 2})
        checkpoints.wait()
        assert checkpoints.meta(4) == {"n": 2}
        assert standin.same(checkpoints.restore(4, make_state()), make_state(2.0))


def test_restoring_to_another_mesh(tmp_path):
    def place(mesh):
        return jax.device_put(make_state(7.0), sharding.sharding(mesh, jax.sharding.PartitionSpec()))

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, place(sharding.make_mesh(8)), {})
        target = place(sharding.make_mesh(2, 2))
        found = checkpoints.restore(1, target)
        assert found["half"].sharding == target["half"].sharding
        assert standin.same(found, make_state(7.0))


@pytest.mark.parametrize(
    "target,message",
    [
        (make_state(rank=3), r"delta.*is float32\[4, 2\] in the checkpoint and float32\[4, 3\] in this run"),
        ({**make_state(), "half": jnp.zeros((3,))}, r"\['half'\] is bfloat16\[3\] in the checkpoint and float32\[3\]"),
        ({**make_state(), "more": jnp.zeros(2)}, r"\['more'\] is missing in the checkpoint and float32\[2\]"),
        ({"half": make_state()["half"]}, r"is float32\[4, 2\] in the checkpoint and missing in this run"),
    ],
)
def test_another_configuration_is_named(tmp_path, target, message):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), {})
        with pytest.raises(UserError, match=message):
            checkpoints.restore(1, target)


def test_a_flipped_bit_is_found(tmp_path):
    state = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.save(2, state, {})
        checkpoints.wait()
        file = max((p for p in (tmp_path / "2" / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=r"2 is damaged: .*Remove this folder; the run then goes on from step 1"):
            checkpoints.restore(2, state)
        assert standin.same(checkpoints.restore(1, state), state)


def test_unfinished_checkpoints_are_not_seen(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), {})
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
