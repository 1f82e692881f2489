"""Which sites train: the method's, and the task's head beside it."""

import json

import jax
import pytest

from lora_jax import adapters, assemble, config
from lora_jax.errors import UserError
from lora_jax.models import from_config
from lora_jax.train import init_delta
from tests import commands


@pytest.fixture(scope="module")
def classifier():
    return from_config(commands.DECODER, num_labels=2)


def chosen(base, **section) -> dict[str, str]:
    """{path: class of its entry} of the adapter that a config's section `adapter` asks for."""
    cfg = config.default()
    for name, value in section.items():
        cfg.adapter[name] = value
    adapter = assemble.make_adapter(config.resolve(cfg), base)
    delta = adapter.init(jax.random.key(0), base.variables, base.sites)
    return {path: type(one).__name__ for path, one in delta.items()}


def test_head_trains_beside_lora(classifier):
    got = chosen(classifier, targets="q")
    assert got == {f"layers_{i}/self_attn/q_proj/kernel": "LoRA" for i in range(2)} | {"score/kernel": "Full"}


def test_head_none_leaves_it(classifier):
    assert "score/kernel" not in chosen(classifier, targets="q", head="none")


def test_a_method_that_takes_the_head_keeps_it(classifier):
    assert chosen(classifier, targets="q,head", rank=2)["score/kernel"] == "LoRA"
    assert chosen(classifier, method="head") == {"score/kernel": "Full"}
    assert set(chosen(classifier, method="full")) == set(classifier.sites)


def test_no_head_where_the_task_has_none():
    decoder = from_config(commands.DECODER)
    assert set(chosen(decoder, targets="q")) == {f"layers_{i}/self_attn/q_proj/kernel" for i in range(2)}


def test_targets_written_as_one_string_are_several(classifier):
    assert len(chosen(classifier, targets="q, v")) == len(chosen(classifier, targets=["q", "v"])) == 5


@pytest.mark.parametrize("name", adapters.methods())
def test_every_method_can_be_chosen_by_name(classifier, name):
    assert chosen(classifier, method=name)


def test_a_chain_has_its_members_and_the_head_beside_them(classifier):
    got = chosen(classifier, method="chain")
    assert sorted(got.values()) == ["Bottleneck"] * 2 + ["Full"] + ["LoRA"] * 8
    cfg = config.default()
    cfg.adapter.method, cfg.adapter.options.adapters = (
        "chain",
        [{"method": "prompt", "init_tokens": "The"}, "layernorm"],
    )
    parts = assemble.assemble(config.resolve(config.from_dict(json.loads(json.dumps(cfg.to_dict())))))
    prompt, norms = parts.adapter.spec["adapters"]
    assert prompt["init_tokens"] == parts.base.tokenizer("The", add_special_tokens=False)["input_ids"]
    assert norms["method"] == "layernorm"


def started(**overrides):
    """(delta, parts) of a run of the embedded default with some fields of `adapter.options` and `quant` set."""
    cfg = config.default()
    cfg.task.name, cfg.data.limit, cfg.quant = "sft", 24, overrides.pop("quant", "")
    cfg.adapter.options.update(overrides)
    parts = assemble.assemble(resolved := config.resolve(cfg))
    return init_delta(parts.base, parts.adapter, 0, assemble.start_data(resolved, parts)), parts


def test_eva_looks_at_training_examples():
    """Ranks follow the data: not the same everywhere, the same in total."""
    delta, parts = started(init="eva")
    ranks = [one.ranks[0] for one in delta.values()]
    linear = [p for p, s in parts.base.sites.items() if set(s.uses) == {"linear"}]
    assert len(set(ranks)) > 1 and sum(ranks) == 8 * len(linear)


def test_loftq_starts_from_what_quantization_took_away():
    delta, parts = started(init="loftq", quant="nf4")
    assert all(float(abs(one.b).max()) > 0 for one in delta.values())
    with pytest.raises(UserError, match="the base is not quantized: set quant=nf4"):
        started(init="loftq")
