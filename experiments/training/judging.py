"""What a run is judged by: its evaluators on the validation and test pools, and the choice of the best step."""

from experiments.contract import Experiment
from experiments.data import pools
from experiments.data.pools import Data
from experiments.evaluation.evaluators import Trained
from experiments.evaluation.metrics import Metric, goodness, register


def trained_of(state) -> Trained:
    """What evaluators see of a training state."""
    return Trained(state.params, state.averaged, state.model_state)


def metrics_of(experiment: Experiment) -> dict[str, Metric]:
    """All metrics of an experiment, registered by name.

    Raises:
      ValueError: a metric of two evaluators, `Experiment.metric` is not one, or another direction than is known.
    """
    found: dict[str, Metric] = {}
    for evaluator in experiment.evaluators:
        if twice := sorted(set(found) & set(evaluator.metrics)):
            raise ValueError(f"evaluators: expected names of metrics to differ, got {twice[0]!r} twice.")
        found |= evaluator.metrics
    if experiment.metric not in found:
        raise ValueError(f"metric={experiment.metric!r}: expected one of the evaluators' metrics, {', '.join(found)}.")
    register(found)
    return found


def judge(experiment: Experiment, trained: Trained, data: Data, purpose: str) -> dict[str, float]:
    """`{metric: number}` on the pools of a purpose: each pool's own, and the mean over pools where there are several.

    The pool named like the purpose gives the plain names; another gives `{pool}_{metric}`, without the purpose in
    front of its name: `sketch_accuracy` of "test_sketch".

    Raises:
      ValueError: an evaluator gave other metrics than it says.
    """
    found: dict[str, dict[str, float]] = {}
    for name, pool in pools.of_purpose(data, purpose).items():
        for evaluator in experiment.evaluators:
            if evaluator.pools and name not in evaluator.pools:
                continue
            numbers = evaluator.judge(trained, pool.arrays)
            if set(numbers) != set(evaluator.metrics):
                raise ValueError(
                    f"evaluators: expected the metrics {sorted(evaluator.metrics)} of {name!r}, got {sorted(numbers)}."
                )
            for metric, value in numbers.items():
                found.setdefault(metric, {})[name.removeprefix(purpose).strip("_")] = float(value)
    plain = {metric: by_pool.get("", sum(by_pool.values()) / len(by_pool)) for metric, by_pool in found.items()}
    own = {f"{pool}_{metric}": value for metric, by_pool in found.items() for pool, value in by_pool.items() if pool}
    return plain | own


def is_better(metric: str, found: dict[str, float], best: dict[str, float] | None) -> bool:
    """Whether numbers on validation are better than the best so far, by one of them."""
    return not best or goodness(metric, found[metric]) > goodness(metric, best[metric])
