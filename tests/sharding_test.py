"""The mesh, rules for the base, specs inherited by a delta and by optimizer slots."""

import jax
import jax.numpy as jnp
import optax
import pytest
import standin
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax import UserError, sharding
from lora_jax.adapters import lora as lora_module
from lora_jax.lift import Axes
from lora_jax.models import registry


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(2, 2, 2)


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def test_mesh_has_auto_axes_and_the_devices_asked_for(mesh):
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert sharding.make_mesh(2).size == 2
    assert sharding.make_mesh(-1, 2).shape["data"] == 4


def test_more_devices_than_there_are():
    with pytest.raises(
        UserError, match=r"mesh.data=4, mesh.fsdp=2, mesh.tensor=2 needs 16 devices, but there are 8 \(cpu\)"
    ):
        sharding.make_mesh(4, 2, 2)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 1, 2.0), (1, True, 1)])
def test_bad_sizes(sizes):
    with pytest.raises(UserError, match="each size must be an integer of at least 1"):
        sharding.make_mesh(*sizes)


def test_batch_must_divide(mesh):
    sharding.check_batch(mesh, 8, accumulate=2)
    sharding.check_batch(None, 7)
    with pytest.raises(
        UserError, match=r"train.batch_size=10 does not divide by 4 \(mesh.data \* mesh.fsdp = 4\); use 8 or 12"
    ):
        sharding.check_batch(mesh, 10)
    with pytest.raises(
        UserError, match=r"does not divide by 3 \(train.accumulate = 3\); use 9 or 12, or change train.accumulate"
    ):
        sharding.check_batch(None, 10, accumulate=3)


def test_rules_are_ordered_and_the_default_is_the_largest_axis(mesh):
    base = {
        "params": {
            "a": {"kernel": shape(8, 6)},
            "b": {"kernel": shape(4, 12)},
            "c": {"bias": shape(8)},
            "d": shape(6, 10),
        }
    }
    specs = sharding.base_specs(base, ((r"a/.*", ("embed", "mlp")), (r".*/kernel", (None, ("data", "tensor")))), mesh)
    assert specs["a/kernel"] == P("fsdp", "tensor")
    assert specs["b/kernel"] == P(None, ("data", "tensor"))
    assert specs["c/bias"] == P()
    assert specs["d"] == P(None, "fsdp")


def test_what_does_not_divide_stays_whole_and_says_so(mesh):
    notes = []
    base = {"odd": shape(8, 7), "twice": shape(8, 8)}
    specs = sharding.base_specs(base, (("odd", ("embed", "heads")), ("twice", ("mlp", "vocab"))), mesh, notes.append)
    assert specs == {"odd": P("fsdp", None), "twice": P("tensor", None)}
    assert notes == [
        "odd: axis 1 of size 7 stays whole (tensor = 2 does not divide it)",
        "twice: axis 1 of size 8 stays whole (another axis is split over tensor)",
    ]


def test_a_rule_with_another_number_of_axes_falls_back_and_says_so(mesh):
    notes = []
    assert sharding.base_specs({"x": shape(4, 6)}, (("x", ("embed",)),), mesh, notes.append) == {"x": P(None, "fsdp")}
    assert "the rule 'x' has 1 axes, the weight has shape (4, 6)" in notes[0]


def test_an_unknown_axis_is_an_error(mesh):
    with pytest.raises(UserError, match="names the axis 'embd'; did you mean 'embed'"):
        sharding.base_specs({"x": shape(4, 4)}, (("x", ("embd", None)),), mesh)


@pytest.mark.parametrize("model_type", sorted(registry.families()))
def test_every_axis_that_a_family_names_is_known(model_type, mesh):
    rules = registry.get(model_type).sharding
    assert rules
    for _, axes in rules:
        sharding.base_specs({"x": shape(*[4] * len(axes))}, [("x", axes)], mesh)


def test_factors_inherit_the_axes_they_came_from(mesh):
    # A kernel (layers, heads, head_dim, embed) whose fan-in is (heads, head_dim).
    entry = lora_module.LoRA(
        a=shape(3, 4, 5, 2), b=shape(3, 2, 8), axes=Axes((0,), (1, 2), (3,)), ranks=(2,) * 3, scales=(1.0,) * 3
    )
    specs = sharding.delta_specs({"o": entry}, {"o": P(None, "tensor", None, "fsdp")}, mesh)["o"]
    assert specs.a == P(None, "tensor", None, None)
    assert specs.b == P(None, None, "fsdp")


def test_slots_lie_as_their_leaves(mesh):
    base = standin.make_base()
    delta = lj.lora(rank=2).init(jax.random.key(0), base.variables, base.sites)
    specs = sharding.delta_specs(delta, sharding.base_specs(base.variables, base.family.sharding, mesh), mesh)
    assert specs["up/kernel"].a == P("fsdp", None) and specs["up/kernel"].b == P(None, "tensor")
    slots = optax.adam(1e-3).init(delta)
    out = sharding.slot_specs(slots, delta, specs)
    assert out[0].mu["up/kernel"].b == out[0].nu["up/kernel"].b == P(None, "tensor")
    assert out[0].count == P()


def test_place_base_splits_what_the_specs_say(mesh):
    base = standin.make_base()
    placed = sharding.place_base(base.variables, sharding.base_specs(base.variables, base.family.sharding, mesh), mesh)
    kernel = placed["params"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (4, 8) and kernel.shape == (8, 16)
    assert standin.same(placed, base.variables)
