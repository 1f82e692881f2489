"""The recipe of the embedded model: `python -m lora_jax.tiny.pretrain --out=DIR` makes it again, on CPU cores alone.

Next-token prediction with AdamW, first on rows of repeated random tokens, then on the first domain's text with one such
row in eight. The second domain is never read, not even by the tokenizer.
"""

import argparse
import dataclasses
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax import trees
from lora_jax.models import from_config, save_pretrained
from lora_jax.tiny import card
from lora_jax.tiny.grammar import documents
from lora_jax.tiny.rows import echoes, texts
from lora_jax.tiny.start import with_previous_token_heads
from lora_jax.tiny.tokens import EOS, PAD, save_tokenizer, train_tokenizer

HELD_OUT = 1_000_003  # added to the seed for text that is measured and not trained on


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that the shipped file depends on, besides the versions of JAX and of the CPU's code.

    `echo_steps` of the `steps` come first and read repeated random tokens alone, in rows of `echo_length`.
    """

    seed: int = 0
    steps: int = 1800
    echo_steps: int = 350
    echo_length: int = 64
    batch: int = 24
    length: int = 128
    learning_rate: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.05
    vocabulary: int = 1536
    tokenizer_texts: int = 20_000
    width: int = 128
    inner: int = 384
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    initializer_range: float = 0.06
    dtype: str = "float16"


def config(recipe: Recipe) -> dict[str, Any]:
    """The model's config.json."""
    return {
        "model_type": "llama",
        "vocab_size": recipe.vocabulary,
        "hidden_size": recipe.width,
        "intermediate_size": recipe.inner,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.kv_heads,
        "max_position_embeddings": 2 * recipe.length,
        "initializer_range": recipe.initializer_range,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }


def make_tokenizer(recipe: Recipe):
    """The tokenizer, trained on the first domain alone; it has the words of the second, since the two share them."""
    tokenizer = train_tokenizer(itertools.islice(documents(recipe.seed), recipe.tokenizer_texts), recipe.vocabulary)
    assert [tokenizer.token_to_id(t) for t in (PAD, EOS)] == [0, 1]
    return tokenizer


def make_rows(recipe: Recipe, tokenizer) -> Callable[[int], np.ndarray]:
    """Returns `rows(step)` -> (batch, length) int32."""
    size, echoed = recipe.vocabulary, max(1, recipe.batch // 8)
    each = recipe.batch - echoed
    text = texts(tokenizer, recipe.seed, (recipe.steps - recipe.echo_steps) * each, recipe.length)

    def rows(step: int) -> np.ndarray:
        seed, late = recipe.seed + 2 + step, step - recipe.echo_steps
        if late < 0:
            return echoes(seed, recipe.batch, recipe.echo_length, size)
        return np.concatenate([echoes(seed, echoed, recipe.length, size), text[late * each : (late + 1) * each]])

    return rows


def loss(apply: Callable, variables: Any, tokens_BxT: jax.Array) -> jax.Array:
    """Mean cross-entropy of every next token, in nats."""
    logits = apply(variables, tokens_BxT)[:, :-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens_BxT[:, 1:]).mean()


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW on a cosine; matrices decay, norms do not."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, recipe.learning_rate, recipe.warmup, recipe.steps, 0.02 * recipe.learning_rate
    )
    matrices = lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)  # noqa: E731
    adamw = optax.adamw(schedule, b2=0.98, weight_decay=recipe.weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def train(recipe: Recipe, tokenizer, every: int = 100) -> tuple[Any, Any, dict[str, float]]:
    """Runs the recipe; returns the base it began with, the trained variables and what was measured."""
    base, tx, rows = from_config(config(recipe), recipe.seed), optimizer(recipe), make_rows(recipe, tokenizer)

    def update(variables, state, tokens):
        value, grads = jax.value_and_grad(lambda v: loss(base.apply, v, tokens))(variables)
        updates, state = tx.update(grads, state, variables)
        return optax.apply_updates(variables, updates), state, value

    update = jax.jit(update, donate_argnums=(0, 1))
    variables = with_previous_token_heads(base.variables, base.config)
    variables = jax.tree.map(lambda x: jnp.array(x, copy=True), variables)
    state, started = tx.init(variables), time.monotonic()
    for step in range(recipe.steps):
        variables, state, value = update(variables, state, rows(step))
        if (step + 1) % every == 0:
            print(f"step {step + 1} loss {float(value):.3f} at {time.monotonic() - started:.0f} s", flush=True)
    return base, variables, {**measure(recipe, base, variables, tokenizer), "seconds": time.monotonic() - started}


def measure(recipe: Recipe, base: Any, variables: Any, tokenizer) -> dict[str, float]:
    """Loss on held-out text, and how many repeated random tokens are foretold right (where the repeat is in sight)."""
    seed, half = recipe.seed + HELD_OUT, recipe.length // 2
    apply = jax.jit(base.apply)
    text = jax.jit(lambda v, x: loss(base.apply, v, x))(variables, texts(tokenizer, seed, 64, recipe.length))
    rows = echoes(seed, 64, recipe.length, recipe.vocabulary)
    guess = np.asarray(apply(variables, rows)[:, half:-1].argmax(-1))
    return {"text_loss": float(text), "echo_accuracy": float((guess == rows[:, half + 1 :]).mean())}


def build(folder: str | Path, recipe: Recipe) -> dict[str, float]:
    """Makes the whole model directory: weights, config, tokenizer, card."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(recipe)
    base, variables, _ = trained = train(recipe, tokenizer)
    rounded = jax.tree.map(lambda x: x.astype(recipe.dtype), variables)
    save_pretrained(folder, base, rounded)
    save_tokenizer(tokenizer, folder, 2 * recipe.length)
    measured = {**trained[2], "parameters": trees.count(variables)}
    card.write(folder, dataclasses.asdict(recipe), measured)
    return measured


def main() -> None:
    """Every field of the recipe is an option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="directory to write; made if it does not exist")
    for field in dataclasses.fields(Recipe):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    given = vars(parser.parse_args())
    print(build(given.pop("out"), Recipe(**given)))


if __name__ == "__main__":
    main()
