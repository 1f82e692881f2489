"""Checkpoints: what is written is read back, in every number format and layout; every way a directory can be wrong."""

import dataclasses
import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import trees
from lora_jax.errors import UserError
from lora_jax.models import from_config, load_pretrained, reseeded, save_pretrained
from tests.models import oracle


def saved(folder, config, **options):
    """Writes a model with random weights; returns its base."""
    base = from_config(config, **options)
    base = dataclasses.replace(base, variables=oracle.random_weights(base))
    save_pretrained(folder, base, base.variables)
    return base


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """One decoder and one encoder on disk, read-only by agreement."""
    root = tmp_path_factory.mktemp("models")
    saved(root / "decoder", oracle.DECODER)
    saved(root / "encoder", oracle.ENCODER, num_labels=3)
    return root


@pytest.fixture
def model(originals, tmp_path):
    """A function that copies a model, lets a test edit its tensors and config, and returns the new directory."""

    def make(name="decoder", edit=None, config=None):
        shutil.copytree(originals / name, tmp_path / name)
        if edit is not None:
            file = tmp_path / name / "model.safetensors"
            tensors = load_file(file)
            edit(tensors)
            save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, file)
        if config is not None:
            file = tmp_path / name / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return tmp_path / name

    return make


def equal(one, two):
    one, two = trees.flatten(one), trees.flatten(two)
    return one.keys() == two.keys() and all(np.array_equal(one[p], two[p]) for p in one)


@pytest.mark.parametrize("name, num_labels", [("decoder", None), ("encoder", 3)])
def test_round_trip_is_exact(originals, tmp_path, name, num_labels):
    first = load_pretrained(originals / name, num_labels=num_labels)
    save_pretrained(tmp_path, first, first.variables)
    again = load_pretrained(tmp_path, num_labels=num_labels)
    assert equal(first.variables, again.variables) and first.config == again.config
    assert first.fingerprint == again.fingerprint
    assert (tmp_path / "config.json").read_text() == (originals / name / "config.json").read_text()


def test_files_hold_transposed_kernels(originals):
    """safetensors writes a transposed view in the wrong order: compare the bytes with the weights themselves."""
    base = load_pretrained(originals / "decoder")
    tensors = load_file(originals / "decoder" / "model.safetensors")
    up = np.asarray(oracle.random_weights(base)["params"]["layers_0"]["mlp"]["up_proj"]["kernel"])
    assert np.array_equal(tensors["model.layers.0.mlp.up_proj.weight"], up.T)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_number_formats(model, dtype):
    kind = jnp.dtype(dtype)
    folder = model(edit=lambda t: t.update({k: v.astype(kind) for k, v in t.items()}))
    as_stored, as_float = load_pretrained(folder, dtype=dtype), load_pretrained(folder)
    name = "embed_tokens/embedding"
    stored = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert stored.dtype == kind
    assert trees.flatten(as_stored.variables)[name].dtype == kind
    assert np.array_equal(trees.flatten(as_stored.variables)[name], stored)
    assert np.array_equal(trees.flatten(as_float.variables)[name], stored.astype(np.float32))
    save_pretrained(folder / "again", as_stored, as_stored.variables)
    assert json.loads((folder / "again" / "config.json").read_text())["dtype"] == dtype
    assert equal(load_pretrained(folder / "again", dtype=dtype).variables, as_stored.variables)


