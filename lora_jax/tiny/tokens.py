"""The tokenizer of the embedded default: byte-level BPE, so that no text is unknown.

Every digit is a token of its own: numbers are copied digit by digit, and a new one is no harder than another.
"""

import json
from collections.abc import Iterable
from pathlib import Path

PAD, EOS = "<pad>", "<eos>"


def train_tokenizer(texts: Iterable[str], size: int):
    """Trains the tokenizer on texts.

    Args:
      texts: what it should write in few tokens.
      size: of the vocabulary; `<pad>` is 0, `<eos>` is 1.

    Returns:
      A `tokenizers.Tokenizer`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[PAD, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer, folder: Path, length: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json, as `AutoTokenizer.from_pretrained` reads them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
