"""Every method that PEFT has: our file gives PEFT our logits, PEFT's file gives us PEFT's."""

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import export
from lora_jax.errors import UserError
from lora_jax.export import peft_names
from tests.export.peft_models import TOLERANCE, error, made, ours, plain, randomized, theirs, written_by_peft

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.peers

KINDS = ("bert", "qwen2")
OURS = {
    "lora": lambda: lj.lora(4, 8, dropout=0.1),
    "pissa": lambda: lj.lora(2, 8, init="pissa", targets="q,v"),
    "olora rslora": lambda: lj.lora(2, 8, init="olora", targets="q,v", scaling="alpha/sqrt(r)"),
    "orthogonal": lambda: lj.lora(2, 8, init="orthogonal"),
    "dora": lambda: lj.dora([("v", 3), (".*", 2)], 8, targets="q,v,down"),
    "ia3": lambda: lj.ia3(),
    "ia3 on one layer": lambda: lj.ia3(targets="q,up", layers="last:1", feedforward="none"),
    "vera": lambda: lj.vera(5, targets="q,v,down"),
    "layernorm": lambda: lj.layernorm(),
    "lora and all biases": lambda: lj.chain(lj.lora(2, targets="q,v"), lj.bitfit()),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OURS)
def test_our_file_gives_peft_our_logits(name, kind, tmp_path):
    base = made(kind)[2]
    adapter = OURS[name]()
    delta = randomized(adapter, adapter.init(jax.random.key(0), base.variables, base.sites))
    mine = ours(base, adapter, delta)
    assert error(mine, plain(base)) > 1e-2
    lj.save_peft(tmp_path, adapter, delta, base)
    assert error(mine, theirs(kind, tmp_path)) < TOLERANCE
    again, read = lj.load_peft(tmp_path, base)
    assert error(ours(base, again, read), mine) < 1e-5


def _peft_config(name, kind):
    q, v, down = ("query", "value", "output.dense") if kind == "bert" else ("q_proj", "v_proj", "down_proj")
    prefix, rest = ("bert.encoder.layer", "attention.self") if kind == "bert" else ("model.layers", "self_attn")
    common = {"task_type": "SEQ_CLS" if kind == "bert" else "CAUSAL_LM"}
    return {
        "dora": lambda: peft.LoraConfig(r=2, lora_alpha=8, use_dora=True, target_modules=[q, v], **common),
        "ia3": lambda: peft.IA3Config(target_modules=[q, v, down], feedforward_modules=[down], **common),
        "vera": lambda: peft.VeraConfig(r=5, target_modules=[q, v], save_projection=True, **common),
        "layernorm": lambda: peft.LNTuningConfig(
            target_modules=["LayerNorm"] if kind == "bert" else ["input_layernorm", "norm"], **common
        ),
        "all biases": lambda: peft.LoraConfig(r=2, bias="all", target_modules=[q, v], **common),
        "their biases": lambda: peft.LoraConfig(r=2, bias="lora_only", target_modules=[q, v], **common),
        "orthogonal": lambda: peft.LoraConfig(r=2, init_lora_weights="orthogonal", target_modules=[q, v], **common),
        "pissa": lambda: peft.LoraConfig(r=2, init_lora_weights="pissa", target_modules=[q, v], **common),
        "olora": lambda: peft.LoraConfig(r=2, init_lora_weights="olora", use_rslora=True, target_modules=[v], **common),
        "saved whole": lambda: peft.LoraConfig(r=2, target_modules=[q, v], modules_to_save=[v], **common),
        "named in full": lambda: peft.LoraConfig(
            r=2, target_modules=[q, f"{prefix}.1.{rest}.{v}"], layers_to_transform=[0], **common
        ),
    }[name]()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    ["dora", "ia3", "vera", "layernorm", "all biases", "their biases", "orthogonal", "pissa", "olora", "saved whole",
     "named in full"],
)  # fmt: skip
def test_their_file_gives_us_their_logits(name, kind, tmp_path):
    base = made(kind)[2]
    expected = written_by_peft(kind, _peft_config(name, kind), tmp_path)
    adapter, delta = lj.load_peft(tmp_path, base)
    mine = ours(base, adapter, delta)
    assert error(mine, expected) < TOLERANCE
    assert error(mine, plain(base)) > 1e-3
    shapes = lambda tree: jax.tree.map(np.shape, tree)  # noqa: E731
    fresh = adapter.init(jax.random.key(0), base.variables, base.sites)
    if name != "vera":  # PEFT's projections may be wider than the widest of our sites
        assert shapes(fresh) == shapes(delta), "loading rebuilds what init makes"