def split(folder):
    """Turns the single file into two shards and an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({n: tensors[n] for n in own}, folder / file)
    index = {"metadata": {}, "weight_map": {n: file for file, own in parts.items() for n in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return folder


def test_shards(model, originals):
    assert equal(load_pretrained(split(model())).variables, load_pretrained(originals / "decoder").variables)


def test_other_spellings_of_names(model, originals):
    """No prefix, index buffers, heads of pretraining, TensorFlow's names of the norms: the same weights."""

    def decoder(t):
        for name in list(t):
            t[name.removeprefix("model.")] = t.pop(name)
        t["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    def encoder(t):
        for name in list(t):
            new = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            t[new] = t.pop(name)
        t["bert.embeddings.position_ids"] = np.arange(40)[None]
        t["cls.predictions.bias"] = np.ones(61, np.float32)

    for name, edit, labels in (("decoder", decoder, None), ("encoder", encoder, 3)):
        ours, theirs = (
            load_pretrained(model(name, edit), num_labels=labels),
            load_pretrained(originals / name, num_labels=labels),
        )
        assert equal(ours.variables, theirs.variables)


def test_fresh_head_only_when_asked(model):
    def headless(t):
        for name in [n for n in t if n.startswith(("classifier", "bert.pooler"))]:
            del t[name]

    folder = model("encoder", headless)
    bases = [load_pretrained(folder, num_labels=5, seed=s) for s in (0, 0, 1)]
    one, same, other = (base.variables["params"] for base in bases)
    again = reseeded(bases[0], 1)
    assert again.fingerprint == bases[2].fingerprint != bases[0].fingerprint
    new, old = (trees.flatten(base.variables) for base in (again, bases[0]))
    assert {path for path in new if new[path] is not old[path]} == set(again.fresh) != set(), "the rest is shared"
    kernel = np.asarray(one["classifier"]["kernel"])
    assert kernel.shape == (32, 5) and 0.01 < kernel.std() < 0.03
    assert not np.asarray(one["classifier"]["bias"]).any()
    assert np.array_equal(kernel, same["classifier"]["kernel"])
    assert not np.array_equal(kernel, other["classifier"]["kernel"])
    assert set(load_pretrained(folder).variables["params"]) == {"embeddings", "encoder"}


def test_decoder_takes_a_score_head(model):
    variables = load_pretrained(model(), num_labels=4).variables["params"]
    assert variables["score"]["kernel"].shape == (32, 4) and "lm_head" not in variables


def test_encoder_keeps_the_pooler_of_its_file(originals, tmp_path):
    base = load_pretrained(originals / "encoder")
    save_pretrained(tmp_path, base, base.variables)
    written, source = load_file(tmp_path / "model.safetensors"), load_file(originals / "encoder" / "model.safetensors")
    assert np.array_equal(written["pooler.dense.weight"], source["bert.pooler.dense.weight"])
    assert "encoder.layer.0.output.dense.weight" in written and "classifier.weight" not in written


def test_generation_config_has_the_last_word_on_ends(model):
    folder = model()
    assert load_pretrained(folder).eos_ids == (2,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load_pretrained(folder).eos_ids == (2, 7)


def test_dropout_and_dtype_are_checked(originals):
    assert load_pretrained(originals / "encoder", dropout=0.3).config.attention_probs_dropout_prob == 0.3
    with pytest.raises(UserError, match="dtype must be one of"):
        load_pretrained(originals / "encoder", dtype="float8")


def _drop(t):
    del t["model.norm.weight"]


def _add(t):
    t["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)


def _misshape(t):
    t["model.layers.1.mlp.up_proj.weight"] = t["model.layers.1.mlp.up_proj.weight"].T


def _integer(t):
    t["lm_head.weight"] = t["lm_head.weight"].astype(np.int8)


def _twice(t):
    t["norm.weight"] = t["model.norm.weight"]


@pytest.mark.parametrize(
    "edit, message",
    [
        (_drop, "missing: model.norm.weight"),
        (_add, "unexpected: model.layers.0.self_attn.q_norm.weight"),
        (_misshape, "misshaped: model.layers.1.mlp.up_proj.weight is [32, 48], expected [48, 32]"),
        (_integer, "unreadable: lm_head.weight is I8, expected BF16, F16, F32"),
        (_twice, "which is there already as"),
    ],
)
def test_tensors_that_do_not_fit(model, edit, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_pretrained(model(edit=edit))


def test_half_a_head_is_no_fresh_head(model):
    with pytest.raises(UserError, match="missing: classifier.bias"):
        load_pretrained(model("encoder", lambda t: t.pop("classifier.bias")), num_labels=3)


def test_head_of_another_size(originals):
    with pytest.raises(UserError, match=r"classifier.weight is \[3, 32\].*num_labels=2; the file's head has 3 labels"):
        load_pretrained(originals / "encoder", num_labels=2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "berd"}, "model_type 'berd' is not supported; did you mean 'bert'"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_act": "swigluu"}, "hidden_act 'swigluu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
        ({"num_hidden_layers": 3}, "missing: model.layers.2."),
    ],
)
def test_configs_that_do_not_fit(model, change, message):
    folder = model(config=change)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_pretrained(folder)
    assert str(folder) in str(error.value)


def test_directories_that_are_none(model, tmp_path):
    folder = model()
    with pytest.raises(UserError, match="has no tokenizer: expected one of tokenizer.json"):
        _ = load_pretrained(folder).tokenizer
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="the tokenizer in .* cannot be read"):
        _ = load_pretrained(folder).tokenizer
    with pytest.raises(UserError, match="made from a config, so it has no tokenizer"):
        _ = from_config(oracle.DECODER).tokenizer
    weights = folder / "model.safetensors"
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no weights: expected model.safetensors .*found pytorch_model.bin"):
        load_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="has no config.json"):
        load_pretrained(folder)
    with pytest.raises(UserError, match="there is no directory .*decodr .*nearest in .*decoder"):
        load_pretrained(tmp_path / "decodr")
    with pytest.raises(UserError, match="is a file; a model is a directory"):
        load_pretrained(folder / "pytorch_model.bin")


