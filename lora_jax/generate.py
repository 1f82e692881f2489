"""Text from a decoder: one compiled program reads the prompts and writes tokens until all rows have ended.

Prompts of different lengths share a batch: they are padded on the left, so that all rows write to the same slot of the
key-value cache, and positions count real tokens only. Lengths, the number of rows and the number of new tokens are
rounded up to a few sizes; everything else that may vary from call to call (temperature, the limit, the seed) is data.
So a second call of about the same size compiles nothing.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import tiling
from lora_jax.errors import UserError
from lora_jax.models.base import Base

_SMALLEST = 16


def generate(
    base: Base,
    variables: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    apply: Callable | None = None,
    eos_ids: Sequence[int] | None = None,
    batch_size: int = 64,
) -> list[list[int]]:
    """Continues every prompt.

    Args:
      base: a decoder.
      variables: its weights, or what `adapter.bind` returned.
      prompts: token ids, at least one each.
      max_new_tokens: at most so many per prompt.
      temperature: 0 takes the likeliest token; otherwise logits are divided by it and a token is drawn.
      top_p: draws from the likeliest tokens that together hold this probability (Holtzman et al. 2019, The Curious Case
        of Neural Text Degeneration, arXiv 1904.09751).
      seed: of the draws. A prompt's draws depend on the seed and its place in the list, not on its neighbours.
      apply: `lj.lift(base.apply)` where `variables` holds adapted weights; None: `base.apply`. Pass the same
        function object again to reuse what was compiled.
      eos_ids: tokens that end a text; None: the checkpoint's.
      batch_size: rows that are computed together, prompts of like length first.

    Returns:
      The new tokens of every prompt, in the given order, without the token that ended it.

    Raises:
      UserError: an empty prompt, a token outside the vocabulary, an option out of range, an encoder.
    """
    _check(base, prompts, max_new_tokens, temperature, top_p, batch_size)
    ends = _ends(base.eos_ids if eos_ids is None else eos_ids)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    run = functools.partial(
        _generate,
        apply=tiling.able(base.apply if apply is None else apply, variables),
        tiles=tiling.choose(base, variables, min(batch_size, len(prompts)), max_new_tokens),
        init_cache=_cache_maker(base.family, base.config, base.dtype),
        room=_rounded(max_new_tokens),
        draw=temperature > 0,
    )
    options = {"limit": max_new_tokens, "temperature": temperature or 1.0, "top_p": top_p, "seed": jax.random.key(seed)}
    out: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        tokens, mask, rows = _batch([prompts[i] for i in chosen], chosen)
        new, lengths = jax.device_get(run(variables, tokens, mask, rows, ends, options))
        for row, i in enumerate(chosen):
            out[i] = new[row, : lengths[row]].tolist()
    return out


def _check(base, prompts, max_new_tokens, temperature, top_p, batch_size) -> None:
    if not base.family.HAS_CACHE or base.num_labels is not None:
        raise UserError("only a decoder without a task head makes text; load a causal model with num_labels=None")
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{name} must be a positive integer, got {value!r}")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature must be 0 (greedy) or a positive number, got {temperature!r}")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must lie in (0, 1], got {top_p!r}")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {i} is empty; give at least one token (the tokenizer's start token, for instance)")
        if min(prompt) < 0 or max(prompt) >= base.config.vocab_size:
            raise UserError(f"prompt {i} has a token outside the vocabulary of {base.config.vocab_size}")


def _rounded(size: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: two sizes per octave, so that at most a third is padding."""
    power = _SMALLEST
    while power < size:
        if power * 3 // 2 >= size:
            return power * 3 // 2
        power *= 2
    return power


