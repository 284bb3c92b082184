"""Evaluators: named judges of trained params, which say what their numbers are and whether less of them is better."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from experiments.evaluation.metrics import METRICS, Metric


class Trained(NamedTuple):
    """What training has made, for evaluators to judge.

    Attributes:
      params: the params.
      averaged: their running mean; `()` without `Experiment.average`.
      model_state: BatchNorm statistics and the like; `None` without any.
    """

    params: Any
    averaged: Any
    model_state: Any


class Evaluator(NamedTuple):
    """A judge of trained params, and what its numbers are.

    Attributes:
      judge: `(trained, arrays) -> {metric: number}`, on the arrays of a validation or test pool, hidden ones too.
      metrics: `{metric: Metric}`, how each number is shown and whether less of it is better.
      pools: names of the pools to judge on; all validation and test pools if empty.
    """

    judge: Callable[[Trained, Mapping[str, Any]], dict[str, float]]
    metrics: Mapping[str, Metric]
    pools: tuple[str, ...] = ()


def known(*names: str) -> dict[str, Metric]:
    """`Evaluator.metrics` from the names of common metrics."""
    return {name: METRICS[name] for name in names}


def of_averaged(evaluator: Evaluator, prefix: str = "averaged") -> Evaluator:
    """The evaluator applied to the running mean of the params; its metrics get the prefix: `averaged_accuracy`."""

    def judge(trained: Trained, arrays) -> dict[str, float]:
        found = evaluator.judge(trained._replace(params=trained.averaged), arrays)
        return {f"{prefix}_{name}": value for name, value in found.items()}

    metrics = {
        f"{prefix}_{name}": metric._replace(label=f"{prefix} {metric.label}")
        for name, metric in evaluator.metrics.items()
    }
    return Evaluator(judge, metrics, evaluator.pools)
