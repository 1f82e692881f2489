"""The embedded default: the same text from the same seed everywhere, and a shipped model that is what its card says."""

import hashlib
import itertools
import json

import numpy as np
import pytest
from safetensors import safe_open

from lora_jax import tiny, trees
from lora_jax.errors import UserError
from lora_jax.models import from_config, load_pretrained, rotary
from lora_jax.tiny import card, pretrain, rows, stories, topics
from lora_jax.tiny.grammar import SIZES, announce, announcements, as_jsonl, documents
from lora_jax.tiny.start import with_previous_token_heads
from lora_jax.tiny.words import Draw

LIMIT = 5_000_000  # bytes, of all that is shipped
# Of the text itself: if the grammar changes, the shipped model must be made again and these with it.
DOCUMENTS = "3d95ed90c0e89cd96b99869c5bc698f18e61636ff1d4fd01231dc76207db5ac1"
TRAIN = "af55050e469a70280890fc1b39adce91eb4e9cfdc8b82e55c1fee6dcdb156890"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(tiny.path()))


@pytest.fixture(scope="module")
def splits():
    return announcements(tiny.SEED)


def first(seed: int, count: int) -> list[str]:
    return list(itertools.islice(documents(seed), count))


def test_the_text_of_a_seed_never_changes(splits):
    assert hashlib.sha256("\n".join(first(0, 500)).encode()).hexdigest() == DOCUMENTS
    assert hashlib.sha256(as_jsonl(splits["train"]).encode()).hexdigest() == TRAIN
    assert first(0, 50) != first(1, 50)
    assert announcements(1, {"dev": 5})["dev"] != splits["dev"][:5]


def test_no_prompt_occurs_twice(splits):
    prompts = [row["prompt"] for split in splits.values() for row in split]
    assert len(set(prompts)) == len(prompts) == sum(SIZES.values())


