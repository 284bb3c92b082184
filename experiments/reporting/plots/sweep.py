"""The plot of a sweep: the metric against the first swept number, a line per point of the others."""

import pathlib

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from experiments.evaluation.metrics import axis, metric_of
from experiments.evaluation.statistics import mean_and_interval
from experiments.reporting.plots.comparison import STYLE, look_of, plt
from experiments.training import grid


def draw(sweep: grid.Sweep, groups: list[list], metric: str, chosen: dict, path: pathlib.Path) -> None:
    """Draws the test metric with its 95 % interval and the seeds, that on validation, and the point chosen there.

    Args:
      sweep: what was swept.
      groups: the runs of each point, in the order of `sweep.points()`.
      metric: the metric that the runs select by.
      chosen: see `sweep_report.choose`.
      path: the PNG to write.
    """
    points = sweep.points()
    first, rest = sweep.over[0], sweep._replace(over=sweep.over[1:]).points()
    values, shifts = sorted(first.values), 0.02 * (np.arange(len(rest)) - (len(rest) - 1) / 2)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(7.0, 3.0), sharey=True, layout="constrained")
        for axes, (where, test, validation) in zip(
            panels,
            (("last step", "test", "validation"), ("best validation step", "selected_test", "selected_validation")),
            strict=True,
        ):
            place_of = _set_axis(axes, values)
            for number, other in enumerate(rest):
                look = look_of(number)
                own = [{first.name: value, **other} for value in values]
                runs = [groups[points.index(point)] for point in own]
                places = place_of(np.array(values), shifts[number])
                _curve(axes, places, runs, f"{test}_{metric}", f"{validation}_{metric}", metric, look)
            for name, one in chosen.items():
                if name.endswith(where):
                    number = rest.index({key: value for key, value in one["point"].items() if key != first.name})
                    place = place_of(np.array([one["point"][first.name]]), shifts[number])
                    axes.plot(place, metric_of(metric).scale * one[f"{test}_{metric}"], "*", **_STAR)
            axes.set_title(where)
            axes.set_xlabel(first.name)
        panels[0].set_ylabel(axis(metric))
        _cut_intervals(panels[0], groups, metric)
        _legend(figure, rest, bool(chosen))
        figure.savefig(path, bbox_inches="tight")
        plt.close(figure)


_STAR = {"markersize": 13, "markerfacecolor": "none", "markeredgecolor": "black", "markeredgewidth": 1.0, "zorder": 4}


def _set_axis(axes, values):
    """A logarithmic axis where values span a decade or more, 0 being one step to the left of the smallest other one.

    Returns `(values, shift) -> places`, with a shift as a part of the axis.
    """
    positive = [value for value in values if value > 0]
    wide = min(values) >= 0 and len(positive) > 1 and positive[-1] >= 10 * positive[0]
    if not wide:
        width = (values[-1] - values[0]) or 1.0
        axes.xaxis.set_major_locator(FixedLocator(values))
        return lambda some, shift: some + shift * width
    step = np.log10(positive[-1] / positive[0]) / (len(positive) - 1)
    zero = np.log10(positive[0]) - step

    def place_of(some, shift):
        return np.where(some > 0, np.log10(np.where(some > 0, some, 1.0)), zero) + shift * (
            np.log10(positive[-1]) - (zero if values[0] == 0 else np.log10(positive[0]))
        )

    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(place_of(np.array(values), 0.0), [f"{value:g}" for value in values])
    return place_of


def _curve(axes, places, groups, test, validation, metric, look) -> None:
    scale, colour = metric_of(metric).scale, look["color"]
    finished = [[run.result for run in runs if run.result is not None] for runs in groups]
    shown = [(place, results) for place, results in zip(places, finished, strict=True) if results]
    if not shown:
        return
    x = np.array([place for place, _ in shown])
    numbers = {
        name: [scale * np.array([result[name] for result in results]) for _, results in shown]
        for name in (test, validation)
    }
    mean, half = np.array([mean_and_interval(values) for values in numbers[test]]).T
    aside = 0.012 * (axes.get_xlim()[1] - axes.get_xlim()[0])
    line = {"linewidth": 1.3, "markersize": 4.5, "capsize": 3, "zorder": 3}
    axes.errorbar(x, mean, yerr=np.nan_to_num(half), fmt="o", **look, **line)
    for place, values in zip(x, numbers[test], strict=True):
        axes.scatter(np.full(values.size, place + aside), values, s=7, color=colour, alpha=0.5, linewidths=0, zorder=2)
    judged = [values.mean() for values in numbers[validation]]
    axes.plot(x, judged, color=colour, linewidth=1.0, alpha=0.55, dashes=(2, 2))


def _cut_intervals(axes, groups, metric) -> None:
    """Keeps intervals of very few seeds, which can be wider than everything else, from flattening the rest."""
    names = [f"{place}{metric}" for place in ("test_", "selected_test_", "validation_", "selected_validation_")]
    results = [run.result for runs in groups for run in runs if run.result is not None]
    values = metric_of(metric).scale * np.array([[result[name] for name in names] for result in results])
    if not values.size:
        return
    low, high = axes.get_ylim()
    margin = max(np.ptp(values), 0.02 * metric_of(metric).scale)
    axes.set_ylim(max(low, values.min() - margin), min(high, values.max() + margin))


def _legend(figure, rest, chosen: bool) -> None:
    handles = [
        Line2D([], [], color="0.3", marker="o", markersize=4.5, label="test, mean and 95 % interval"),
        Line2D([], [], color="0.3", marker=".", linestyle="", alpha=0.6, label="one seed"),
        Line2D([], [], color="0.3", linewidth=1.0, alpha=0.7, dashes=(2, 2), label="validation, mean"),
    ]
    if chosen:
        handles.append(Line2D([], [], linestyle="", marker="*", label="chosen on validation", **_STAR))
    if len(rest) > 1:
        for number, other in enumerate(rest):
            handles.append(Line2D([], [], label=grid.text_of(other), **look_of(number)))
    figure.legend(handles=handles, loc="outside upper center", ncols=4)
