"""A checkpoint's tokenizer: that of transformers, and a copy of the part that runs need, kept for the next command.

Importing transformers takes one to three seconds, and every command would wait for it to read a file which the
tokenizers package reads in a tenth of that. But tokenizer.json alone is not enough: the classes of transformers change
what stands in it. So what they made of a checkpoint is written down once, and `Kept` works from that; whatever else it
is asked for it leaves to transformers, which is loaded then.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.errors import UserError
from lora_jax.models import files

VERSION = 1  # of what is kept
_IDS = tuple(f"{name}_token_id" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# What transformers takes a space away from when it tidies up a decoded text.
_UNTIDY = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
# Texts on which a copy must agree with the original before it is kept.
_PROBES = (
    "", "A plain sentence, isn't it ? We 've seen 's .", "  two  spaces,\ttabs\nand lines \n\n",
    "naïve ÀÉÎ ﬁne ß 日本語 😀 e\u0301", "[CLS] <s> </s> <|endoftext|> [SEP] <pad> [MASK]", 
    "def f(x):\n    return x**2  # 3.14e-10", "word " * 40,
)  # fmt: skip
_kept_in: Path | None = None


def keep_in(folder: str | os.PathLike | None) -> None:
    """Chooses where copies of tokenizers are kept from now on; None, as at first, keeps none."""
    global _kept_in
    _kept_in = None if folder is None else Path(folder)


def kept_in() -> str | None:
    """Where copies of tokenizers are kept, or None."""
    return None if _kept_in is None else str(_kept_in)


def load(folder: Path | None) -> Any:
    """Loads the tokenizer of a checkpoint.

    Args:
      folder: the checkpoint's.

    Returns:
      The tokenizer of transformers, or a `Kept` copy of it which behaves alike.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    if folder is None:
        raise UserError("this base was made from a config, so it has no tokenizer; load one from a model directory")
    if not any((folder / name).is_file() for name in files.VOCABULARIES):
        raise UserError(f"{folder} has no tokenizer: expected one of {', '.join(files.VOCABULARIES)}")
    if _kept_in is None:
        return original(folder)
    path = _kept_in / f"{_fingerprint(folder)}.json"
    try:
        return Kept(folder, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or a damaged one
        tokenizer = original(folder)
        _keep(path, folder, tokenizer)
        return tokenizer


def original(folder: Path) -> Any:
    """The tokenizer as transformers loads it.

    Raises:
      UserError: it cannot be read.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # tokenizers raises plain Exception on a damaged file
        raise UserError(f"the tokenizer in {folder} cannot be read: {type(error).__name__}: {error}") from None


class Kept:
    """A tokenizer from what `described` wrote down. Calls of other kinds go to transformers' own."""

    def __init__(self, folder: Path, state: Mapping[str, Any]):
        from tokenizers import Tokenizer

        self._folder, self._state = folder, state
        try:
            self._rust = Tokenizer.from_str(state["rust"])
        except Exception as error:  # that is the class which tokenizers raises
            raise ValueError(str(error)) from None
        self._cut: int | None = None
        self._rust.no_truncation()
        self._rust.no_padding()
        self.name_or_path = str(folder)
        self.model_input_names = list(state["model_input_names"])
        for name in _IDS:
            setattr(self, name, state["ids"][name])

    def __call__(
        self,
        text: Any,
        text_pair: Any = None,
        *,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        **more: Any,
    ) -> Any:
        """Encodes a text or a pair of texts, as transformers' tokenizers do when they are called."""
        plain = isinstance(text, str) and (text_pair is None or isinstance(text_pair, str))
        if more or not plain or truncation is not (max_length is not None):
            more |= {"truncation": truncation, "max_length": max_length, "add_special_tokens": add_special_tokens}
            returns = {"token_type_ids": return_token_type_ids, "attention_mask": return_attention_mask}
            return self._whole(text, text_pair, **{f"return_{k}": v for k, v in returns.items()}, **more)
        self._truncate(max_length)
        found = self._rust.encode(text, text_pair or None, add_special_tokens=add_special_tokens)
        out = {"input_ids": found.ids}
        if self._returned("token_type_ids", return_token_type_ids):
            out["token_type_ids"] = found.type_ids
        if self._returned("attention_mask", return_attention_mask):
            out["attention_mask"] = found.attention_mask
        return out

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        """The text of a sequence of ids."""
        text = self._rust.decode([int(i) for i in token_ids], skip_special_tokens=skip_special_tokens)
        for piece in _UNTIDY if self._state["tidies"] else ():
            text = text.replace(piece, piece.strip())
        return text

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """The token of an id, or those of several."""
        return (
            [self._rust.id_to_token(int(i)) for i in ids]
            if hasattr(ids, "__len__")
            else self._rust.id_to_token(int(ids))
        )

    def __len__(self) -> int:
        return self._rust.get_vocab_size(with_added_tokens=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # never by chance, nor while the object is made
            raise AttributeError(name)
        return getattr(self._whole, name)

    @property
    def _whole(self) -> Any:
        if "original" not in self.__dict__:
            self.__dict__["original"] = original(self._folder)
        return self.__dict__["original"]

    def _truncate(self, length: int | None) -> None:
        if length == self._cut:
            return
        if length is None:
            self._rust.no_truncation()
        else:
            self._rust.enable_truncation(length, direction=self._state["truncation_side"])
        self._cut = length

    def _returned(self, name: str, asked: bool | None) -> bool:
        return name in self.model_input_names if asked is None else asked


def described(tokenizer: Any) -> dict[str, Any] | None:
    """What `Kept` needs to know of a tokenizer; None if it is not one of the Rust library's."""
    rust = getattr(tokenizer, "backend_tokenizer", None)
    if rust is None or tokenizer.split_special_tokens:
        return None
    tidies = bool(tokenizer.clean_up_tokenization_spaces) and type(rust.model).__name__ != "BPE"
    return {
        "rust": rust.to_str(),
        "ids": {name: getattr(tokenizer, name) for name in _IDS},
        "model_input_names": list(tokenizer.model_input_names),
        "truncation_side": tokenizer.truncation_side,
        "tidies": tidies,
    }


def agree(one: Any, other: Any) -> bool:
    """Whether two tokenizers do the same to texts of many kinds: whole, cut, in pairs, and back again."""
    for text in _PROBES:
        ways = (one(text), other(text)), (one(text, add_special_tokens=False), other(text, add_special_tokens=False))
        pair = tuple(
            t(text, _PROBES[1], truncation=True, max_length=12, return_token_type_ids=True) for t in (one, other)
        )
        for mine, theirs in (*ways, pair):
            ids = list(theirs["input_ids"])
            if any(list(mine[key]) != list(theirs[key]) for key in theirs) or set(mine) != set(theirs):
                return False
            if any(
                one.decode(ids, skip_special_tokens=s) != other.decode(ids, skip_special_tokens=s)
                for s in (True, False)
            ):
                return False
    return len(one) == len(other)


def _keep(path: Path, folder: Path, tokenizer: Any) -> None:
    """Writes a copy if it is one; a folder that cannot be written to is no reason to stop."""
    state = described(tokenizer)
    if state is None or not agree(Kept(folder, state), tokenizer):
        return
    own = path.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        own.write_text(json.dumps(state), encoding="utf-8")
        own.replace(path)
    with contextlib.suppress(OSError):
        own.unlink(missing_ok=True)


def _fingerprint(folder: Path) -> str:
    """sha256 of everything that the tokenizer depends on: files, and who reads them."""
    found = hashlib.sha256(f"{VERSION}".encode())
    for package in ("transformers", "tokenizers"):
        found.update(f"{package} {importlib.metadata.version(package)}".encode())
    for name in (*files.TOKENIZER, files.CONFIG):
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            found.update(f"{name} {len(content)} ".encode() + content)
    return found.hexdigest()
