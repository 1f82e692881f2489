"""OFT's files both ways with the real PEFT, and what is refused."""

import jax
import pytest

import lora_jax as lj
from lora_jax.export.codecs import oft as codec
from tests.export import kron_round_trip as trip

pytestmark = pytest.mark.peers
peft = trip.peft


@pytest.fixture(scope="module", params=["llama", "bert"])
def case(request, tmp_path_factory):
    return trip.make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 6},
        {"blocks": 3, "cayley": "neumann"},
        {"block_size": 3, "cayley": "neumann:3", "share_blocks": True},
    ],
)
def test_ours_to_peft(case, options, tmp_path):
    """Both forms (PEFT turns its exact one the other way round), by size and by number, shared or not."""
    adapter = lj.oft(targets=trip.OURS[case.kind], **options)
    trip.check_ours_to_peft(case, adapter, tmp_path / "adapter", size=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"oft_block_size": 4, "use_cayley_neumann": False},  # does not divide 30: PEFT takes 3
        {"oft_block_size": 0, "r": 4, "num_cayley_neumann_terms": 4},
        {"oft_block_size": 6, "block_share": True, "num_cayley_neumann_terms": 7},
    ],
)
def test_peft_to_ours(case, options, tmp_path):
    config = peft.OFTConfig(target_modules=trip.THEIRS[case.kind], init_weights=False, **options)
    trip.check_peft_to_ours(case, config, tmp_path)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"oft_block_size": 4}, dict, r"has the shape \[8, 3\], expected \[6, 6\]"),
        ({"block_share": True}, dict, r"expected \[1, 3\]"),
        ({}, lambda t: {}, "lacks the tensor .*oft_R.weight"),
        ({"coft": True}, dict, "coft=True is not supported"),
        ({"r": 3}, dict, "expected one of oft_block_size and r, got 3, 3"),
        ({"oft_block_size": 1}, dict, "blocks of 1, which have no parameters"),
        ({"target_modules": ["c_attn"]}, dict, "selects no module"),
    ],
)
def test_strict(case, config, tensors, message):
    adapter = lj.oft(3, targets=".*/(query|q_proj)/kernel")
    trip.check_strict(case, codec, adapter, config, tensors, message)


def test_what_peft_cannot_hold(case):
    adapter = lj.oft([(".*(query|q_proj).*", 4), (".*", 3)], targets=".*(query|q_proj|value|v_proj)/kernel")
    delta = adapter.init(jax.random.key(0), case.base.variables, case.base.sites)
    with pytest.raises(lj.UserError, match=r"one block size or one number.*sizes \[3, 4\] and numbers \[6, 8\]"):
        codec.write(adapter, delta, case.base)
    adapter = lj.oft(3, targets=".*(embed_tokens|word_embeddings)/embedding")
    delta = adapter.init(jax.random.key(0), case.base.variables, case.base.sites)
    with pytest.raises(lj.UserError, match="no place for the embedding"):
        codec.write(adapter, delta, case.base)