@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    ],
    ids=["saved whole", "adapted"],
)
def test_their_tied_embedding(options, tmp_path):
    base = made("tied")[2]
    expected = written_by_peft("tied", peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options), tmp_path)
    adapter, delta = lj.load_peft(tmp_path, base)
    mine = ours(base, adapter, delta)
    assert error(mine, expected) < TOLERANCE
    lj.save_peft(tmp_path / "again", adapter, delta, base)
    assert error(theirs("tied", tmp_path / "again"), mine) < TOLERANCE


def test_an_embedding_that_peft_untied_is_refused(tmp_path):
    """PEFT trains a copy of the embedding and leaves the head as it was: no value of our one weight does that."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    written_by_peft("tied", config, tmp_path)
    with pytest.raises(UserError, match="not the same values for the head tied to it.*ensure_weight_tying=True"):
        lj.load_peft(tmp_path, made("tied")[2])


def test_a_base_that_peft_changed_is_refused(tmp_path):
    config = peft.LoraConfig(r=2, init_lora_weights="pissa_niter_4", target_modules=["q_proj"], task_type="CAUSAL_LM")
    written_by_peft("qwen2", config, tmp_path)
    with pytest.raises(UserError, match="init_lora_weights='pissa_niter_4'.*path_initial_model_for_weight_conversion"):
        lj.load_peft(tmp_path, made("qwen2")[2])


def test_a_module_is_adapted_or_saved_whole(tmp_path):
    """PEFT would drop the adapter of a module that has both, in silence."""
    base = made("qwen2")[2]

    def started(adapter):
        return adapter, randomized(adapter, adapter.init(jax.random.key(0), base.variables, base.sites))

    apart = lj.chain(lj.ia3(targets="q,k", feedforward="none"), lj.bitfit(targets="v"))
    lj.save_peft(tmp_path, *started(apart), base)
    assert error(theirs("qwen2", tmp_path), ours(base, *started(apart))) < TOLERANCE
    for adapter in (
        lj.chain(lj.lora(2, targets="q,v"), lj.bitfit(targets="q")),
        lj.chain(lj.vera(3, targets="q,v"), lj.bitfit()),
    ):
        with pytest.raises(UserError, match="adapted beside a bias of the same module.*lora_jax.save"):
            lj.save_peft(tmp_path, *started(adapter), base)
        assert not export.has_format(*started(adapter), base)


def test_vera_without_projections_is_refused(tmp_path):
    config = peft.VeraConfig(r=5, target_modules=["q_proj"], save_projection=False, task_type="CAUSAL_LM")
    written_by_peft("qwen2", config, tmp_path)
    with pytest.raises(UserError, match="holds no projections.*save_projection=True"):
        lj.load_peft(tmp_path, made("qwen2")[2])


def test_what_vllm_serves(tmp_path):
    """Ranks padded, scales folded into B, no patterns: the same logits under PEFT; the rest is refused."""
    base = made("qwen2")[2]
    adapter = lj.lora([("q", 3), (".*", 2)], [("v", 5), (".*", 8)], targets="q,v,up", scaling="alpha/sqrt(r)")
    delta = randomized(adapter, adapter.init(jax.random.key(0), base.variables, base.sites))
    lj.save_peft(tmp_path, adapter, delta, base, vllm_compatible=True)
    assert error(ours(base, adapter, delta), theirs("qwen2", tmp_path)) < TOLERANCE
    import json

    config = json.loads((tmp_path / peft_names.CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == 8 and not config["rank_pattern"] and not config["alpha_pattern"]
    for other, what in (
        (lj.dora(2, targets="q"), "DoRA's magnitudes"),
        (lj.ia3(), "a method other than lora"),
        (lj.lora(2, targets="embed_tokens/embedding"), "an adapted embedding"),
        (lj.chain(lj.lora(2, targets="q"), lj.bitfit()), "trained biases"),
        (lj.chain(lj.lora(2, targets="q"), lj.full(targets="norm/scale")), r"modules saved whole \(model.norm\)"),
    ):
        with pytest.raises(UserError, match=f"vLLM does not serve {what}"):
            start = other.init(jax.random.key(0), base.variables, base.sites)
            lj.save_peft(tmp_path / "refused", other, start, base, vllm_compatible=True)
