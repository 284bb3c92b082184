"""Metric names and display: the one place that knows a metric by name.

    validation_<metric>            logged; where there are several pools, their mean
    validation_<pool>_<metric>     on one of several pools; the same for test
    test_<metric>                  at the last step
    selected_test_<metric>         at the step that was best on validation
    selected_validation_<metric>   there, on validation
    corrupted_auroc                how well the weights tell wrong training labels

`metric` in run.json is the one a run selects by: the step, or the point of a sweep, with most of it, or with least
where less is better. A setting may bring metrics of its own: they are `metrics` in run.json, and whoever reads that
registers them.
"""

from collections.abc import Mapping
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


def register(metrics: Mapping[str, Metric | Mapping]) -> None:
    """Makes metrics known by name in this process; a name that is known keeps its form.

    Args:
      metrics: `{name: Metric}`, or what `as_plain` made of it.

    Raises:
      ValueError: a name that is known and has another direction.
    """
    for name, given in metrics.items():
        metric = given if isinstance(given, Metric) else Metric(**given)
        there = METRICS.setdefault(name, metric)
        if there.less_is_better != metric.less_is_better:
            direction = "less" if there.less_is_better else "more"
            raise ValueError(
                f"metric {name!r}: expected {direction} to be better, as for the metric known by that name."
            )


def as_plain(metrics: Mapping[str, Metric]) -> dict[str, dict]:
    """The metrics for a JSON file."""
    return {name: metric._asdict() for name, metric in metrics.items()}


def _name_of(name: str) -> str | None:
    """The metric in the name of a number: the longest that it ends with."""
    found = [key for key in METRICS if name == key or name.endswith(f"_{key}")]
    return max(found, key=len, default=None)


def metric_of(name: str) -> Metric:
    """How a number of a result, or a metric, is shown; any other number as it is."""
    found = _name_of(name)
    return Metric(name.replace("_", " "), "", 1.0, 4) if found is None else METRICS[found]


def goodness(name: str, value: float) -> float:
    """A metric's value as a number of which more is better; not a number is worse than any."""
    if value != value:
        return -float("inf")
    return -value if metric_of(name).less_is_better else value


def heading(name: str) -> str:
    """The column of a number in words, such as "test accuracy %", or "test sketch accuracy %" of a pool "sketch"."""
    metric, key = metric_of(name), _name_of(name)
    prefix = next((prefix for prefix in _FORMS if name.startswith(prefix)), "")
    pool = "" if key is None else name.removeprefix(prefix).removesuffix(key).replace("_", " ")
    return _FORMS.get(prefix, "{}").format(pool + metric.label) + f" {metric.unit}" * bool(metric.unit)


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
