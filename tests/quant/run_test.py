"""QLoRA as a run: `--config.quant=nf4` through training, evaluation, generation and export."""

import json
import types

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import config as config_lib
from lora_jax import models, quant, tiny, trees
from lora_jax.assemble import load_adapter, save_adapter
from lora_jax.lift import is_adapted
from tests import commands
from tests.lift.checks import bits_equal, close, furthest

SMALL = [
    "--config.train.steps=6", "--config.train.batch_size=8", "--config.train.eval_every=3", "--config.data.limit=16",
    "--config.train.learning_rate=0.02", "--config.data.max_length=64", "--config.train.buckets=(64,)",
    "--config.generate.max_new_tokens=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on the embedded model."""
    folder = tmp_path_factory.mktemp("runs") / "nf4"
    assert commands.run("train", f"--workdir={folder}", "--config.quant=nf4", *SMALL) == 0
    return folder


@pytest.fixture(scope="module")
def base():
    return models.quantized(models.load_pretrained(tiny.path()), "nf4")


def test_it_trains_on_the_quantized_base(run, base, capsys):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    dev = [r["loss"] for r in records if r["split"] == "dev"]
    assert dev[-1] < dev[0]
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["identity"]["base"] == base.fingerprint != models.load_pretrained(tiny.path()).fingerprint
    summary = json.loads((run / "summary.json").read_text())
    assert summary["total_params"] == trees.count(models.load_pretrained(tiny.path()).variables)


def test_the_audit_says_so(run, capsys):
    ended = commands.command(capsys, "train", f"--workdir={run}", "--config.quant=nf4", *SMALL)
    assert ended.code == 0 and "in nf4, 4." in ended.out and "bits a weight" in ended.out
    other = commands.command(capsys, "train", f"--workdir={run}", "--config.quant=int4", *SMALL)
    assert other.code == 2 and "quant is 'nf4' there and 'int4' here" in other.err


def test_it_evaluates(run, capsys):
    """Text is generated and scored on the way."""
    ended = commands.command(capsys, "evaluate", f"--workdir={run}", "--split=dev", "--config.data.limit=4")
    assert ended.code == 0 and "bleu" in ended.out.lower(), ended.err


@pytest.mark.slow
def test_it_generates(run, capsys):
    ended = commands.command(capsys, "generate", f"--workdir={run}", "--prompt=the sea", "--config.data.limit=4")
    assert ended.code == 0, ended.err


def test_export_merges_into_what_the_adapter_was_trained_on(run, base, tmp_path, capsys):
    out = tmp_path / "hf"
    assert commands.command(capsys, "export", f"--workdir={run}", "--format=hf", f"--out={out}").code == 0
    merged = models.load_pretrained(out)
    adapter, delta = load_adapter(run / "adapter", base)
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6) + 5
    lifted = lj.lift(base.apply)(adapter.bind(base.variables, delta), tokens)
    close(merged.apply(merged.variables, tokens), lifted, 1e-4)
    bits_equal(merged.variables, quant.dequantize(adapter.merge(base.variables, delta)))
    assert (
        commands.command(capsys, "export", f"--workdir={run}", "--format=peft", f"--out={tmp_path / 'peft'}").code == 0
    )
    with pytest.raises(lj.UserError, match="merge the adapter first, then dequantize"):
        models.save_pretrained(tmp_path / "no", base, base.variables)


# Two train the weights that are quantized, this model names no head, and a chain is made of the others.
WITHOUT = {"full", "layers", "head", "chain"}
ELSEWHERE = {"bitfit", "layernorm"}  # what they target is not a product


@pytest.mark.parametrize("method", sorted(set(lj.methods()) - WITHOUT) + ["pissa", "olora"])
def test_what_is_saved_is_read_again(method, base, tmp_path):
    """In PEFT's format where it has the method, else in ours; the same output, which is not the base's."""
    init = {"init": method} if method in ("pissa", "olora") else {}
    name, options = ("lora" if init else method), dict(init)
    if "targets" in lj.adapters.options(name) and name not in ELSEWHERE:
        options["targets"] = "q,v"
    adapter = lj.adapters.get(name)(**options)
    delta = adapter.init(jax.random.key(0), base.variables, base.sites)
    noise = lambda on, x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape, x.dtype) if on else x  # noqa: E731
    delta = jax.tree.map(noise, adapter.trainable(delta), delta)
    save_adapter(tmp_path, types.SimpleNamespace(adapter=adapter, base=base), delta)
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6) + 5
    output = lambda adapter, delta: lj.lift(base.apply)(adapter.bind(base.variables, delta), tokens)  # noqa: E731
    mine = output(adapter, delta)
    close(output(*load_adapter(tmp_path, base)), mine, 1e-5)
    assert furthest(mine, base.apply(base.variables, tokens)) > 1e-3


def test_a_quantized_base(base):
    """Every linear weight, neither embedding nor head; `apply` takes it as it is."""
    leaves = trees.flatten(base.variables, is_adapted)
    small = {p for p, x in leaves.items() if is_adapted(x)}
    linear = {p for p, s in base.sites.items() if s.uses[:1] == ("linear",) and s.role != "head"}
    assert small == linear and len(small) > 4
    tokens = np.arange(8, dtype=np.int32).reshape(1, 8) + 5
    dense = quant.dequantize(base.variables)
    close(base.apply(base.variables, tokens), base.apply(dense, tokens), 1e-5)


def test_an_unknown_format_is_told(capsys, tmp_path):
    ended = commands.command(capsys, "train", f"--workdir={tmp_path}", "--config.quant=nf5")
    assert ended.code == 2 and "quant='nf5' is not a number format: did you mean 'nf4'?" in ended.err
    assert config_lib.resolve(config_lib.default()).quant == ""
