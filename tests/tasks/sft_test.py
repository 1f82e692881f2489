"""Supervised fine-tuning: what is learned, what is cut, what generation starts from, how it is scored."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax import data, feed, tasks
from lora_jax.data import Record, Splits
from lora_jax.errors import UserError
from lora_jax.tasks import sft as sft_file
from lora_jax.train_settings import TrainSettings

PROMPT, COMPLETION = "name[The Eagle], area[riverside]", "The Eagle is by the riverside."
TURNS = [
    {"role": "user", "content": "how are you?"},
    {"role": "assistant", "content": "I am content."},
    {"role": "user", "content": "stay"},
    {"role": "assistant", "content": "You shall entreat me stay"},
]


def make(tokenizer, *values, max_length=200, fields=None, **options):
    values = values or ({"prompt": PROMPT, "completion": COMPLETION},)
    rows = [Record(v, f"train.jsonl line {i}", fields or {}) for i, v in enumerate(values, 1)]
    task = tasks.get("sft")(tokenizer=tokenizer, max_length=max_length, splits=Splits({"train": rows}), **options)
    return task, rows


def whole(example):
    return [int(example["tokens"][0]), *example["targets"].tolist()]


def learned(example, tokenizer):
    return tokenizer.decode(example["targets"][example["weights"] > 0])


def test_only_the_completion_and_the_end_are_learned(bos_tokenizer):
    task, (record,) = make(bos_tokenizer)
    example = task.encode(record)
    assert bos_tokenizer.decode(whole(example)) == f"<s>{PROMPT}\n{COMPLETION}</s>"
    assert learned(example, bos_tokenizer) == f"{COMPLETION}</s>"
    assert example["tokens"].tolist()[1:] == example["targets"].tolist()[:-1]
    prompt = task.prompt(record)
    assert bos_tokenizer.decode(prompt) == f"<s>{PROMPT}\n" and whole(example)[: len(prompt)] == prompt
    everything, _ = make(bos_tokenizer, loss_on="all")
    assert learned(everything.encode(record), bos_tokenizer) == f"{PROMPT}\n{COMPLETION}</s>"


def test_a_run_tells_how_many_texts_are_cut(bos_tokenizer):
    values = {"prompt": PROMPT, "completion": COMPLETION}, {"prompt": "a", "completion": "b"}
    task, rows = make(bos_tokenizer, *values)
    length = len(task.encode(rows[0])["tokens"])

    def told(max_length, **more):
        task, rows = make(bos_tokenizer, *values, max_length=max_length)
        batches = feed.make_batches(task, rows, TrainSettings(steps=1, batch_size=2, **more), max_length=max_length)
        return feed.cut_notice(task, batches, max_length)

    assert told(length + 1) == []
    notice = [f"1 of 2 training texts fill max_length={length - 1}: what was longer is cut"]
    assert told(length - 1) == told(length - 1, packing=True) == notice


def test_templates(decoder_tokenizer):
    def text(template, **more):
        task, (record,) = make(decoder_tokenizer, {"prompt": "P", "completion": "C", **more}, template=template)
        return decoder_tokenizer.decode(whole(task.encode(record))), decoder_tokenizer.decode(task.prompt(record))

    assert text("{{Q}} {prompt} {n}:", n=3) == ("{Q} P 3:C<|end|>", "{Q} P 3:")
    assert text("simple") == ("User: P\nAssistant: C<|end|>", "User: P\nAssistant:")
    chat = "<|start|>user\nP<|end|>\n<|start|>assistant\n"
    assert text("chat") == (f"{chat}C<|end|>\n", chat)
    with pytest.raises(
        UserError, match=r"uses \{promt\}, but train.jsonl line 1 has no such field; did you mean 'prompt'"
    ):
        text("{promt}")
    with pytest.raises(UserError, match="is broken"):
        text("{prompt")
    with pytest.raises(UserError, match="only names of fields"):
        text("{prompt.__class__}")
    with pytest.raises(UserError, match="the template must be text"):
        text(3)


def test_messages_learn_every_assistant_turn(decoder_tokenizer):
    task, (record,) = make(decoder_tokenizer, {"messages": TURNS})
    example = task.encode(record)
    assert decoder_tokenizer.decode(whole(example)) == decoder_tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert learned(example, decoder_tokenizer) == "I am content.<|end|>\nYou shall entreat me stay<|end|>\n"
    prompt = decoder_tokenizer.apply_chat_template(TURNS[:3], tokenize=False, add_generation_prompt=True)
    assert decoder_tokenizer.decode(task.prompt(record)) == prompt
    assert whole(example)[: len(task.prompt(record))] == task.prompt(record)
    assert task.references(record) == ["You shall entreat me stay"]


def test_turns_after_the_last_answer_are_left_out(decoder_tokenizer):
    for template in ("chat", "simple"):
        task, rows = make(
            decoder_tokenizer,
            {"messages": TURNS},
            {"messages": [*TURNS, {"role": "user", "content": "bye"}]},
            template=template,
        )
        assert whole(task.encode(rows[0])) == whole(task.encode(rows[1]))
        assert task.prompt(rows[0]) == task.prompt(rows[1])
        assert task.references(rows[0]) == task.references(rows[1])


def test_a_chat_template_writes_the_beginning_itself(bos_tokenizer):
    import copy

    other = copy.deepcopy(bos_tokenizer)
    other.chat_template = "<s>{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    task, (record,) = make(other, {"messages": TURNS})
    ids = whole(task.encode(record))
    assert ids.count(other.bos_token_id) == 1 and ids.count(other.eos_token_id) == 4
    assert task.prompt(record).count(other.bos_token_id) == 1


def test_built_in_chat(bos_tokenizer):
    task, (record,) = make(bos_tokenizer, {"messages": TURNS}, template="simple")
    example = task.encode(record)
    text = "User: how are you?\nAssistant: I am content.</s>\nUser: stay\nAssistant: You shall entreat me stay</s>"
    assert bos_tokenizer.decode(whole(example)) == f"<s>{text}"
    assert learned(example, bos_tokenizer) == " I am content.</s> You shall entreat me stay</s>"
    assert bos_tokenizer.decode(task.prompt(record)) == "<s>" + text.removesuffix(" You shall entreat me stay</s>")
    with pytest.raises(UserError, match="has no chat template; set the task's option template='simple'"):
        make(bos_tokenizer, {"messages": TURNS})
    with pytest.raises(UserError, match="records with messages take the template 'chat' or 'simple', got '{prompt}'"):
        make(bos_tokenizer, {"messages": TURNS}, template="{prompt}")


def test_a_template_that_leaves_out_the_end_still_learns_it(decoder_tokenizer):
    import copy

    other = copy.deepcopy(decoder_tokenizer)
    other.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    task, (record,) = make(other, {"messages": TURNS})
    assert learned(task.encode(record), other) == "I am content.;You shall entreat me stay;<|end|>"
    other.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(UserError, match="line 1: the tokenizer's chat template rewrites earlier turns"):
        make(other, {"messages": TURNS})


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages must be a list like"),
        ([{"role": "user"}], "message 1 must have a role and a content"),
        ([TURNS[0], "x"], "message 2 must have a role and a content"),
        ([TURNS[0]], r"has no assistant turn to learn from \(its roles: user\)"),
        ([], "has no assistant turn"),
        ([{"role": "robot", "content": "x"}, TURNS[1]], "chat template refuses this conversation: no robots"),
        (None, "the field 'messages' is null"),
    ],
)
def test_bad_messages_are_named(decoder_tokenizer, messages, message):
    with pytest.raises(UserError, match=f"train.jsonl line 1.*{message}"):
        make(decoder_tokenizer, {"messages": messages})


def test_a_fault_deep_in_the_data_is_found_at_once(decoder_tokenizer):
    with pytest.raises(UserError, match="train.jsonl line 2 has no assistant turn"):
        make(decoder_tokenizer, {"messages": TURNS}, {"messages": TURNS[:1]})
    with pytest.raises(UserError, match="train.jsonl line 2 has no assistant turn"):
        make(decoder_tokenizer, {"messages": TURNS}, {"messages": TURNS[:1], "references": "x"})
    good = {"prompt": "a", "completion": "b"}
    with pytest.raises(UserError, match=r"train.jsonl line 2 has no field 'completion'; did you mean 'complete'"):
        make(decoder_tokenizer, good, {"prompt": "a", "complete": "b"})
    with pytest.raises(UserError, match="train.jsonl line 2: the field 'references' must be text or a list of texts"):
        make(decoder_tokenizer, good, {**good, "references": [3]})


def test_a_tokenizer_needs_an_end(encoder_tokenizer, decoder_tokenizer):
    with pytest.raises(UserError, match="has no end-of-sequence token"):
        make(encoder_tokenizer)
    with pytest.raises(UserError, match="loss_on='al' does not exist; did you mean 'all'"):
        make(decoder_tokenizer, loss_on="al")


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 1), st.integers(0, 12), st.integers(1, 12), st.integers(3, 14))
def test_truncation(head, prompt, completion, length):
    """Ids number the tokens: the head is 0, the prompt 100..., the completion 200..."""
    ids = [0] * head + list(range(100, 100 + prompt)) + list(range(200, 200 + completion))
    flags = [i >= 200 for i in ids]
    if head + prompt == 0:
        return
    got, kept = sft_file._truncate(ids, flags, length, head)
    assert len(got) == min(len(ids), length) and kept == [i >= 200 for i in got]
    assert got[:head] == [0] * head and any(kept[1:])
    own = [i for i in got if 100 <= i < 200]
    assert own == list(range(100 + prompt - len(own), 100 + prompt))  # cut from the left
    answer = [i for i in got if i >= 200]
    assert answer == list(range(200, 200 + len(answer)))  # cut from the right
    if len(answer) < completion:
        assert len(own) == (0 if head else 1)  # only after the prompt is gone


def test_long_records_keep_their_completion(bos_tokenizer):
    long = {"prompt": "food " * 50 + PROMPT, "completion": COMPLETION}
    task, (record,) = make(bos_tokenizer, long, max_length=30)
    example = task.encode(record)
    assert len(example["tokens"]) == 30 and example["tokens"][0] == bos_tokenizer.bos_token_id
    assert learned(example, bos_tokenizer) == f"{COMPLETION}</s>"
    assert "area[riverside]\n" in bos_tokenizer.decode(example["tokens"])
    prompt = task.prompt(record)
    assert len(prompt) == 30 and prompt[0] == bos_tokenizer.bos_token_id
    assert bos_tokenizer.decode(prompt).endswith("area[riverside]\n")
    task, (record,) = make(bos_tokenizer, {"prompt": "", "completion": "x " * 99}, max_length=5, template="{prompt}")
    assert task.encode(record)["weights"].tolist() == [1.0] * 5


def test_a_record_that_teaches_nothing_is_named(decoder_tokenizer):
    task, (record,) = make(decoder_tokenizer, {"prompt": "", "completion": ""}, template="{prompt}")
    with pytest.raises(UserError, match="train.jsonl line 1: no token precedes the completion"):
        task.encode(record)


def test_references(decoder_tokenizer):
    task, rows = make(
        decoder_tokenizer,
        {"mr": PROMPT, "ref": COMPLETION, "prompt": PROMPT, "completion": COMPLETION},
        {"mr": PROMPT, "refs": ["one", "two"], "prompt": PROMPT, "references": ["one", "two"]},
        {"prompt": PROMPT, "completion": "c", "references": "one"},
        fields={"prompt": "mr", "completion": "ref", "references": "refs"},
    )
    assert [task.references(r) for r in rows] == [[COMPLETION], ["one", "two"], ["one"]]
    # A record that has references only is evaluated on the first one.
    assert learned(task.encode(rows[1]), decoder_tokenizer) == "one<|end|>"
    assert task.prompt(Record({"prompt": "hello"})) == decoder_tokenizer("hello\n")["input_ids"]


def test_a_prompt_needs_no_completion(decoder_tokenizer):
    for template in ("chat", "simple", None):
        task, _ = make(decoder_tokenizer, template=template)
        assert "hello" in decoder_tokenizer.decode(task.prompt(Record({"prompt": "hello"})))


def test_a_conversation_to_be_answered_has_no_assistant_turn(decoder_tokenizer):
    for template in ("chat", "simple"):
        task, (record,) = make(decoder_tokenizer, {"messages": TURNS[:2]}, template=template)
        assert task.prompt(Record({"messages": TURNS[:1]})) == task.prompt(record)
    with pytest.raises(UserError, match="has no assistant turn"):
        task.prompt(Record({"messages": []}))


def test_score(decoder_tokenizer):
    task, _ = make(decoder_tokenizer)
    texts = ["the cat sat on the mat", " a dog ran home today "]
    perfect = task.score(texts, [["x y z", texts[0]], ["a dog ran home today"]])
    assert perfect["exact_match"] == 1.0 and perfect["bleu"] == pytest.approx(100.0)
    assert "tok:13a" in perfect["bleu_signature"] and "version:" in perfect["bleu_signature"]
    half = task.score(texts, [["the cat sat on the mat"], ["a dog ran to the park"]])
    assert half["exact_match"] == 0.5
    # By hand: n-gram hits 9/11, 7/9, 5/7, 3/5 (the second text shares "a dog ran"), lengths 11 against 12.
    hits = [(6 + 3) / 11, (5 + 2) / 9, (4 + 1) / 7, 3 / 5]
    assert half["bleu"] == pytest.approx(100 * np.exp(1 - 12 / 11) * np.prod(hits) ** 0.25)
    with pytest.raises(UserError, match="each needs at least one reference"):
        task.score(["a"], [[]])


def test_preview_marks_what_is_learned(bos_tokenizer):
    task, (record,) = make(bos_tokenizer)
    lines = task.preview(task.encode(record)).split("\n")
    count = len(bos_tokenizer(COMPLETION)["input_ids"])
    assert lines[0].endswith(f"tokens, {count} of them learned")
    assert lines[1:] == [f"  masked  | {'<s>' + PROMPT + chr(10)!r}", f"  learned | {COMPLETION + '</s>'!r}"]
    assert "\x1b[2m  masked " in task.preview(task.encode(record), colour=True)
    assert "\x1b" not in "".join(lines)


def test_real_data(shared_data, decoder_tokenizer):
    fields = {"prompt": "mr", "completion": "ref", "references": "refs"}
    splits = data.load(shared_data / "e2e", fields, limit=60)
    task = tasks.get("sft")(tokenizer=decoder_tokenizer, max_length=256, splits=splits)
    record = splits["dev"][0]
    assert task.references(record) == record.values["refs"]
    assert learned(task.encode(record), decoder_tokenizer) == record.values["refs"][0] + "<|end|>"
    packed = data.Batches([task.encode(r) for r in splits["train"]], 2, max_length=256, packing=True)
    assert packed.segments > 1 and all(b["weights"].sum() > 0 for b in packed.in_order())
    splits = data.load(shared_data / "oasst_chat")
    task = tasks.get("sft")(tokenizer=decoder_tokenizer, max_length=4096, splits=splits)
    record = splits["train"][0]
    answers = [m["content"] for m in record.values["messages"] if m["role"] == "assistant"]
    assert learned(task.encode(record), decoder_tokenizer) == "".join(f"{a}<|end|>\n" for a in answers)
