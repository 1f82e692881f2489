"""Several arms in one compiled step: `vmap` of the lone run's step over the arms, base and batch held in common.

What arms may differ in is data: scale, learning rate, warm-up, decay, clipping, LoRA+ ratio, ranks and sites (see
`stack`), and the seed (see `mixed`). Everything else is one program. Arrays that all arms share stay without an axis
over the arms, so what no arm adapts (the layers below the lowest adapted one, dropout masks) is computed once for all
of them, where they have one seed. No operation mixes arms, so one that diverges leaves the others as they are.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import evaluate, optim, trees
from lora_jax.ablation.running.stack import Stacked, stack, unstack
from lora_jax.adapters import Adapter
from lora_jax.lift import lift
from lora_jax.step import TrainState, compiler_options, train_step
from lora_jax.train_settings import TrainSettings


class Hyper(NamedTuple):
    """What differs between arms; float32 (arms,), dictionaries by path.

    Attributes:
      learning_rate, warm, weight_decay, clip_norm, lora_plus_ratio: of the optimizer; `warm` in steps, a norm that is
        not clipped infinite.
      scales: of `Stacked`.
      present: of `Stacked`; empty where every arm adapts every site.
      base: weights of the base that are each arm's own, by path: heads that are drawn by the seed.
      which: int32 (arms,), which of the batches of a step is the arm's; None where there is one for all.
    """

    learning_rate: jax.Array
    warm: jax.Array
    weight_decay: jax.Array
    clip_norm: jax.Array
    lora_plus_ratio: jax.Array
    scales: dict[str, jax.Array]
    present: dict[str, jax.Array]
    base: dict[str, jax.Array]
    which: jax.Array | None


class PackState(NamedTuple):
    """A `TrainState` of several arms.

    Attributes:
      trainable: arrays (arms, ...).
      own: frozen leaves in which arms differ, (arms, ...), by their number.
      shared: frozen leaves that are the same for all arms, by their number.
      opt_state: arrays (arms, ...).
      step: of all arms.
      seed: of all arms, or (arms,) where they differ in it.
    """

    trainable: Any
    own: dict[str, jax.Array]
    shared: dict[str, jax.Array]
    opt_state: Any
    step: jax.Array
    seed: jax.Array


class Program(NamedTuple):
    """What is compiled for a pack.

    Attributes:
      start: `(stacked trainable, hyper) -> opt_state`.
      train: `(state, hyper, variables, batch) -> (state, numbers)`, numbers (arms,) each; the state is donated.
      evaluate: `(variables, (trainable, own, shared, hyper), batch) -> (sums, per_example)`, arrays (arms, ...); one
        batch for all arms.
    """

    start: Callable[..., Any]
    train: Callable[..., Any]
    evaluate: Callable[..., Any]


class Pack:
    """The arms of one program: how their deltas become a state, and how they come out of it.

    Attributes:
      total: steps.
      starts: each arm's first delta.
      stacked: all of them.
      mask: of the stacked delta's trainable leaves.
      seeds: of each arm.
      order: the different ones, in the order of the batches of a step.
    """

    def __init__(
        self,
        adapter: Adapter,
        starts: Sequence[Any],
        settings: Sequence[TrainSettings],
        total: int,
        seeds: Sequence[int] = (),
        base: Mapping[str, jax.Array] | None = None,
    ):
        """Args:
        adapter: of any arm; their methods have the same functions once scales and ranks are data.
        starts: each arm's first delta.
        settings: of each arm, alike but for the fields of `Hyper`.
        total: steps.
        seeds: of each arm; none are equal ones.
        base: of `Hyper`.
        """
        self.starts, self._settings, self.total = list(starts), list(settings), total
        self.seeds = tuple(seeds) or (0,) * len(self.starts)
        self.order = tuple(dict.fromkeys(self.seeds))
        self._base = dict(base or {})
        self.stacked: Stacked = stack(starts)
        self.mask = adapter.trainable(self.stacked.delta)
        _, frozen = optim.split(self.stacked.delta, self.mask)
        leaves, self._structure = jax.tree.flatten(frozen)
        same = [bool(np.all(np.asarray(leaf) == np.asarray(leaf)[:1])) for leaf in leaves]
        self._own = {str(i): leaf for i, leaf in enumerate(leaves) if not same[i]}
        self._shared = {str(i): leaf[0] for i, leaf in enumerate(leaves) if same[i]}

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def mixed(self) -> bool:
        """Whether arms differ in their seed."""
        return len(self.order) > 1

    def state(self, program: Program) -> PackState:
        """The state of step 0."""
        trainable, _ = optim.split(self.stacked.delta, self.mask)
        trainable = jax.tree.map(lambda x: jnp.array(x, copy=True), trainable)
        slots = program.start(trainable, self.hyper())
        numbers = np.asarray([seed % 2**32 for seed in self.seeds], np.uint32)
        step, seed = jnp.zeros((), jnp.int32), jnp.asarray(numbers if self.mixed else numbers[0])
        own, shared = jax.tree.map(lambda x: jnp.array(x, copy=True), (self._own, self._shared))
        return jax.device_put(PackState(trainable, own, shared, slots, step, seed), jax.devices()[0])

    def hyper(self) -> Hyper:
        """The arms' numbers."""
        column = lambda of: jnp.asarray([of(s) for s in self._settings], jnp.float32)  # noqa: E731
        present = self.stacked.present
        everywhere = all(flags.all() for flags in present.values())
        return Hyper(
            learning_rate=column(lambda s: s.learning_rate),
            warm=column(lambda s: optim.warmup_steps(s.warmup, self.total)),
            weight_decay=column(lambda s: s.weight_decay),
            clip_norm=column(lambda s: s.clip_norm or jnp.inf),
            lora_plus_ratio=column(lambda s: s.lora_plus_ratio),
            scales=self.stacked.scales,
            present={} if everywhere else {path: jnp.asarray(flags) for path, flags in present.items()},
            base=self._base,
            which=jnp.asarray([self.order.index(s) for s in self.seeds], jnp.int32) if self.mixed else None,
        )

    def frozen(self, own: dict[str, Any], shared: dict[str, Any]) -> Any:
        """The frozen leaves of one arm, or of all, as the tree that `optim.join` takes."""
        both = {**own, **shared}
        return jax.tree.unflatten(self._structure, [both[str(i)] for i in range(len(both))])

    def delta(self, trainable: Any, index: int) -> dict[str, Any]:
        """One arm's delta, given the stacked trainable leaves."""
        _, frozen = optim.split(self.stacked.delta, self.mask)
        return unstack(optim.join(self.mask, trainable, frozen), index, self.starts[index])

    @property
    def signature(self) -> str:
        """Equal for packs that one program serves (at the same shapes)."""
        hyper = self.hyper()
        parts = (jax.tree.structure(self.stacked.delta), self.mask, sorted(self._own), sorted(hyper.present))
        return str((*parts, self._flags(), len(self), self.mixed, sorted(self._base)))

    def _flags(self) -> tuple[bool, bool, bool]:
        """Which parts of the optimizer are there at all."""
        first = self._settings
        return (
            any(s.clip_norm for s in first),
            any(s.weight_decay for s in first),
            any(s.lora_plus_ratio != 1 for s in first),
        )


