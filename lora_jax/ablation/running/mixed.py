"""Arms with different seeds in one pack: what each seed draws for itself, side by side in one shape.

A seed orders the data, draws the first delta, a fresh head and the dropout masks. The batches of a step, one for each
seed, are filled up with empty rows and padding to the most rows and the longest bucket among them. One of them has
that shape by itself, so no shape is new and nothing more is compiled than for one seed.

Padding to a longer bucket would draw other dropout masks, where any are drawn (more rows do not: a mask's first rows
stay as they are). So arms that draw some may only differ in the seed where all batches have one length.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import feed, trees
from lora_jax.data import Batches
from lora_jax.lift import is_random

# With these a random number depends on the key and its place alone, the last axis running fastest.
PREFIX_STABLE = {"jax_threefry_partitionable": True, "jax_default_prng_impl": "threefry2x32"}


class MixedBatches:
    """The training batches of several seeds.

    `batches[step]` is the list of the seeds' batches of that step, in one shape.
    """

    def __init__(self, of_seeds: Sequence[Batches], which: Sequence[int], place: Callable[[Any], Any] = lambda b: b):
        """Args:
        of_seeds: of each seed; the same rows in other orders (`Batches.with_seed`).
        which: of them is each arm's.
        place: puts the frontier of a prefix cache into a batch.
        """
        self._of_seeds, self._which, self._place = list(of_seeds), list(which), place

    def __getitem__(self, step: int) -> list[Mapping[str, Any]]:
        drawn = [one[step] for one in self._of_seeds]
        rows, length = np.max([batch["tokens"].shape for batch in drawn], axis=0).tolist()
        return [self._place(self._grown(batch, rows, length)) for batch in drawn]

    def feed(self, batches: Sequence[Mapping[str, Any]]) -> feed.Fed:
        """Sends a step's batches off, arrays (seeds, ...); its tokens are those of each arm.

        Raises:
          UserError: as `feed.place`.
        """
        for batch in batches:
            feed.check_targets(batch)
        arrays = jax.device_put(jax.tree.map(lambda *x: np.stack(x), *map(dict, batches)), jax.devices()[0])
        tokens = np.asarray([feed.tokens_of(batch) for batch in batches])
        return feed.Fed(arrays, None, tokens[self._which])

    def _grown(self, batch: Mapping[str, np.ndarray], rows: int, length: int) -> dict[str, np.ndarray]:
        if batch["tokens"].shape == (rows, length):
            return dict(batch)
        grown = self._of_seeds[0].empty(length, rows)
        for name, array in batch.items():
            grown[name][tuple(slice(n) for n in array.shape)] = array
        return grown


def own_weights(bases: Sequence[Any]) -> dict[str, jax.Array]:
    """{path: (arms, ...)} of the weights in which bases of different seeds differ; they share all other arrays."""
    flat = [trees.flatten(base.variables) for base in bases]
    return {
        path: jnp.stack([one[path] for one in flat])
        for path, leaf in flat[0].items()
        if any(one[path] is not leaf for one in flat[1:])
    }


def draws(base: Any, adapter: Any, delta: Any, inputs: Mapping[str, Any], base_dropout: bool = True) -> bool:
    """Whether a training step draws random numbers: dropout of the base or of the adapter. Traces, computes nothing.

    Args:
      base: with arrays or shapes as variables.
      adapter: the method.
      delta: of it, arrays or shapes.
      inputs: of the base, arrays or shapes.
      base_dropout: whether the base's own dropout is on.
    """
    key = jax.random.key(0)
    bound = jax.eval_shape(lambda v, d: adapter.bind(v, d, key=key), base.variables, delta)
    if any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(bound)):
        return True  # whoever drops nothing keeps no key
    return base_dropout and is_random(base.apply, base.variables, **inputs, dropout_key=key)


def masks_keep() -> bool:
    """Whether the first rows of a random mask stay as they are when it gets more rows, one key among many or not."""
    return all(getattr(jax.config, name) == value for name, value in PREFIX_STABLE.items())
