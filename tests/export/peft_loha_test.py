"""LoHa's files both ways with the real PEFT, and what is refused."""

import pytest

import lora_jax as lj
from lora_jax.export.codecs import loha as codec
from tests.export import kron_round_trip as trip

pytestmark = pytest.mark.peers
peft = trip.peft


@pytest.fixture(scope="module", params=["llama", "bert"])
def case(request, tmp_path_factory):
    return trip.make(request.param, tmp_path_factory.mktemp(request.param))


def test_ours_to_peft(case, tmp_path):
    """Ranks and alphas by site; r * r above and below the widths."""
    adapter = lj.loha(
        rank=[(".*(value|v_proj)/kernel", 2), (".*", 5)],
        alpha=[(".*(query|q_proj)/kernel", 3), (".*", 8)],
        targets=trip.OURS[case.kind],
    )
    trip.check_ours_to_peft(case, adapter, tmp_path / "adapter")


def test_peft_to_ours(case, tmp_path):
    q, v = ("query", "value") if case.kind == "bert" else ("q_proj", "v_proj")
    config = peft.LoHaConfig(
        r=3, alpha=40, target_modules=trip.THEIRS[case.kind], init_weights=False,
        rank_pattern={v: 5}, alpha_pattern={q: 80},
    )  # fmt: skip
    trip.check_peft_to_ours(case, config, tmp_path)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"r": 4}, dict, r"has the shape \[24, 2\], expected \[24, 4\]"),
        ({}, lambda t: {k: v for k, v in t.items() if "hada_w2_b" not in k}, "lacks the tensor .*hada_w2_b"),
        ({"use_effective_conv2d": True}, dict, "use_effective_conv2d=True is not supported"),
        ({"target_modules": ["c_attn"]}, dict, "selects no module"),
        ({"alpha": None}, dict, "the config lacks 'alpha'"),
    ],
)
def test_strict(case, config, tensors, message):
    adapter = lj.loha(2, targets=".*/(query|q_proj)/kernel")
    trip.check_strict(case, codec, adapter, config, tensors, message)