def make_program(
    pack: Pack, apply: Callable, adapter: Adapter, task: Any, settings: TrainSettings, total: int
) -> Program:
    """Compiles (once it is called) the step and the evaluation of a pack.

    Args:
      pack: the arms.
      apply: the base's function, not lifted.
      adapter: of any arm.
      task: of all arms.
      settings: of any arm; what `Hyper` has is not read.
      total: steps.
    """
    clip, decay, ratio = pack._flags()
    lifted = lift(apply, form="factored")  # arms share the product with the frozen weight

    def optimizer(hyper: Hyper):
        tx = optim.make_optimizer(
            optim.schedule(settings.schedule, hyper.learning_rate, total, hyper.warm),
            weight_decay=hyper.weight_decay if decay else 0.0,
            clip_norm=hyper.clip_norm if clip else None,
            lora_plus_ratio=hyper.lora_plus_ratio if ratio else 1.0,
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.eps,
        )
        return adapter.wrap(tx) if adapter.wrap else tx

    def scaled(hyper: Hyper) -> Adapter:
        if not hyper.scales:
            return adapter
        return adapter._replace(bind=lambda v, d, *, key=None: adapter.bind(v, d, key=key, scale=hyper.scales))

    def kept(hyper: Hyper, trainable: Any) -> Any:
        if not hyper.present:
            return None
        return {path: jax.tree.map(lambda _, p=path: hyper.present[p], one) for path, one in trainable.items()}

    def own_base(hyper: Hyper, variables: Any) -> Any:
        return trees.replace(variables, hyper.base) if hyper.base else variables

    def train(state: PackState, hyper: Hyper, variables: Any, batch: Any):
        if hyper.which is not None:
            batch = jax.tree.map(lambda x: x[hyper.which], batch)
        step = train_step(
            lifted, scaled(hyper), task, optimizer(hyper), pack.mask, accumulate=settings.accumulate,
            kept=kept(hyper, state.trainable),
        )  # fmt: skip
        frozen = pack.frozen(state.own, state.shared)
        new, numbers = step(
            TrainState(state.trainable, frozen, state.opt_state, state.step, state.seed),
            own_base(hyper, variables),
            batch,
        )
        return state._replace(trainable=new.trainable, opt_state=new.opt_state, step=new.step), numbers

    def measure(variables: Any, arm: Any, batch: Any):
        trainable, own, shared, hyper = arm
        delta = optim.join(pack.mask, trainable, pack.frozen(own, shared))
        return evaluate.eval_step(lifted, scaled(hyper), task)(own_base(hyper, variables), delta, batch)

    axes: Any = PackState(0, 0, None, 0, None, 0 if pack.mixed else None)  # type: ignore[arg-type]
    over_arms = jax.vmap(train, in_axes=(axes, 0, None, None), out_axes=(axes, 0))
    return Program(
        start=jax.jit(jax.vmap(lambda trainable, hyper: optimizer(hyper).init(trainable))),
        train=jax.jit(over_arms, donate_argnums=0, compiler_options=compiler_options()),
        evaluate=jax.jit(jax.vmap(measure, in_axes=(None, (0, 0, None, 0), None))),
    )
