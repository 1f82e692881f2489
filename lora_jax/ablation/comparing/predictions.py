"""Two trained adapters on the same examples, from the lines of predictions/*.jsonl.

This asks whether the two differ beyond the choice of examples. Whether two configurations differ is asked over seeds
(`groups.compare`): a large data set makes two runs of one configuration differ too.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.ablation.comparing import statistics
from lora_jax.errors import UserError, did_you_mean

Line = Mapping[str, Any]
SAME = ("id", "where", "label", "tokens")  # what two lines of one example agree in


def compare(
    first: Sequence[Line],
    second: Sequence[Line],
    metric: str,
    *,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.05,
) -> statistics.McNemar | statistics.Bootstrap:
    """McNemar's exact test for 'accuracy', a paired bootstrap for any other metric.

    Args:
      first: lines of one run (`records.read_jsonl`).
      second: of the other run, of the same split.
      metric: 'accuracy', 'macro_f1', 'loss' (weighted by 'tokens' where the lines have them), or any number of a line,
        which is averaged.
      seed: of the bootstrap.
      resamples: of the bootstrap.
      level: 1 - confidence of the bootstrap's interval.

    Raises:
      UserError: the lines are not of the same examples, or have no such metric.
    """
    _check(first, second)
    if metric == "accuracy":
        return statistics.mcnemar(_numbers(first, "correct") > 0, _numbers(second, "correct") > 0)
    a, b, over = _parts(first, second, metric)
    return statistics.paired_bootstrap(a, b, over, seed, resamples, level)


def _check(first: Sequence[Line], second: Sequence[Line]) -> None:
    if len(first) != len(second) or not first:
        raise UserError(f"predictions are compared example by example, got {len(first)} and {len(second)} lines")
    for i, (a, b) in enumerate(zip(first, second), start=1):
        for name in SAME:
            if a.get(name) != b.get(name):
                raise UserError(
                    f"line {i} has the {name} {a.get(name)!r} in one file and {b.get(name)!r} in the other: they must "
                    "be predictions of one split of one data set"
                )


def _numbers(lines: Sequence[Line], name: str) -> np.ndarray:
    """(N,) float64."""
    for i, line in enumerate(lines, start=1):
        if name not in line:
            raise UserError(f"line {i} of the predictions has no {name!r}; {did_you_mean(name, line)}")
        if not isinstance(line[name], (bool, int, float)):
            raise UserError(f"line {i} of the predictions: {name!r} must be a number, got {line[name]!r}")
    return np.asarray([line[name] for line in lines], np.float64)


def _parts(first: Sequence[Line], second: Sequence[Line], metric: str):
    """What the metric needs of each example, and the metric as a function of that."""
    if metric == "macro_f1":
        classes = sorted({str(line.get(name)) for line in [*first, *second] for name in ("label", "prediction")})
        number = {name: i for i, name in enumerate(classes)}
        return _pairs(first, number), _pairs(second, number), macro_f1(len(classes))
    if metric == "loss" and "tokens" in first[0]:
        # An example without a target token has no loss and no weight.
        live = [i for i, line in enumerate(first) if line["tokens"]]
        first, second = [first[i] for i in live], [second[i] for i in live]
        tokens = _numbers(first, "tokens")
        a, b = (np.stack([_numbers(lines, metric) * tokens, tokens], axis=1) for lines in (first, second))
        return a, b, lambda x: float(x[:, 0].sum() / x[:, 1].sum())
    return _numbers(first, metric), _numbers(second, metric), lambda x: float(x.mean())


def _pairs(lines: Sequence[Line], number: Mapping[str, int]) -> np.ndarray:
    """(N, 2) int: the label and the guess."""
    return np.asarray([[number[str(line.get(name))] for name in ("label", "prediction")] for line in lines])


def macro_f1(classes: int) -> Callable[[np.ndarray], float]:
    """(N, 2) labels and guesses -> mean over classes of 2 TP / (true + guessed); a class in neither counts 0."""

    def metric(x: np.ndarray) -> float:
        true, guessed = (np.bincount(x[:, i], minlength=classes) for i in (0, 1))
        hits = np.bincount(x[x[:, 0] == x[:, 1], 0], minlength=classes)
        return float((2 * hits / np.maximum(true + guessed, 1)).mean())

    return metric