def _ends(eos_ids: Sequence[int]) -> np.ndarray:
    """End tokens, filled up with -1 (which is no token) so that their number is rarely part of the program."""
    ends = np.full(4 * max(1, -(-len(eos_ids) // 4)), -1, np.int32)
    ends[: len(eos_ids)] = eos_ids
    return ends


def _batch(prompts: Sequence[Sequence[int]], places: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left-padded tokens (B, P), mask (B, P), each row's place in the caller's list (B,), -1 where there is none."""
    count = 1 << (len(prompts) - 1).bit_length()
    length = _rounded(max(len(p) for p in prompts))
    tokens = np.zeros((count, length), np.int32)
    mask = np.zeros((count, length), bool)
    rows = np.full(count, -1, np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, length - len(prompt) :] = prompt
        mask[i, length - len(prompt) :] = True
        rows[i] = places[i]
    return tokens, mask, rows


@functools.lru_cache(maxsize=64)
def _cache_maker(family, config, dtype) -> Callable:
    """One function per model, so that it can key the compiled program."""
    return lambda batch, length: family.init_cache(config, batch, length, dtype)


@functools.partial(jax.jit, static_argnames=("apply", "tiles", "init_cache", "room", "draw"))
def _generate(variables, tokens_BxP, mask_BxP, rows_B, ends_E, options, *, apply, tiles, init_cache, room, draw):
    """Reads the prompts, then writes one token per turn.

    Returns:
      New tokens (B, room) int32 and how many of them count, (B,) int32.
    """
    batch, prompt = tokens_BxP.shape
    cache = init_cache(batch, prompt + room)
    last = jnp.full((batch, 1), prompt - 1, jnp.int32)
    logits, cache = apply(variables, tokens_BxP, mask_BxP, cache=cache, pool_at=last)
    writing = tiling.lay_out(variables, tiles)
    keys_B = jax.vmap(lambda row: jax.random.fold_in(options["seed"], row))(rows_B)
    choose = functools.partial(_choose, keys_B=keys_B, options=options, draw=draw)

    def record(step, token_B, done_B, lengths_B, new):
        done_B = done_B | jnp.any(token_B[:, None] == ends_E[None, :], axis=1)
        return done_B, lengths_B + ~done_B, jax.lax.dynamic_update_slice(new, token_B[:, None], (0, step))

    def more(state):
        step, _, done_B, *_ = state
        return (step < options["limit"]) & ~jnp.all(done_B)

    def turn(state):
        step, token_B, done_B, lengths_B, new, cache = state
        logits, cache = apply(writing, token_B[:, None], cache=cache)
        token_B = choose(logits[:, -1], step)
        return step + 1, token_B, *record(step, token_B, done_B, lengths_B, new), cache

    token_B = choose(logits[:, -1], 0)
    nothing = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch, room), jnp.int32)
    done_B, lengths_B, new = record(0, token_B, rows_B < 0, *nothing)  # a row of no prompt is done at once
    state = (jnp.int32(1), token_B, done_B, lengths_B, new, cache)
    _, _, _, lengths_B, new, _ = jax.lax.while_loop(more, turn, state)
    return new, lengths_B


def _choose(logits_BxV, step, *, keys_B, options, draw: bool) -> jax.Array:
    """The next token of every row: the likeliest, or one drawn by temperature and top_p."""
    logits_BxV = logits_BxV.astype(jnp.float32)
    if not draw:
        return _likeliest(logits_BxV)
    kept = _nucleus(logits_BxV / options["temperature"], options["top_p"])
    keys_B = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys_B)
    return jax.vmap(jax.random.categorical)(keys_B, kept).astype(jnp.int32)


def _likeliest(logits_BxV) -> jax.Array:
    """The first of the largest logits, (B,) int32; the last token where they are no numbers.

    As a maximum and the least place that has it: XLA on a CPU makes a loop of `argmax`, one number at a time.
    """
    top_B = jnp.max(logits_BxV, axis=-1, keepdims=True)
    places_V = jnp.arange(logits_BxV.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(logits_BxV == top_B, places_V, places_V[-1]), axis=-1)


def _nucleus(logits_BxV, top_p) -> jax.Array:
    """Logits of the smallest set of likeliest tokens that holds `top_p`; -inf for the rest."""
    order = jnp.argsort(-logits_BxV, axis=-1)
    probs = jnp.take_along_axis(jax.nn.softmax(logits_BxV, axis=-1), order, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # held by likelier tokens: 0 for the first, which always stays
    keep = jnp.put_along_axis(jnp.zeros(probs.shape, bool), order, before < top_p, axis=-1, inplace=False)
    return jnp.where(keep, logits_BxV, -jnp.inf)
