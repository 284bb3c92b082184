"""What the numbers of a result are called and how they are shown: the one place that knows a metric by name.

    validation_<metric>            logged
    test_<metric>                  at the last step
    selected_test_<metric>         at the step that was best on validation
    selected_validation_<metric>   there, on validation
    corrupted_auroc                how well the weights tell wrong training labels

A metric is of the primary task. `metric` in run.json is the one a run selects by: the step, or the point of a sweep,
with most of it, or with least where less is better.
"""

from typing import NamedTuple


class Metric(NamedTuple):
    """How a metric is shown: its name in words, the unit behind it, a factor, and the decimals of a table; and whether
    less of it is better."""

    label: str
    unit: str
    scale: float
    digits: int
    less_is_better: bool = False


METRICS = {
    "accuracy": Metric("accuracy", "%", 100.0, 1),
    "auroc": Metric("AUROC", "", 1.0, 3),
    "rmse": Metric("RMSE", "", 1.0, 3, less_is_better=True),
    "mae": Metric("MAE", "", 1.0, 3, less_is_better=True),
    "log_loss": Metric("log loss", "nats", 1.0, 3, less_is_better=True),
}
_FORMS = {
    "selected_test_": "{} at best validation",
    "selected_validation_": "selected validation {}",
    "validation_": "validation {}",
    "test_": "test {}",
    "corrupted_": "corrupted {}",
}


def metric_of(name: str) -> Metric:
    """How a number of a result, or a metric, is shown; any other number as it is."""
    found = [metric for key, metric in METRICS.items() if name == key or name.endswith(f"_{key}")]
    return found[0] if found else Metric(name.replace("_", " "), "", 1.0, 4)


def goodness(name: str, value: float) -> float:
    """A metric's value as a number of which more is better; not a number is worse than any."""
    if value != value:
        return -float("inf")
    return -value if metric_of(name).less_is_better else value


def heading(name: str) -> str:
    """The column of a number in words, such as "test accuracy %"."""
    metric = metric_of(name)
    form = next((form for prefix, form in _FORMS.items() if name.startswith(prefix)), "{}")
    return form.format(metric.label) + f" {metric.unit}" * bool(metric.unit)


def axis(name: str) -> str:
    """The same for the axis of a plot, such as "test accuracy (%)"."""
    metric = metric_of(name)
    return heading(name).removesuffix(metric.unit).strip() + f" ({metric.unit})" * bool(metric.unit)


def columns(names, first) -> list[str]:
    """The numbers of a comparison's table, in order.

    Args:
      names: names of all numbers the results have.
      first: the metrics the runs select by; theirs come first.
    """
    metrics = {name.removeprefix("test_") for name in names if name.startswith("test_")}
    ordered = sorted(metrics, key=lambda metric: (first.index(metric) if metric in first else len(first), metric))
    wanted = [f"{prefix}{metric}" for metric in ordered for prefix in ("test_", "selected_test_")]
    return [name for name in (*wanted, "corrupted_auroc") if name in names]