def test_a_crowded_grammar_still_gives_other_prompts(monkeypatch):
    few = iter(range(10**9))
    monkeypatch.setattr("lora_jax.tiny.grammar.example", lambda draw: {"prompt": str(next(few) // 3), "completion": ""})
    made = announcements(0, {"train": 4, "dev": 3})
    assert [r["prompt"] for r in made["train"] + made["dev"]] == [str(i) for i in range(7)]


def values_of(prompt: str) -> dict[str, str]:
    return dict(field.split(": ") for field in prompt.removesuffix(" =>").split(" | ")[1:])


def test_the_answer_follows_from_the_prompt(splits):
    for row in splits["dev"]:
        assert row["completion"] == " " + announce(values_of(row["prompt"]))


def test_every_rule_of_the_second_domain_is_in_every_split(splits):
    for rows_of in splits.values():
        said = {" ".join(row["completion"].split()[:2]) for row in rows_of}
        assert said == {"Bad news,", "Good news,", "Please wait,", "We are"}
        assert 0.2 < np.mean(["The meal is " in row["completion"] for row in rows_of]) < 0.6


def test_the_first_domain_does_not_hold_the_second():
    assert not any("platform:" in text or "delay:" in text or "wait, " in text for text in first(0, 5000))


def test_questions_are_answered_from_their_facts():
    draw = Draw("test", 0)
    for _ in range(200):
        facts, *asked = stories.question(draw).split("\n")
        assert asked
        for line in asked:
            assert line.split("? ", 1)[1] in facts


def test_records_name_every_value_in_their_text():
    draw = Draw("test", 1)
    for _ in range(300):
        text = topics.record(draw)
        written, said = next(text.split(e, 1) for e in dict.fromkeys(topics.ENDINGS) if e in text)
        values = [v for v in written.replace("[", "]").split("]")[1::2]] if "[" in written else []
        assert all(v in said for v in values), text


def test_echoes_repeat_and_differ_in_period():
    made = rows.echoes(0, 16, 64, 100)
    assert made.shape == (16, 64) and made.dtype == np.int32 and made.min() >= rows.FIRST_WORD and made.max() < 100
    periods = {next(p for p in range(4, 33) if (row[p:] == row[:-p]).all()) for row in made}
    assert len(periods) > 5
    assert not np.array_equal(made, rows.echoes(1, 16, 64, 100))


def test_data_is_written_byte_for_byte_the_same(tmp_path):
    sizes = {"train": 30, "dev": 5, "test": 5}
    one, two = (tiny.write_data(tmp_path / name, 3, sizes) for name in "ab")
    for split, size in sizes.items():
        content = (one / f"{split}.jsonl").read_bytes()
        assert content == (two / f"{split}.jsonl").read_bytes()
        assert [set(json.loads(line)) for line in content.splitlines()] == [{"prompt", "completion"}] * size
    assert sorted(p.name for p in one.iterdir()) == ["dev.jsonl", "test.jsonl", "train.jsonl"]


def test_spoilt_data_is_written_again_and_good_data_left_alone(tmp_path):
    tiny.write_data(tmp_path, 0, {"train": 3, "dev": 2})
    good, train = (tmp_path / "dev.jsonl").stat().st_mtime_ns, (tmp_path / "train.jsonl").read_bytes()
    (tmp_path / "train.jsonl").write_text("half of it")
    tiny.write_data(tmp_path, 0, {"train": 3, "dev": 2})
    assert (tmp_path / "train.jsonl").read_bytes() == train
    assert (tmp_path / "dev.jsonl").stat().st_mtime_ns == good


def test_data_has_a_place_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tiny.data_path()
    assert folder == tmp_path / "lora_jax" / "tiny"
    assert len((folder / "train.jsonl").read_text().splitlines()) == tiny.SIZES["train"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write the tiny data to '.*/file/data': .*name another folder"):
        tiny.write_data(tmp_path / "file" / "data")


def test_what_is_shipped_is_small_and_is_what_the_card_says():
    folder = tiny.path()
    assert sum(f.stat().st_size for f in folder.parent.rglob("*") if f.is_file() and f.suffix != ".pyc") < LIMIT
    recorded = card.recorded(folder)
    assert recorded == {name: card.sha256(folder / name) for name in card.FILES}


def test_the_tokenizer_writes_and_reads_every_text(tokenizer, splits):
    texts = first(7, 400) + [r["prompt"] + r["completion"] for r in splits["test"]] + ["Café £30 \u4f60\n\ttwo  spaces"]
    ids = tokenizer(texts)["input_ids"]
    assert tokenizer.batch_decode(ids) == texts
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 1536)
    assert min(i for row in ids for i in row) > 1
    assert max(len(row) for row in ids[:-1]) < 128


def test_a_prompt_and_its_completion_are_cut_where_the_whole_is(tokenizer, splits):
    for row in splits["dev"][:50]:
        whole = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        assert whole == tokenizer(row["prompt"])["input_ids"] + tokenizer(row["completion"])["input_ids"]


def test_the_model_is_a_llama_of_a_million_parameters():
    from transformers import AutoConfig

    base = load_pretrained(tiny.path())
    theirs = AutoConfig.from_pretrained(str(tiny.path()))
    assert theirs.model_type == "llama" and theirs.vocab_size == 1536 and theirs.tie_word_embeddings
    assert trees.count(base.variables) == 984_192
    assert base.eos_ids == (1,)


def test_the_model_is_trained_and_copies():
    """The card's two numbers, measured again on the shipped file."""
    from tokenizers import Tokenizer

    base = load_pretrained(tiny.path())
    tokenizer = Tokenizer.from_file(str(tiny.path() / "tokenizer.json"))
    measured = pretrain.measure(pretrain.Recipe(), base, base.variables, tokenizer)
    text = (tiny.path() / "README.md").read_text()
    assert f"{measured['text_loss']:.3f} nats" in text and f"{measured['echo_accuracy']:.1%} of repeated" in text
    assert measured["echo_accuracy"] > 0.9


def test_the_recipe_makes_the_shipped_tokenizer():
    assert (
        pretrain.make_tokenizer(pretrain.Recipe()).to_str(pretty=True) == (tiny.path() / "tokenizer.json").read_text()
    )


def test_the_card_records_the_recipe_as_it_is():
    text = (tiny.path() / "README.md").read_text()
    recorded = json.loads(text.split("```json\n", 1)[1].split("```", 1)[0])
    assert pretrain.Recipe(**recorded) == pretrain.Recipe()


def test_the_first_two_heads_look_one_and_two_tokens_back():
    recipe = pretrain.Recipe()
    base = from_config(pretrain.config(recipe), 0)
    flat = trees.flatten(with_previous_token_heads(base.variables, base.config))
    x_TxD = flat["embed_tokens/embedding"][rows.echoes(0, 1, 64, recipe.vocabulary)[0]]
    x_TxD = x_TxD / np.sqrt(np.square(x_TxD).mean(1, keepdims=True))
    angles = rotary.tables(base.config.rope, 32, np.arange(64)[None])
    q, k = (x_TxD @ flat[f"layers_0/self_attn/{n}_proj/kernel"] for n in "qk")
    q, k = (np.asarray(rotary.rotate(y.reshape(1, 64, -1, 32), *angles))[0] for y in (q, k))
    for head, distance in enumerate((1, 2)):
        scores = np.where(np.tri(64, dtype=bool), q[:, head] @ k[:, 0].T, -np.inf)
        at = scores.argmax(1)[distance:]
        assert (at == np.arange(64 - distance)).mean() > 0.8, head


def test_a_small_recipe_builds_a_directory_that_loads(tmp_path):
    """The whole path of `python -m lora_jax.tiny.pretrain`: text of 300 tokens falls well under log 300 = 5.7 nats."""
    recipe = pretrain.Recipe(
        steps=40, echo_steps=4, echo_length=16, batch=4, length=32, warmup=2, vocabulary=300, tokenizer_texts=50,
        width=32, inner=32, layers=1, heads=4, kv_heads=2, learning_rate=1e-2,
    )  # fmt: skip
    measured = pretrain.build(tmp_path, recipe)
    assert trees.count(load_pretrained(tmp_path).variables) == measured["parameters"]
    with safe_open(str(tmp_path / "model.safetensors"), framework="np") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
    assert measured["text_loss"] < 5.0
    assert card.recorded(tmp_path) == {name: card.sha256(tmp_path / name) for name in card.FILES}
