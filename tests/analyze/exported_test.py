"""What analysis makes out of adapters goes into PEFT's files and back like any other adapter."""

import jax
import pytest

import lora_jax as lj
from lora_jax.models import from_config
from tests.analyze.worlds import merged_update, near
from tests.lift.checks import noisy
from tests.models import oracle


def trained(base, rank, seed):
    adapter = lj.chain(lj.lora(rank=rank, alpha=7, targets="q,down", scaling="alpha/sqrt(r)"), lj.head())
    shapes = jax.eval_shape(lambda v: adapter.init(jax.random.key(0), v, base.sites), base.variables)
    return adapter, noisy(shapes, seed=seed)


@pytest.mark.parametrize("how", ["truncate", "cat", "linear", "recombine"])
def test_save_peft(how, tmp_path):
    base = from_config(oracle.ENCODER, num_labels=3)
    pairs = [trained(base, 3, 1), trained(base, 3, 2)]
    if how == "truncate":
        adapter, delta = lj.truncate(*pairs[0], 2)
    else:
        given = {"rank": 2} if how == "recombine" else {}
        adapter, delta = getattr(lj, how)(pairs, weights=[0.5, 0.5], **given)
    lj.save_peft(tmp_path, adapter, delta, base)
    again = merged_update(*lj.load_peft(tmp_path, base), base.variables)
    expected = merged_update(adapter, delta, base.variables)
    assert set(again) == set(expected) and len(expected) == 8
    for path, update in expected.items():
        near(again[path], update)
        assert update.any()
