"""What the tiny model reads while it is pretrained: rows of token ids, a pure function of the seed.

* `echoes`: random tokens over and over, with another period in every row. Nothing but looking back predicts them, so
  attention heads that copy form within a few hundred steps; text alone had not formed them after eight hundred.
* `texts`: documents of the grammar, one after the other; a row begins with a document and cuts its last one.
"""

import numpy as np

from lora_jax.tiny.grammar import documents
from lora_jax.tiny.tokens import EOS

FIRST_WORD = 2  # below are <pad> and <eos>


def echoes(seed: int, count: int, length: int, size: int) -> np.ndarray:
    """Returns (count, length) int32: in each row a random period of random tokens below `size`, repeated to the end."""
    generator = np.random.Generator(np.random.PCG64([seed, 1]))
    words_NxT = generator.integers(FIRST_WORD, size, (count, length), dtype=np.int32)
    period_N = generator.integers(4, length // 2 + 1, (count, 1))
    return np.take_along_axis(words_NxT, np.arange(length)[None] % period_N, axis=1)


def texts(tokenizer, seed: int, count: int, length: int) -> np.ndarray:
    """Returns (count, length) int32: documents of the grammar, each ended by `<eos>`."""
    end = tokenizer.token_to_id(EOS)
    source, out = documents(seed), np.zeros((count, length), np.int32)
    for row in out:
        ids: list[int] = []
        while len(ids) < length:
            ids += [*tokenizer.encode(next(source)).ids, end]
        row[:] = ids[:length]
    return out
