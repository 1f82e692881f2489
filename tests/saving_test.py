"""Saved adapters that are damaged, foreign or not there: one message each."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax import saving
from tests.lift.checks import noisy, weights

VARIABLES = {"w": weights(8, 6), "u": weights(6, 4)}


@pytest.fixture
def saved(tmp_path):
    adapter = lj.lora(rank=2)
    sites = lj.find_sites(lambda v, x: x @ v["w"] @ v["u"], VARIABLES, weights(3, 8))
    delta = noisy(jax.eval_shape(lambda: adapter.init(jax.random.key(0), VARIABLES, sites)))
    lj.save(tmp_path / "deep" / "adapter", adapter, delta, VARIABLES)
    return tmp_path / "deep" / "adapter"


def change(folder, **fields):
    file = folder / saving.DESCRIPTION
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_files(saved):
    assert sorted(p.name for p in saved.iterdir()) == [saving.DESCRIPTION, saving.TENSORS]
    described = json.loads((saved / saving.DESCRIPTION).read_text())
    assert described["spec"] == lj.lora(rank=2).spec and described["format"] == "lora_jax/1"
    assert set(load_file(saved / saving.TENSORS)) == {"w:a", "w:b", "u:a", "u:b"}


def test_transposed_arrays_are_written_right(tmp_path, saved):
    """safetensors writes wrong values for arrays that are not C-contiguous."""
    adapter, delta = lj.load(saved, VARIABLES)
    turned = {p: jax.tree_util.tree_map(lambda x: np.asarray(x).T.copy().T, one) for p, one in delta.items()}
    assert not turned["w"].a.flags.c_contiguous
    lj.save(tmp_path / "again", adapter, turned, VARIABLES)
    again = lj.load(tmp_path / "again", VARIABLES)[1]
    for x, y in zip(jax.tree_util.tree_leaves(again), jax.tree_util.tree_leaves(delta), strict=True):
        np.testing.assert_array_equal(x, y)


def test_nothing_there(tmp_path):
    with pytest.raises(lj.UserError, match="expected adapter.json and adapter.safetensors, found no such directory"):
        lj.load(tmp_path / "none", VARIABLES)
    (tmp_path / "other.txt").write_text("x")
    with pytest.raises(lj.UserError, match=r"no adapter in .*found \['other.txt'\]"):
        lj.load(tmp_path, VARIABLES)


def test_damaged_files(saved):
    tensors = saved / saving.TENSORS
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-9])
    with pytest.raises(lj.UserError, match="adapter.safetensors cannot be read .*truncated or not safetensors"):
        lj.load(saved, VARIABLES)
    tensors.unlink()
    with pytest.raises(lj.UserError, match="adapter.safetensors is missing; the adapter's arrays belong there"):
        lj.load(saved, VARIABLES)
    (saved / saving.DESCRIPTION).write_text("{")
    with pytest.raises(lj.UserError, match="adapter.json is not JSON"):
        lj.load(saved, VARIABLES)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("u:b"), "lacks the tensor 'u:b'"),
        (lambda t: t.update(extra=np.ones(2, np.float32)), "holds unexpected tensors: extra"),
    ],
)
def test_missing_and_unexpected_tensors(saved, edit, message):
    tensors = load_file(saved / saving.TENSORS)
    edit(tensors)
    save_file(tensors, saved / saving.TENSORS)
    with pytest.raises(lj.UserError, match=message):
        lj.load(saved, VARIABLES)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "lora_jax/9"}, "has the format 'lora_jax/9'; this version reads 'lora_jax/1'"),
        ({"spec": {"method": "lorra"}}, "there is no method 'lorra'; did you mean 'lora'"),
        ({"spec": {"method": "lora", "rnk": 2}}, "has no option 'rnk'; did you mean 'rank'"),
    ],
)
def test_descriptions_of_another_version(saved, fields, message):
    change(saved, **fields)
    with pytest.raises(lj.UserError, match=message):
        lj.load(saved, VARIABLES)


@pytest.mark.parametrize("lost", ["format", "spec", "base", "entries"])
def test_a_description_without_a_field(saved, lost):
    file = saved / saving.DESCRIPTION
    description = json.loads(file.read_text())
    del description[lost]
    file.write_text(json.dumps(description))
    with pytest.raises(lj.UserError, match=lost):
        lj.load(saved, VARIABLES)


def test_an_entry_of_an_unknown_class(saved):
    description = json.loads((saved / saving.DESCRIPTION).read_text())
    description["entries"]["w"]["class"] = "lorra.LoRRA"
    change(saved, entries=description["entries"])
    with pytest.raises(lj.UserError, match="'lorra.LoRRA'"):
        lj.load(saved, VARIABLES)


def test_only_our_entries_are_saved(tmp_path):
    with pytest.raises(lj.UserError, match="only entries of methods in lora_jax/adapters/ can be saved"):
        lj.save(tmp_path, lj.lora(2), {"w": weights(3, 3)}, VARIABLES)