def test_hub_id_without_a_connection(monkeypatch):
    import huggingface_hub

    def refuse(*_, **__):
        raise OSError("cannot find the snapshot folder in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match="'nobody/nothing' is no directory here.*hub: cannot find the snapshot"):
        load_pretrained("nobody/nothing")


@pytest.mark.parametrize("part", [4, 100, -1])
def test_truncated_file(model, part):
    file = model() / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:part])
    with pytest.raises(UserError, match="is damaged or incomplete .*it has [0-9]+ bytes"):
        load_pretrained(file.parent)


def test_missing_shard(model):
    folder = split(model())
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors is damaged or incomplete .*it is not there"):
        load_pretrained(folder)


def test_save_refuses_what_is_not_dense(originals, tmp_path):
    base = load_pretrained(originals / "decoder")
    extra = {"params": base.variables["params"] | {"lora": jnp.ones(3)}}
    with pytest.raises(UserError, match="merge the adapter first.* They differ at .*lora"):
        save_pretrained(tmp_path / "x", base, extra)
    wrong = trees.replace(base.variables, {"norm/scale": jnp.ones(31)})
    with pytest.raises(UserError, match=r"norm/scale has the shape \(31,\), the base's is \(32,\)"):
        save_pretrained(tmp_path / "x", base, wrong)
    assert not (tmp_path / "x").exists()


@pytest.mark.peers
@pytest.mark.parametrize(
    "name, num_labels", [("decoder", None), ("tied", None), ("encoder", 3), ("encoder", None), ("score", 3)]
)
def test_transformers_reads_what_we_write(tmp_path, name, num_labels):
    torch = pytest.importorskip("torch")
    import transformers

    raw = oracle.ENCODER if name == "encoder" else oracle.DECODER | {"tie_word_embeddings": name == "tied"}
    base = saved(tmp_path, raw, num_labels=num_labels)
    reader = getattr(transformers, base.family.architecture(base.config, num_labels))
    theirs, report = reader.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    lost = {m for m in report["missing_keys"] if not m.startswith("pooler.")}
    assert not lost and not report["unexpected_keys"] and not report["mismatched_keys"]
    tokens, mask = oracle.padded_batch()
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long())[0].numpy()
    ours = oracle.jitted(load_pretrained(tmp_path, num_labels=num_labels))(base.variables, tokens, mask)
    assert oracle.relative_error(ours, expected, mask if num_labels is None else None) < 2e-5


@pytest.mark.peers
def test_we_read_what_transformers_shards(tmp_path):
    pytest.importorskip("torch")
    base = from_config(oracle.DECODER | {"model_type": "qwen2"})
    variables = oracle.random_weights(base)
    oracle.in_transformers(base, variables).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = load_pretrained(tmp_path)
    assert equal(again.variables, variables)
    assert again.config == base.config
