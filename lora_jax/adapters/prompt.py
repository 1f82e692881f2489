"""Prompt tuning: trained embeddings before those of the text, and nothing else.

Lester, Al-Rfou, Constant (2021), "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv:2104.08691,
section 2: the model reads [P; X] with P of shape (length, width) and only P is trained.

The paper starts from rows of the embedding table, of sampled tokens (`init='vocab'`, here from the whole vocabulary, as
PEFT does; the paper draws from the 5,000 commonest tokens) or of the words of a text (`init_tokens`), and compares with
U(-0.5, 0.5) (`init='uniform'`). PEFT's own default is N(0, 1) (`init='random'`).

The text's positions come after the virtual tokens', the output has the shape of the base's, and a prompt never starts
as the base. Only a model that reads the collection `virtual` can have one: lora_jax's own families do. In an encoder
each packed text would need a prompt of its own, so packing is refused there.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax import trees, virtual
from lora_jax.adapters.base import Adapter, Entry, draw, entry, json_ready
from lora_jax.errors import UserError, did_you_mean
from lora_jax.lift.weight import Axes, is_adapted

KEY = "@prompt"
INITS: dict[str, Any] = {
    "random": jax.random.normal,
    "uniform": lambda key, shape: jax.random.uniform(key, shape, minval=-0.5, maxval=0.5),
    "vocab": None,
    "tokens": None,
}


@entry()
class Prompt(Entry):
    """The virtual tokens.

    Attributes:
      embedding: (length, width) float32.
    """

    embedding: Any
    axes: Axes = Axes()
    member: str = ""
    layout: ClassVar = {"embedding": ("token", "width")}


def prompt(*, length: int = 20, init: str | None = None, init_tokens: Any = None) -> Adapter:
    """Trains the embeddings of virtual tokens before the text.

    Args:
      length: how many virtual tokens.
      init: 'vocab' (embeddings of sampled tokens), 'tokens' (of `init_tokens`), 'uniform' (within 0.5) or 'random'
        (N(0, 1), PEFT's default). None: 'tokens' where some are given, else 'vocab'.
      init_tokens: token ids to start from, repeated or cut to `length`. In a run's config a text will do
        (`adapter.options.init_tokens`); its ids are those of the run's tokenizer without special tokens.

    Returns:
      An Adapter with the delta `{'@prompt': Prompt}`. It does not start as the base.

    Raises:
      UserError: a length below 1, an unknown init, `init_tokens` that another init would ignore, or that are no ids; at
        `init`: a model that names no token embedding (role 'embed'), or ids outside its vocabulary.
    """
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise UserError(f"prompt(length={length!r}): expected the number of virtual tokens, 1 or more")
    if init not in (None, *INITS):
        raise UserError(f"prompt(init={init!r}): {did_you_mean(str(init), INITS)}")
    ids = _ids(init_tokens, init)
    start = init or ("vocab" if ids is None else "tokens")
    spec = json_ready(method="prompt", length=length, init=init, init_tokens=ids)

    def make(key, variables, sites, *, batch=None):
        del batch
        path = virtual.find(sites, "prompt", "embed", "token embedding")[0].path
        table = trees.flatten(variables, is_leaf=is_adapted)[path]
        table_VxD = table.dense() if is_adapted(table) else table
        key = trees.fold_path(key, KEY)
        if INITS[start] is not None:
            return {KEY: Prompt(embedding=draw(key, (), length, INITS[start], table_VxD.shape[1:]))}
        rows = (
            _sampled(key, length, len(table_VxD)) if start == "vocab" else _repeated(ids or [], length, len(table_VxD))
        )
        return {KEY: Prompt(embedding=jnp.take(table_VxD, rows, axis=0).astype(jnp.float32))}

    def bind(variables, delta, *, key=None, scale=None):
        del key, scale
        return virtual.put(variables, "prompt", delta[KEY].embedding)

    def merge(variables, delta):
        virtual.refuse_merge("prompt")

    def trainable(delta):
        return jax.tree_util.tree_map(lambda _: True, delta)

    return Adapter(make, bind, merge, trainable, spec, starts_as_base=False, own_rows=True)


def _ids(tokens: Any, init: str | None) -> list[int] | None:
    """The ids to start from, checked against the chosen init."""
    if tokens is None:
        if init == "tokens":
            raise UserError("prompt(init='tokens') needs init_tokens=[ids]")
        return None
    if init not in (None, "tokens"):
        raise UserError(f"prompt(init={init!r}) would ignore init_tokens; leave out one of the two")
    ids = [] if isinstance(tokens, str) else list(tokens)
    if not ids or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise UserError(f"prompt(init_tokens={tokens!r}): expected token ids, for instance tokenizer.encode(text)")
    return ids


def _sampled(key: jax.Array, length: int, vocabulary: int) -> jax.Array:
    """Random ids, each from its own key: a shorter prompt starts as the beginning of a longer one."""
    return jax.vmap(lambda j: jax.random.randint(jax.random.fold_in(key, j), (), 0, vocabulary))(jnp.arange(length))


def _repeated(ids: list[int], length: int, vocabulary: int) -> jax.Array:
    """The ids from the start again and again, as many as asked for."""
    if max(ids) >= vocabulary:
        raise UserError(f"prompt(init_tokens=...): the id {max(ids)} is outside the vocabulary of {vocabulary}")
    return jnp.asarray([ids[i % len(ids)] for i in range(length)], jnp.int32)
