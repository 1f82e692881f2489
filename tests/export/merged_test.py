"""`experiments.export --format=hf` of a finished run, read by transformers: equal logits, its tokenizer, its config."""

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj
from experiments import workdir
from lora_jax import config, export, records
from lora_jax.assemble import assemble, save_adapter
from lora_jax.models import from_config, save_pretrained
from lora_jax.tiny.tokens import save_tokenizer, train_tokenizer
from tests import commands
from tests.lift.checks import noisy
from tests.models import oracle

VOCAB = 300
ROWS = {
    "sft": [{"prompt": f"count {i}", "completion": f"{i}"} for i in range(4)],
    "classification": [{"text": f"word {i}", "label": "even" if i % 2 == 0 else "odd"} for i in range(4)],
}
CASES = {"bert": "classification", "score": "classification", "untied": "sft", "tied": "sft"}


def finished(folder, kind, **overrides):
    """The directory of a run that ended, its adapter drawn at random; returns (directory, parts, delta)."""
    task = CASES[kind]
    raw = oracle.ENCODER if kind == "bert" else oracle.DECODER | {"tie_word_embeddings": kind == "tied"}
    base = from_config(raw | {"vocab_size": VOCAB}, num_labels=2 if task == "classification" else None)
    save_pretrained(folder / "model", base, oracle.random_weights(base))
    save_tokenizer(train_tokenizer(["the sea is blue", "a red boat"], VOCAB), folder / "model", 40)
    data = commands.write(folder / "data", train=ROWS[task], dev=ROWS[task])
    cfg = config.default()
    cfg.update_from_flattened_dict({
        "model.path": str(folder / "model"), "data.path": str(data), "task.name": task, "data.max_length": 32,
        "adapter.method": "lora", "adapter.rank": 2, **overrides,
    })  # fmt: skip
    parts = assemble(config.resolve(cfg))
    delta = parts.adapter.init(jax.random.key(0), parts.base.variables, parts.base.sites)
    delta = noisy(delta, 0.2)
    run = folder / "run"
    records.write_json(run / workdir.CONFIG, cfg.to_dict())
    records.write_json(run / workdir.SUMMARY, {})
    save_adapter(run / workdir.ADAPTER, parts, delta)
    return run, parts, delta


@pytest.mark.peers
@pytest.mark.parametrize("kind", CASES)
def test_transformers_reads_the_merged_checkpoint(kind, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    import transformers

    # The embedding too, so that a tied head carries an update of its own.
    targets = {} if kind in ("bert", "score") else {"adapter.targets": "q,v,down,embed_tokens/embedding"}
    run, parts, delta = finished(tmp_path, kind, **targets)
    out = tmp_path / "out"
    ended = commands.command(capsys, "export", f"--workdir={run}", "--format=hf", f"--out={out}")
    assert ended.code == 0, ended.err
    assert "merged in float32 without loss" in ended.out
    auto = transformers.AutoModelForSequenceClassification if parts.task.labels else transformers.AutoModelForCausalLM
    theirs, report = auto.from_pretrained(out, output_loading_info=True, attn_implementation="eager")
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert isinstance(theirs, getattr(transformers, theirs.config.architectures[0]))
    tokens, mask = oracle.padded_batch()
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long())[0].numpy()
    bound = parts.adapter.bind(parts.base.variables, delta)
    ours = jax.jit(lj.lift(parts.base.apply))(bound, tokens, mask)
    where = None if parts.task.labels else mask
    assert oracle.relative_error(ours, expected, where) < 2e-5
    plain = oracle.jitted(parts.base)(parts.base.variables, tokens, mask)
    assert oracle.relative_error(plain, expected, where) > 1e-2, "the adapter is in the file"
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    text = "a red boat on the sea"
    assert tokenizer(text)["input_ids"] == parts.base.tokenizer(text)["input_ids"] != []


@pytest.mark.parametrize("kind", ["bert", "tied"])
def test_a_bfloat16_base_reports_its_rounding(kind, tmp_path, capsys):
    run, parts, delta = finished(tmp_path, kind, **{"model.dtype": "bfloat16"})
    out = tmp_path / "out"
    ended = commands.command(capsys, "export", f"--workdir={run}", "--format=hf", f"--out={out}")
    assert ended.code == 0, ended.err
    found = export.rounding(parts.adapter, delta, parts.base.variables)
    assert found.largest > 0 and str(found) + "\n" in ended.out and "merging into bfloat16" in ended.out
    again = lj.load_pretrained(out, dtype="bfloat16", num_labels=parts.base.num_labels)
    expected = parts.adapter.merge(parts.base.variables, delta)
    equal = jax.tree_util.tree_map(
        lambda x, y: bool((x == y).all()) and y.dtype == jnp.bfloat16, again.variables, expected
    )
    assert all(jax.tree_util.tree_leaves(equal))


def test_a_method_that_cannot_be_merged_ends_with_one_line(tmp_path, capsys, monkeypatch):
    run, _, _ = finished(tmp_path, "untied")
    from experiments import export as command

    def load(folder, base):
        adapter, delta = load_adapter(folder, base)

        def refuse(*_):
            raise lj.UserError("it acts on activations")

        return adapter._replace(merge=refuse, spec={"method": "other"}), delta

    load_adapter = command.load_adapter
    monkeypatch.setattr(command, "load_adapter", load)
    ended = commands.command(capsys, "export", f"--workdir={run}", "--format=hf", f"--out={tmp_path / 'out'}")
    assert ended.code == 2 and ended.err.count("\n") == 1
    assert "the method 'other' cannot be merged" in ended.err and "--format=peft" in ended.err
    assert not (tmp_path / "out").exists()
