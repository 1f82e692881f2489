"""Classification: labels, pairs, pooling, and metrics against values worked out by hand."""

import jax
import numpy as np
import pytest

from lora_jax import data, tasks
from lora_jax.data import Record, Splits
from lora_jax.errors import UserError


def records(pairs, split="train"):
    return [Record({"text": t, "label": v}, f"{split}.jsonl line {i}") for i, (t, v) in enumerate(pairs, 1)]


def make(tokenizer, train, dev=(), max_length=16, **options):
    splits = Splits({"train": records(train), "dev": records(dev, "dev"), "test": []})
    return tasks.get("classification")(tokenizer=tokenizer, max_length=max_length, splits=splits, **options), splits


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["pos", "neg", "pos"], ("neg", "pos")),
        ([10, 9, -1], ("-1", "9", "10")),
        ([True, False], ("false", "true")),
        ([1.0, 0.0, 1], ("0", "1")),
        (["2", "10", "b"], ("2", "10", "b")),
    ],
)
def test_labels_come_from_train_in_order(encoder_tokenizer, values, labels):
    task, splits = make(encoder_tokenizer, [("x", v) for v in values])
    assert task.labels == labels
    numbers = [int(task.encode(r)["labels"]) for r in splits["train"]]
    names = [str(v).lower() if isinstance(v, bool) else f"{v:g}" if isinstance(v, float) else str(v) for v in values]
    assert [labels[n] for n in numbers] == names


def test_labels_may_be_given(encoder_tokenizer):
    task, splits = make(encoder_tokenizer, [("x", "b")], labels="c, b")
    assert task.labels == ("c", "b") and int(task.encode(splits["train"][0])["labels"]) == 1
    with pytest.raises(UserError, match="the label 'b' of train is not one of the 2 labels of the option labels"):
        make(encoder_tokenizer, [("x", "b")], labels=["c", "d"])
    with pytest.raises(UserError, match="names a class twice"):
        make(encoder_tokenizer, [("x", "b")], labels="b,b")


def test_bad_labels(encoder_tokenizer):
    with pytest.raises(UserError, match="at least two classes; train has 1: a"):
        make(encoder_tokenizer, [("x", "a"), ("y", "a")])
    with pytest.raises(
        UserError,
        match="dev.jsonl line 2: the label 'positve' of dev is not one of the 2 labels of train; did.*'positive'",
    ):
        make(encoder_tokenizer, [("x", "positive"), ("y", "n")], [("x", "n"), ("z", "positve")])
    for wrong in (0.5, [1], "", {}):
        with pytest.raises(UserError, match="train.jsonl line 2: the field 'label' must name a class"):
            make(encoder_tokenizer, [("x", "a"), ("y", wrong)])
    with pytest.raises(UserError, match="train.jsonl line 1: the field 'label' is null"):
        make(encoder_tokenizer, [("x", None)])
    with pytest.raises(UserError, match="train.jsonl line 2: the field 'text' must be text, got int"):
        make(encoder_tokenizer, [("x", "a"), (3, "b")])
    splits = Splits({"train": [Record({"sentence": "x", "label": "a"}, "train.jsonl line 1")]})
    with pytest.raises(
        UserError, match=r"line 1 has no field 'text'; did you mean 'sentence'\? \(known: label, sentence\)"
    ):
        tasks.get("classification")(tokenizer=encoder_tokenizer, max_length=16, splits=splits)
    with pytest.raises(UserError, match="pool='middle'"):
        make(encoder_tokenizer, [("x", "a"), ("y", "b")], pool="middle")


def pairs(**fields):
    values = [{"p": "The Eagle", "h": "a coffee shop", "label": v} for v in "ab"]
    return Splits({"train": [Record({**v, "text": v["p"], "text_pair": v["h"]}, "line", fields) for v in values]})


def test_an_encoder_reads_a_pair_by_token_types(encoder_tokenizer):
    task = tasks.get("classification")(tokenizer=encoder_tokenizer, max_length=40, splits=pairs())
    example = task.encode(pairs()["train"][0])
    whole = encoder_tokenizer("The Eagle", "a coffee shop")
    assert example["tokens"].tolist() == whole["input_ids"] and example["pool_at"] == 0
    assert example["token_type_ids"].tolist() == whole["token_type_ids"] and example["token_type_ids"].any()
    batch = data.Batches([example], 1)[0]
    assert {"token_type_ids", "pool_at"} <= set(task.inputs(batch))
    assert "second text from position" in task.preview(example)


def test_a_decoder_reads_a_pair_as_two_texts_and_pools_the_last(bos_tokenizer):
    task = tasks.get("classification")(tokenizer=bos_tokenizer, max_length=40, splits=pairs(), separator=" | ")
    example = task.encode(pairs()["train"][0])
    assert example["tokens"].tolist() == bos_tokenizer("The Eagle | a coffee shop")["input_ids"]
    assert example["pool_at"] == len(example["tokens"]) - 1 and "token_type_ids" not in example
    assert task.options["pool"] == "last"
    other = tasks.get("classification")(tokenizer=bos_tokenizer, max_length=40, splits=pairs(), pool="first")
    assert other.encode(pairs()["train"][0])["pool_at"] == 0


def test_a_record_without_its_second_text_is_named(encoder_tokenizer):
    splits = pairs()
    del splits["train"][1].values["text_pair"]
    with pytest.raises(UserError, match="line has no field 'text_pair'"):
        tasks.get("classification")(tokenizer=encoder_tokenizer, max_length=40, splits=splits)


