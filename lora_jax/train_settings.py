"""How a run trains: the numbers of the section `train` of a configuration, checked once."""

import dataclasses
import math
from typing import Any

from lora_jax import optim
from lora_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How to train. Exactly one of `steps` and `epochs` is above 0.

    Attributes:
      steps: optimizer steps.
      epochs: passes over the training data; may be a fraction.
      batch_size: rows per optimizer step, over all devices and micro-batches.
      eval_batch_size: rows per evaluation step; 0 takes `batch_size`.
      learning_rate: the peak.
      schedule: 'constant', 'cosine' or 'linear', after the warm-up.
      warmup: steps, or below 1 a fraction of all.
      weight_decay: on what `optim.decay_mask` names.
      clip_norm: of the whole gradient; 0 is off.
      accumulate: micro-batches that a batch is cut into; changes memory, not the result.
      b1, b2, eps: of Adam.
      lora_plus_ratio: learning rate of B over that of A.
      eval_every: steps between evaluations on dev; 0 evaluates at the end only.
      checkpoint_every: steps between checkpoints; 0 saves after evaluations that improve and at the end only.
      log_every: steps between log lines.
      patience: evaluations without improvement before the run stops; 0 is off. With it the best adapter is the one
        that is saved and tested, without it the last.
      keep: newest checkpoints that stay, besides the best.
      packing: several examples in one row, by a plan for the whole run; `batch_size` then counts rows.
      share_rows: the examples of each step share rows, so that padding is hardly computed; `batch_size` still counts
        examples. Off by itself for a method that needs a row for each text (`Adapter.own_rows`).
      buckets: lengths that rows are padded to; see `data.buckets.choose`.
      prefix_cache: whether what lies below the adapter is computed once for all epochs: 'auto' where that changes
        nothing and pays, 'on' with the base's own dropout turned off, 'off'; see `prefix_cache.for_run`.
      prefix_cache_gb: memory of the host that it may take, in 10^9 bytes.
      prefix_cache_disk_gb: room in the work directory, for what does not fit into memory.
    """

    steps: int = 0
    epochs: float = 0.0
    batch_size: int = 32
    eval_batch_size: int = 0
    learning_rate: float = 1e-3
    schedule: str = "linear"
    warmup: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    accumulate: int = 1
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    lora_plus_ratio: float = 1.0
    eval_every: int = 0
    checkpoint_every: int = 0
    log_every: int = 10
    patience: int = 0
    keep: int = 2
    packing: bool = False
    share_rows: bool = False
    buckets: Any = None
    prefix_cache: str = "auto"
    prefix_cache_gb: float = 2.0
    prefix_cache_disk_gb: float = 0.0

    def __post_init__(self):
        for name, least in _LEAST.items():
            value = getattr(self, name)
            whole = isinstance(least, int)
            number = isinstance(value, int) or (not whole and isinstance(value, float) and math.isfinite(value))
            if not number or isinstance(value, bool) or value < least:
                kind = "a whole number" if whole else "a number"
                raise UserError(f"train.{name}={value!r}: expected {kind} of at least {least:g}")
        for name in ("b1", "b2"):
            if not getattr(self, name) < 1:
                raise UserError(f"train.{name}={getattr(self, name)!r}: expected a number from 0 to below 1")
        if (self.steps > 0) == (self.epochs > 0):
            raise UserError(
                f"train.steps={self.steps} and train.epochs={self.epochs:g}: "
                "set exactly one of them above 0 and the other to 0"
            )
        if self.patience and not self.eval_every:
            raise UserError(f"train.patience={self.patience} counts evaluations, but train.eval_every is 0; set it")
        if self.packing and self.share_rows:
            raise UserError(
                "train.packing and train.share_rows are both on: packing fills rows for the whole run, shared rows "
                "those of each step; set one of them to false"
            )
        if self.prefix_cache not in ("auto", "on", "off"):
            raise UserError(f"train.prefix_cache={self.prefix_cache!r}: expected auto, on or off")
        optim.make_schedule(self.schedule, self.learning_rate, max(self.steps, 1), 0)  # its kind is checked there
        if self.warmup < 1 or self.steps:
            optim.warmup_steps(self.warmup, max(self.steps, 1))

    def total(self, steps_per_epoch: int) -> int:
        """Steps of the whole run."""
        return self.steps or max(1, math.ceil(self.epochs * steps_per_epoch - 1e-9))


# The least value of every number; a float here means that fractions are allowed.
_LEAST: dict[str, float] = {
    "steps": 0, "epochs": 0.0, "batch_size": 1, "eval_batch_size": 0, "learning_rate": 0.0, "warmup": 0.0,
    "weight_decay": 0.0, "clip_norm": 0.0, "accumulate": 1, "b1": 0.0, "b2": 0.0, "eps": 0.0, "lora_plus_ratio": 0.0,
    "eval_every": 0, "checkpoint_every": 0, "log_every": 1, "patience": 0, "keep": 1,
    "prefix_cache_gb": 0.0, "prefix_cache_disk_gb": 0.0,
}  # fmt: skip
# What may differ when a run is resumed: it changes what is shown and kept, not what is computed.
SHOWN_ONLY = ("log_every", "checkpoint_every", "keep", "prefix_cache_gb", "prefix_cache_disk_gb")
