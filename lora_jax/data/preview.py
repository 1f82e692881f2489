"""Preview: one example as the model sees it, the part without loss marked. Shown by the first run."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

DIM, RESET = "\x1b[2m", "\x1b[0m"


def runs(ids: Iterable[int], learned: Iterable[bool], tokenizer: Any) -> list[tuple[bool, str]]:
    """Cuts a sequence where its mask changes.

    Args:
      ids: token ids, (T,).
      learned: which of them carry loss, (T,).
      tokenizer: decodes the ids, special tokens included.

    Returns:
      (learned, text) of each run.
    """
    pairs = zip(learned, ids, strict=True)
    found = [(flag, [int(i) for _, i in group]) for flag, group in groupby(pairs, key=lambda pair: bool(pair[0]))]
    return [(flag, tokenizer.decode(part, skip_special_tokens=False)) for flag, part in found]


def language(example: Mapping[str, np.ndarray], tokenizer: Any, colour: bool = False) -> str:
    """Renders an example with `targets` and `weights`: one line per run, `learned` or `masked`, line breaks escaped."""
    # Targets are shifted by one, so the first token is the only one that is never a target.
    ids = np.concatenate([example["tokens"][:1], example["targets"]])
    learned = np.concatenate([[False], example["weights"] > 0])
    lines = [f"{len(ids)} tokens, {int(learned.sum())} of them learned"]
    for flag, text in runs(ids, learned, tokenizer):
        line = f"  {'learned' if flag else 'masked '} | {text!r}"
        lines.append(f"{DIM}{line}{RESET}" if colour and not flag else line)
    return "\n".join(lines)


def labelled(example: Mapping[str, np.ndarray], tokenizer: Any, labels: Sequence[str], colour: bool = False) -> str:
    """Renders an example of a classification: its text, the position that is classified, and the label."""
    tokens = [int(i) for i in example["tokens"]]
    at = int(example["pool_at"])
    token = tokenizer.convert_ids_to_tokens(tokens[at])
    text = repr(tokenizer.decode(tokens, skip_special_tokens=False))
    lines = [f"{len(tokens)} tokens, classified at position {at} ({token})"]
    if "token_type_ids" in example:
        lines[0] += f", the second text from position {int(np.argmax(example['token_type_ids'] > 0))} on"
    lines.append(f"  masked  | {DIM + text + RESET if colour else text}")
    return "\n".join([*lines, f"  learned | {labels[int(example['labels'])]!r}"])
