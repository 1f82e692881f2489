"""Equal budgets: the largest rank within them, counted on the adapters themselves."""

import jax
import pytest
import standin

import lora_jax as lj
from lora_jax.ablation import axis, equal_flops, equal_parameters, product, zipped
from lora_jax.errors import UserError

MODEL = {
    "model_type": "llama", "vocab_size": standin.VOCAB, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16,
}  # fmt: skip
BASE = lj.from_config(MODEL)


def parameters(cell):
    adapter = lj.lora(
        rank=cell["adapter.rank"], targets=cell["adapter.targets"], layers=cell.get("adapter.layers", "all")
    )
    delta = jax.eval_shape(lambda v: adapter.init(jax.random.key(0), v, BASE.sites), BASE.variables)
    return sum(leaf.size for leaf in jax.tree.leaves(delta))


@pytest.mark.parametrize(("layers", "budget"), [("all", 500), ("last:1", 190)])
def test_every_choice_gets_the_largest_rank_within_the_budget(layers, budget):
    choices = axis("adapter.targets", ["q", "k", "q,v", "up,down", "q,k,v,o"])
    found = equal_parameters(budget, product(choices, axis("adapter.layers", [layers])), BASE.sites)
    assert [cell["adapter.targets"] for cell in found] == ["q", "k", "q,v", "up,down", "q,k,v,o"]
    ranks = [cell["adapter.rank"] for cell in found]
    for cell in found:
        assert parameters(cell) <= budget < parameters({**cell, "adapter.rank": cell["adapter.rank"] + 1})
    assert len(set(ranks)) > 2 and min(ranks) >= 1


def test_layers_share_a_budget_too_and_other_fields_stay():
    choices = zipped(axis("adapter.layers", ["last:1", "all"]), axis("adapter.alpha", [4, 8]))
    found = equal_parameters(384, choices, BASE.sites, targets="q")
    assert [(c["adapter.layers"], c["adapter.alpha"], c["adapter.rank"]) for c in found] == [
        ("last:1", 4, 12),
        ("all", 8, 4),
    ]


def test_flops_of_linear_weights_are_two_per_parameter():
    choices = axis("adapter.targets", ["q", "q,v"])
    assert equal_flops(2 * 800, choices, BASE.sites) == equal_parameters(800, choices, BASE.sites)


Q = axis("adapter.targets", ["q"])
WRONG = [
    (10, Q, "the choice adapter.targets='q' has 96 parameters at rank 1, more than the budget of 10"),
    (10**6, Q, "would need rank 10416 .* rank 16 at most: lower the budget to 1,631"),
    (800, axis("adapter.targets", ["qq"]), "the choice adapter.targets='qq'"),
    (800, axis("adapter.alpha", [1]), "the choices vary adapter.alpha; to share a budget"),
    (800, product(Q, axis("adapter.rank", [1])), "set adapter.rank, which is what the budget decides"),
    (0, Q, "a budget is a whole number of parameters, at least 1; got 0"),
]


@pytest.mark.parametrize(("budget", "choices", "message"), WRONG)
def test_a_budget_that_cannot_be_kept_is_told(budget, choices, message):
    with pytest.raises(UserError, match=message):
        equal_parameters(budget, choices, BASE.sites)
