"""Checkpoints of a run: delta, optimizer slots, step and the run's own bookkeeping; the base by its hash only.

Orbax writes them (in the background, each under a temporary name until it is whole). Around it stands what Orbax does
not do: every leaf has a sha256 that is checked on the way back, since a flipped bit restores silently; a leaf of
another shape or dtype is an error, since dtypes are cast silently; the best and the newest checkpoints are kept
together, since `best_fn` with `max_to_keep` deletes the newest ones and resuming would go backwards.

A checkpoint holds a flat dictionary of arrays, numbered; `meta` names them.
"""

import contextlib
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax import trees
from lora_jax.errors import UserError

VERSION = 1


class KeepNewestAndBest:
    """Which checkpoints stay: the newest few, and the one at step `best`."""

    def __init__(self, newest: int):
        self.newest = max(1, newest)
        self.best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax asks this after every save; checkpoints come oldest first."""
        del context
        newest = sorted(c.step for c in checkpoints)[-self.newest :]
        return [c.step in newest or c.step == self.best for c in checkpoints]


class Checkpoints:
    """The checkpoints of one run; use as a context manager, or call `close`."""

    def __init__(self, folder: str | Path, *, keep: int = 2):
        """Opens a folder, which need not exist; checkpoints that were never finished are not seen.

        Args:
          folder: of the checkpoints.
          keep: how many of the newest stay, besides the best.
        """
        self.folder = Path(folder)
        self._policy = KeepNewestAndBest(keep)

    @functools.cached_property
    def _ocp(self) -> Any:
        """Orbax, imported when the first checkpoint is written or looked for."""
        import orbax.checkpoint as ocp

        # Orbax reports every save through absl; a run reports its own.
        logging.getLogger("absl").setLevel(max(logging.WARNING, logging.getLogger("absl").level))
        return ocp

    @functools.cached_property
    def _manager(self) -> Any:
        options = self._ocp.CheckpointManagerOptions(preservation_policy=self._policy, enable_async_checkpointing=True)
        return self._ocp.CheckpointManager(self.folder.absolute(), options=options)

    def _begun(self) -> bool:
        """Whether there is anything to read, wait for or close: a new run gets to its first step without Orbax."""
        return "_manager" in self.__dict__ or self.folder.exists()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first."""
        return sorted(self._manager.all_steps()) if self._begun() else []

    def save(self, step: int, state: Any, meta: Mapping[str, Any], *, best: int | None = None) -> None:
        """Writes a checkpoint; returns once the state may be changed, and the files follow.

        Args:
          step: of the run; a checkpoint of this step that is there already is replaced.
          state: any tree of arrays.
          meta: JSON: what the run wants back besides arrays.
          best: step of the checkpoint to keep beside the newest.

        Raises:
          RuntimeError: the checkpoint was not written.
        """
        # Own copies: the caller donates these buffers to the next step while the files are still being written.
        leaves = [(name, np.array(leaf, copy=True)) for name, leaf in _named(state)]
        table = [
            {"name": n, "shape": list(x.shape), "dtype": str(x.dtype), "sha256": trees.leaf_hash(x)} for n, x in leaves
        ]
        self._policy.best = best
        if step in self.steps():
            self._manager.wait_until_finished()
            self._manager.delete(step)
        args = self._ocp.args
        written = self._manager.save(
            step,
            args=args.Composite(
                state=args.StandardSave({_key(i): x for i, (_, x) in enumerate(leaves)}),
                meta=args.JsonSave({"version": VERSION, "step": int(step), "leaves": table, "run": dict(meta)}),
            ),
        )
        if not written:
            raise RuntimeError(
                f"{self.folder}: the checkpoint of step {step} was not written; newest is {self.steps()}"
            )

    def wait(self) -> None:
        """Returns when all files are written; raises what went wrong with them."""
        if self._begun():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes the writing."""
        if self._begun():
            self._manager.wait_until_finished()
            self._manager.close()

    def meta(self, step: int) -> dict[str, Any]:
        """What `save` was given as `meta`."""
        return self._read_meta(step)["run"]

    def restore(self, step: int, target: Any) -> Any:
        """Reads a state.

        Args:
          step: one of `steps()`.
          target: the state's tree with arrays (or shapes) of the right shape, dtype and sharding.

        Returns:
          The tree, placed as the target's arrays are.

        Raises:
          UserError: other leaves, shapes or dtypes than the target's, or damaged files.
        """
        meta = self._read_meta(step)
        named = _named(target)
        self._check(step, meta["leaves"], named)
        abstract = {_key(i): _abstract(leaf) for i, (_, leaf) in enumerate(named)}
        with self._readable(step):
            args = self._ocp.args
            restored = self._manager.restore(step, args=args.Composite(state=args.StandardRestore(abstract)))["state"]
        for i, entry in enumerate(meta["leaves"]):
            if trees.leaf_hash(restored[_key(i)]) != entry["sha256"]:
                raise UserError(self._damaged(step, f"{entry['name']} is not what was saved"))
        return jax.tree.unflatten(jax.tree.structure(target), [restored[_key(i)] for i in range(len(named))])

    def _read_meta(self, step: int) -> dict[str, Any]:
        with self._readable(step):
            args = self._ocp.args
            return self._manager.restore(step, args=args.Composite(meta=args.JsonRestore()))["meta"]

    @contextlib.contextmanager
    def _readable(self, step: int):
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # Orbax and TensorStore raise what they like on a damaged file.
            raise UserError(self._damaged(step, str(error).splitlines()[0] if str(error) else repr(error))) from error

    def _damaged(self, step: int, what: str) -> str:
        others = [s for s in self.steps() if s != step]
        then = f"the run then goes on from step {max(others)}" if others else "the run then starts again"
        return f"{self.folder / str(step)} is damaged: {what}. Remove this folder; {then}"

    def _check(self, step: int, saved: list[dict], wanted: list[tuple[str, Any]]) -> None:
        """Compares names, shapes and dtypes; the first difference is the message."""
        have = {e["name"]: (tuple(e["shape"]), e["dtype"]) for e in saved}
        want = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in wanted}
        for name in [*want, *have]:
            if want.get(name) != have.get(name):
                a, b = (_describe(t.get(name)) for t in (have, want))
                raise UserError(
                    f"{self.folder / str(step)} is of another configuration: {name} is {a} in the checkpoint and {b} "
                    "in this run. Give another --workdir, or the configuration that this one was started with"
                )


def _named(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(k), leaf) for k, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _key(index: int) -> str:
    return f"{index:05d}"


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _describe(entry: tuple | None) -> str:
    return "missing" if entry is None else f"{entry[1]}{list(entry[0])}"
