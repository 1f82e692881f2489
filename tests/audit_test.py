"""The audit: what it counts and shows, and where it refuses to go on."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj
from tests.lift.checks import noisy, weights

VARIABLES = {
    "params": {
        **{
            f"layers_{i}": {n: {"kernel": weights(8, 8, seed=3 * i + j)} for j, n in enumerate("qkv")} for i in range(2)
        },
        "score": {"kernel": weights(8, 2), "bias": jnp.zeros(2)},
    }
}


def apply(variables, x, scale=1.0):
    p = variables["params"]
    for i in range(2):
        q, k, v = (x @ p[f"layers_{i}"][n]["kernel"] for n in "qkv")
        x = x + jnp.tanh(q * k) * v
    return x @ p["score"]["kernel"] * scale + p["score"]["bias"][None]


X = weights(4, 8)
SITES = lj.find_sites(apply, VARIABLES, X)


def start(adapter, sites=SITES, variables=VARIABLES):
    return adapter.init(jax.random.key(0), variables, sites)


def test_what_it_counts():
    adapter = lj.chain(
        lj.lora(rank=[(".*q.*", 3), (".*", 2)], targets=[".*/q/kernel", ".*/v/kernel"]), lj.full(targets="score/.*")
    )
    report = lj.audit(adapter, start(adapter), VARIABLES, SITES, apply, X, scale=2.0)
    assert [(r.path, r.sites, r.shape, r.what, r.rule, r.trainable) for r in report.rows] == [
        ("layers_*/q/kernel", 2, (8, 8), "lora, rank 3", ".*/q/kernel", 2 * 3 * 16),
        ("layers_*/v/kernel", 2, (8, 8), "lora, rank 2", ".*/v/kernel", 2 * 2 * 16),
        ("score/bias", 1, (2,), "full", "score/.*", 2),
        ("score/kernel", 1, (8, 2), "full", "score/.*", 16),
    ]
    assert (report.trainable, report.frozen, report.total) == (178, 0, 6 * 64 + 18)
    assert report.difference is not None and report.difference < 1e-6
    text = str(report)
    assert "layers_*/q/kernel  2      8x8    lora, rank 3  .*/q/kernel  96" in text
    assert "trainable 178 beside 402 of the base (44.28 %)" in text
    assert "first output equals the base's" in text


def test_text_of_a_difference():
    report = lj.audit(lj.lora(2), start(lj.lora(2)), VARIABLES, SITES, notes=("a note",))
    assert report.difference is None and "first output" not in str(report) and str(report).endswith("\na note")
    shown = lambda difference: str(dataclasses.replace(report, difference=difference))  # noqa: E731
    assert "first output equals the base's exactly" in shown(0.0)
    assert "first output equals the base's to rounding (3e-07 of the largest entry)" in shown(3e-7)
    assert report.rows[0].rule == "lora's default"


def test_padded_columns_of_a_stack_do_not_count():
    variables = {"layers": weights(3, 8, 8), "b": jnp.zeros(8)}
    scan = lambda v, x: jax.lax.scan(lambda x, w: (x @ w, None), x, v["layers"])[0] + v["b"][None]  # noqa: E731
    sites = lj.find_sites(scan, variables, X)
    adapter = lj.lora(rank=[("layers#0", 0), ("layers#1", 1), (".*", 4)])
    delta = start(adapter, sites, variables)
    report = lj.audit(adapter, delta, variables, sites, scan, X)
    assert report.trainable == 5 * 16 and report.rows[0].what == "lora, rank 0 to 4 by layer"
    kept = lj.full(layers=[0, 2])
    report = lj.audit(kept, start(kept, sites, variables), variables, sites)
    assert report.rows[0].what == "full, layers 0, 2" and report.trainable == 2 * 64


def test_roles_are_rules_too():
    sites = {p: dataclasses.replace(s, role="q" if "/q/" in p else None) for p, s in SITES.items()}
    adapter = lj.lora(2, targets="q")
    assert lj.audit(adapter, start(adapter, sites), VARIABLES, sites).rows[0].rule == "q"


def test_an_empty_delta_trains_nothing():
    with pytest.raises(lj.UserError, match="the adapter 'lora' trains nothing: it selected 0 sites"):
        lj.audit(lj.lora(2), {}, VARIABLES, SITES)


def test_a_weight_that_nothing_uses():
    variables = {"w": weights(8, 8), "idle": weights(8, 8, seed=1)}
    sites = lj.find_sites(lambda v, x: x @ v["w"], variables, X)
    adapter = lj.full(targets=".*")
    with pytest.raises(lj.UserError, match="the function never uses 'idle', so adapting it does nothing; leave it out"):
        lj.audit(adapter, start(adapter, sites, variables), variables, sites)


@pytest.mark.parametrize("size", [0.3, 1e-2])
def test_a_start_that_is_not_the_base(size):
    adapter = lj.lora(2)
    with pytest.raises(
        lj.UserError, match=r"first output of the adapter 'lora' is not the base's \(off by .*trained already"
    ):
        lj.audit(adapter, noisy(start(adapter), size), VARIABLES, SITES, apply, X)


def test_not_a_number_is_not_the_base():
    adapter = lj.full()
    delta = jax.tree_util.tree_map(lambda x: x * jnp.nan, start(adapter))
    with pytest.raises(lj.UserError, match="off by nan"):
        lj.audit(adapter, delta, VARIABLES, SITES, apply, X)
