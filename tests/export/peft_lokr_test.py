"""LoKr's files both ways with the real PEFT, and what is refused."""

import pytest

import lora_jax as lj
from lora_jax.export.codecs import lokr as codec
from tests.export import kron_round_trip as trip

pytestmark = pytest.mark.peers
peft = trip.peft


@pytest.fixture(scope="module", params=["llama", "bert"])
def case(request, tmp_path_factory):
    return trip.make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("options", [{}, {"decompose_factor": 8, "decompose_both": True}])
def test_ours_to_peft(case, options, tmp_path):
    """Whole and split matrices, ranks and alphas by site."""
    adapter = lj.lokr(
        rank=[(".*(value|v_proj)/kernel", 30), (".*", 2)],
        alpha=[(".*(query|q_proj)/kernel", 3), (".*", 8)],
        targets=trip.OURS[case.kind],
        **options,
    )
    trip.check_ours_to_peft(case, adapter, tmp_path / "adapter")


@pytest.mark.parametrize("options", [{"r": 3}, {"r": 2, "decompose_factor": 8, "decompose_both": True}])
def test_peft_to_ours(case, options, tmp_path):
    v = "value" if case.kind == "bert" else "v_proj"
    config = peft.LoKrConfig(
        alpha=16, target_modules=trip.THEIRS[case.kind], init_weights=False, rank_pattern={v: 7}, **options
    )
    trip.check_peft_to_ours(case, config, tmp_path)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"decompose_factor": 2}, dict, r"lokr_w1' has the shape \[4, 4\], expected \[2, 2\]"),
        ({"r": 3}, dict, "lacks the tensor .*lokr_w2'"),
        ({}, lambda t: {k: v for k, v in t.items() if "lokr_w2_a" not in k}, "lacks the tensor .*lokr_w2_a"),
        ({"decompose_factor": 0}, dict, "decompose_factor=0: expected -1 or"),
        ({"use_effective_conv2d": True}, dict, "use_effective_conv2d=True is not supported"),
        ({"target_modules": ["c_attn"]}, dict, "selects no module"),
    ],
)
def test_strict(case, config, tensors, message):
    adapter = lj.lokr(2, targets=".*/(query|q_proj)/kernel")
    trip.check_strict(case, codec, adapter, config, tensors, message)
