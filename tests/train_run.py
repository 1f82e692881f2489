"""A run in a process of its own, for tests that kill it: `python train_run.py WORKDIR SECONDS_PER_RECORD`."""

import sys
import time

import standin

import lora_jax as lj
from lora_jax.errors import UserError
from lora_jax.train import Diverged, Interrupted, TrainSettings, fit


class Slow:
    """A writer that takes its time, so that there is time to kill the run."""

    def __init__(self, seconds):
        self.seconds = seconds

    def write(self, record):
        time.sleep(self.seconds)

    def close(self):
        pass


def settings() -> TrainSettings:
    return TrainSettings(
        steps=24,
        batch_size=8,
        learning_rate=2e-2,
        eval_every=6,
        checkpoint_every=4,
        log_every=3,
        accumulate=2,
        patience=3,
    )


def train(workdir, seconds=0.0):
    # Dropout in base and adapter: a resumed run must also draw what the unbroken one drew.
    return fit(
        standin.make_base(dropout=0.1),
        lj.lora(rank=2, dropout=0.1),
        standin.make_task(),
        standin.make_splits(),
        settings(),
        workdir,
        seed=5,
        writers=[Slow(seconds)],
    )


def main(workdir, seconds) -> int:
    try:
        train(workdir, float(seconds))
    except (Interrupted, Diverged) as error:
        print(error)
        return error.code
    except UserError as error:
        print(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