def test_long_texts_are_cut(encoder_tokenizer, decoder_tokenizer):
    task, splits = make(encoder_tokenizer, [("a stirring film " * 20, "a"), ("x", "b")], max_length=8)
    example = task.encode(splits["train"][0])
    assert len(example["tokens"]) == 8 and example["tokens"][-1] == encoder_tokenizer.sep_token_id
    task, splits = make(decoder_tokenizer, [("", "a"), ("x", "b")])
    with pytest.raises(UserError, match="train.jsonl line 1: the text is empty"):
        task.encode(splits["train"][0])


@pytest.fixture
def three(encoder_tokenizer):
    task, splits = make(encoder_tokenizer, [("x", v) for v in "abc"])
    return task


LOGITS = np.array([[2, 0, 0], [0, 1, 0], [0, 0, 3], [4, 0, 0]], np.float32)
LABELS = np.array([0, 1, 1, 2])


def batch_of(labels, ids):
    return {"labels": np.asarray(labels)[:, None], "ids": np.asarray(ids)[:, None]}


def test_metrics_by_hand(three):
    batch = batch_of(LABELS, [0, 1, 2, 3])
    sums = jax.jit(three.sums)(LOGITS, batch)
    np.testing.assert_array_equal(sums["confusion"], [[1, 0, 0], [0, 1, 1], [1, 0, 0]])
    summary = three.summary(jax.device_get(sums))
    probabilities = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    losses = -np.log(probabilities[np.arange(4), LABELS])
    assert summary["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert summary["accuracy"] == 0.5
    # a: precision 1/2, recall 1; b: 1, 1/2; c: 0.
    assert summary["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert "f1" not in summary and three.better == ("accuracy", "max")
    values = jax.device_get(jax.jit(three.per_example)(LOGITS, batch))
    np.testing.assert_allclose(values["loss"][:, 0], losses, rtol=1e-5)
    np.testing.assert_allclose(values["probability"][:, 0], probabilities.max(-1), rtol=1e-5)
    line = three.prediction(records([("x", "b")])[0], {k: v[2, 0] for k, v in values.items()})
    assert (line["label"], line["prediction"], line["correct"]) == ("b", "c", False)
    assert line["loss"] == pytest.approx(losses[2], rel=1e-5)


def test_sums_add_up_and_leave_padding_out(three):
    sums = jax.jit(three.sums)
    whole = sums(LOGITS, batch_of(LABELS, [0, 1, 2, 3]))
    parts = [sums(LOGITS[:2], batch_of(LABELS[:2], [0, 1]))]
    padded = np.where(np.array([[1], [1], [0]]), np.vstack([LOGITS[2:], LOGITS[:1]]), np.nan).astype(np.float32)
    parts.append(sums(padded, batch_of([1, 2, 0], [2, 3, -1])))
    for key, value in whole.items():
        np.testing.assert_allclose(parts[0][key] + parts[1][key], value, rtol=1e-6)
    total, weight = jax.jit(three.loss)(padded, batch_of([1, 2, 0], [2, 3, -1]))
    assert weight == 2 and np.isfinite(total) and total.dtype == np.float32


def test_packed_outputs_give_the_same_sums(three):
    flat, packed = batch_of(LABELS, range(4)), {"labels": LABELS.reshape(2, 2), "ids": np.arange(4).reshape(2, 2)}
    sums = jax.jit(three.sums)
    one, two = sums(LOGITS, flat), sums(LOGITS.reshape(2, 2, 3), packed)
    for key in one:
        np.testing.assert_array_equal(one[key], two[key])
    assert jax.eval_shape(three.per_example, LOGITS.reshape(2, 2, 3), packed)["loss"].shape == (2, 2)


def test_binary_f1_is_of_the_second_class(encoder_tokenizer):
    task, _ = make(encoder_tokenizer, [("x", "no"), ("y", "yes")])
    # yes: 3 hits, 1 missed, 2 wrongly guessed.
    summary = task.summary({"loss": 1.0, "weight": 10.0, "confusion": np.array([[4, 2], [1, 3]])})
    assert summary["f1"] == pytest.approx(6 / 9) and summary["accuracy"] == pytest.approx(0.7)
    assert np.isnan(task.summary({"loss": 0.0, "weight": 0.0, "confusion": np.zeros((2, 2))})["accuracy"])


@pytest.mark.peers
def test_real_data_with_a_real_tokenizer(shared_data, minilm):
    splits = data.load(shared_data / "sst2", limit=200)
    task = tasks.get("classification")(tokenizer=minilm, max_length=64, splits=splits)
    assert task.labels == ("negative", "positive") and task.options["pool"] == "first"
    example = task.encode(splits["dev"][0])
    assert example["tokens"].tolist() == minilm(splits["dev"][0].values["text"])["input_ids"]
    assert "[CLS]" in task.preview(example) and "token_type_ids" not in example
    packed = data.Batches([task.encode(r) for r in splits["train"]], 4, max_length=128, packing=True)
    assert packed.fill > 0.95
    splits = data.load(shared_data / "snli_cad", {"text": "premise", "text_pair": "hypothesis"}, limit=50)
    task = tasks.get("classification")(tokenizer=minilm, max_length=64, splits=splits)
    assert task.labels == ("contradiction", "entailment", "neutral")
    assert task.encode(splits["train"][0])["token_type_ids"].sum() > 0
    splits = data.load(shared_data / "boolq", {"text": "passage", "text_pair": "question"}, limit=50)
    task = tasks.get("classification")(tokenizer=minilm, max_length=48, splits=splits)
    encoded = [task.encode(r) for r in splits["train"]]
    assert max(len(e["tokens"]) for e in encoded) == 48
    assert all((e["tokens"] == minilm.sep_token_id).sum() == 2 for e in encoded)
