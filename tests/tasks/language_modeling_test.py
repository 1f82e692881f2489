"""Language modelling: every token is a target exactly once, and packed rows have the sums of the texts in them."""

import jax
import numpy as np
import pytest

from lora_jax import data, feed, tasks
from lora_jax.data import Record, Splits
from lora_jax.errors import UserError
from lora_jax.likelihood import cross_entropy
from lora_jax.train_settings import TrainSettings

TEXTS = ["The Eagle is a coffee shop.", "food", "I am content. " * 9, "a stirring film"]


def make(tokenizer, texts=TEXTS, max_length=16, **options):
    splits = Splits({"train": [Record({"text": t}, f"train.jsonl line {i}") for i, t in enumerate(texts, 1)]})
    task = tasks.get("language_modeling")(tokenizer=tokenizer, max_length=max_length, splits=splits, **options)
    return task, task.prepare(splits["train"])


def targets(task, records):
    return [int(t) for r in records for t in task.encode(r)["targets"]]


def test_each_text_is_an_example_with_its_ends(bos_tokenizer):
    task, records = make(bos_tokenizer, max_length=200)
    assert [r.where for r in records] == [f"train.jsonl line {i}" for i in range(1, 5)]
    example = task.encode(records[0])
    ids = bos_tokenizer(TEXTS[0])["input_ids"]
    assert example["tokens"].tolist() == ids and ids[0] == bos_tokenizer.bos_token_id
    assert example["targets"].tolist() == [*ids[1:], bos_tokenizer.eos_token_id]
    assert example["weights"].tolist() == [1.0] * len(ids)


def test_long_texts_are_cut_and_each_token_is_a_target_once(bos_tokenizer):
    whole, cut = make(bos_tokenizer, max_length=200), make(bos_tokenizer, max_length=7)
    assert targets(*cut) == targets(*whole)
    assert max(len(cut[0].encode(r)["tokens"]) for r in cut[1]) == 7
    assert "train.jsonl line 3, part 2" in [r.where for r in cut[1]]
    with pytest.raises(UserError, match="line 3 has .* tokens; cut long texts by task.prepare"):
        cut[0].encode(Record({"text": TEXTS[2]}, "train.jsonl line 3"))


def test_nothing_is_said_to_be_cut_where_parts_are_kept(bos_tokenizer):
    task, _ = make(bos_tokenizer)
    records = [Record({"text": text}, str(i)) for i, text in enumerate(TEXTS)]
    batches = feed.make_batches(task, records, TrainSettings(steps=1, batch_size=2), max_length=16)
    assert batches.full and feed.cut_notice(task, batches, 16) == []


def test_contiguous_rows_are_full_and_lose_nothing(decoder_tokenizer):
    task, records = make(decoder_tokenizer, chunks="contiguous", max_length=10)
    end = decoder_tokenizer.eos_token_id
    stream = [i for text in TEXTS for i in [*decoder_tokenizer(text)["input_ids"], end]]
    assert targets(task, records) == stream[1:]
    assert {len(task.encode(r)["tokens"]) for r in records[:-1]} == {10}
    _, joined = make(decoder_tokenizer, chunks="contiguous", max_length=10, separator="\n\n")
    whole = [int(i) for r in joined for i in r.values["input_ids"][bool(r is not joined[0]) :]]
    assert decoder_tokenizer.decode(whole) == "\n\n".join(TEXTS) + "<|end|>"


def test_texts_without_a_target_are_left_out(decoder_tokenizer, caplog):
    _, records = make(decoder_tokenizer, ["", "coffee shop", ""])
    assert [r.where for r in records] == ["train.jsonl line 2"]
    assert "2 of 3 texts have fewer than two tokens" in caplog.text
    with pytest.raises(UserError, match="none of the 1 texts has two tokens"):
        make(decoder_tokenizer, [""])


def test_bad_options(decoder_tokenizer):
    with pytest.raises(UserError, match="chunks='contigous' does not exist; did you mean 'contiguous'"):
        make(decoder_tokenizer, chunks="contigous")
    with pytest.raises(UserError, match="separator only joins"):
        make(decoder_tokenizer, separator="x")
    with pytest.raises(UserError, match="line 1 has no field 'text'"):
        splits = Splits({"train": [Record({"body": "x"}, "line 1")]})
        tasks.get("language_modeling")(tokenizer=decoder_tokenizer, max_length=8, splits=splits)


def test_loss_of_packed_rows_is_that_of_the_texts(bos_tokenizer):
    """With a model that looks at one token only, packing must change nothing at all."""
    task, records = make(bos_tokenizer, max_length=24)
    examples = [task.encode(r) for r in records]
    table = np.random.default_rng(0).normal(size=(500, 500)).astype(np.float32)
    alone = {}
    for i, e in enumerate(examples):
        z = table[e["tokens"]]
        alone[i] = float((np.log(np.exp(z).sum(-1)) - z[np.arange(len(z)), e["targets"]]).sum())
    sums, per_example = jax.jit(task.sums), jax.jit(task.per_example)
    for packing in (False, True):
        batches = data.Batches(examples, 3, max_length=24, packing=packing)
        total, found = {"loss": 0.0, "weight": 0.0}, {}
        for batch in batches.in_order():
            nll = cross_entropy(table[batch["tokens"]], task.inputs(batch)["targets"])
            out = sums(nll, batch)
            total = {k: total[k] + out[k] for k in total}
            values = jax.device_get(per_example(nll, batch))
            for b, s in zip(*np.nonzero(batch["ids"] >= 0), strict=True):
                found[int(batch["ids"][b, s])] = {k: v[b, s] for k, v in values.items()}
        assert packing == (batches.segments > 1)
        assert float(total["loss"]) == pytest.approx(sum(alone.values()), rel=1e-5)
        assert float(total["weight"]) == sum(len(e["targets"]) for e in examples)
        for i, loss in alone.items():
            assert found[i]["loss"] == pytest.approx(loss, rel=1e-5)
            line = task.prediction(records[i], found[i])
            assert line["loss"] == pytest.approx(loss / len(examples[i]["targets"]), rel=1e-5)
            assert line["where"] == records[i].where and line["tokens"] == len(examples[i]["targets"])


def test_summary(bos_tokenizer):
    task, _ = make(bos_tokenizer)
    assert task.summary({"loss": 6.0, "weight": 3.0}) == {"loss": 2.0, "perplexity": pytest.approx(np.exp(2))}
    assert np.isnan(task.summary({"loss": 0.0, "weight": 0.0})["perplexity"])
    assert task.summary({"loss": 1e6, "weight": 1.0})["perplexity"] == np.inf
    assert task.better == ("loss", "min") and task.labels is None


def test_real_text(shared_data, decoder_tokenizer):
    splits = data.load(shared_data / "tinyshakespeare", limit=100)
    task = tasks.get("language_modeling")(
        tokenizer=decoder_tokenizer, max_length=64, splits=splits, chunks="contiguous", separator="\n\n"
    )
    records = task.prepare(splits["dev"])
    text = "\n\n".join(r.values["text"] for r in splits["dev"])
    assert len(targets(task, records)) == len(decoder_tokenizer(text)["input_ids"])
    assert "learned | " in task.preview(task.encode(records[0]))
