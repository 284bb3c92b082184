"""The plots of a comparison, made from the files of its runs.

    accuracy.png   test accuracy by method, every seed a dot, mean and 95 % interval; auroc.png for runs that select by
                   the AUROC
    differences.png  the same less that of one method, seed by seed
    training.png   the same metric on validation over training
    weights.png    mean weight of every task over training, a panel per method
    labels.png     entropies of generated labels over training, for methods that generate some
    filter.png     the loss filter a method has learned, sigmoid(slope z + offset) (JTDS), a panel per method
    samples.png    histogram of the weights of the training examples, clean against corrupted, a panel per method

A plot that the runs have no numbers for is left out; one that was there from an earlier report is deleted.
"""

import pathlib
import re
from functools import partial

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from experiments.evaluation.metrics import METRICS, axis, metric_of
from experiments.evaluation.statistics import mean_and_interval

# Okabe and Ito's colours: told apart by colour-blind readers. The yellow, hard to see on white, comes last.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
LINES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
COLUMNS = 3
STYLE = {
    "figure.dpi": 200,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.title_fontsize": 8,
}


def draw_all(groups: dict[str, list], directory: pathlib.Path, against: str | None = None) -> list[pathlib.Path]:
    """Draws every plot the runs have data for.

    Args:
      groups: `{label: runs}`, see `runs.by_method`.
      directory: where the files go.
      against: the label that `differences.png` takes from the others; `None` for no such plot.

    Returns:
      The files written.
    """
    written = []
    drawings = {metric: partial(_scores, metric) for metric in METRICS}
    drawings |= {
        "differences": partial(_differences, against),
        "training": _training,
        "weights": _weights,
        "labels": _labels,
        "filter": _filter,
        "samples": _samples,
    }
    with plt.rc_context(STYLE):
        for name, draw in drawings.items():
            path = directory / f"{name}.png"
            figure = draw(groups)
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            figure.savefig(path, bbox_inches="tight")
            plt.close(figure)
            written.append(path)
    return written


def look_of(place: int) -> dict:
    """Colour and line of the method, or task, at this place: all different for the first 32."""
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": LINES[place // len(COLOURS) % len(LINES)]}


def _task_look(place: int) -> dict:
    """Colour and line of the task at this place: the first four differ in both, so that one shows through the next."""
    line = min(place % len(COLOURS), 3) + place // len(COLOURS)
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": LINES[line % len(LINES)]}


def _panels(labels, width: float, height: float, **options):
    """A figure with a panel per label, its title, in rows of at most three; `[(axes, is leftmost, is lowest)]`."""
    count = len(labels)
    columns = min(COLUMNS, count) if count != 4 else 2
    rows = -(-count // columns)
    size = (0.6 + width * columns, 0.4 + height * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
    found = []
    for place, axes in enumerate(grid.flat):
        if place >= count:
            axes.set_visible(False)
            continue
        axes.set_title(labels[place])
        lowest = place + columns >= count
        axes.tick_params(labelbottom=True)
        found.append((axes, place % columns == 0, lowest))
    return figure, found


def _finished(groups):
    found = {method: [run for run in runs if run.result is not None] for method, runs in groups.items()}
    return {method: runs for method, runs in found.items() if runs}


def _of_metric(groups, metric: str):
    """The methods whose runs select by a metric."""
    return {method: runs for method, runs in groups.items() if runs[0].about["metric"] == metric}


def _scores(metric, groups):
    finished = _of_metric(_finished(groups), metric)
    if not finished:
        return None
    crowded = len(finished) > 8
    figure, axes = plt.subplots(figsize=(1.2 + (0.45 if crowded else 0.9) * len(finished), 3.0))
    test = f"test_{metric}"
    first, second, aside = (-0.3, 0.12, 0.18) if crowded else (-0.13, 0.13, 0.1)
    kinds = ((test, "o", first, "last step"), (f"selected_{test}", "D", second, "best validation step"))
    for place, (method, runs) in enumerate(finished.items()):
        colour = look_of(list(groups).index(method))["color"]
        for name, marker, shift, _ in kinds:
            values = metric_of(metric).scale * np.array([run.result[name] for run in runs if name in run.result])
            if not values.size:
                continue
            mean, half = mean_and_interval(values)
            axes.errorbar(
                place + shift,
                mean,
                yerr=None if np.isnan(half) else half,
                fmt=marker,
                markersize=5,
                color=colour,
                markerfacecolor=colour if marker == "o" else "white",
                capsize=3,
                linewidth=1.2,
                zorder=3,
            )
            axes.scatter(
                np.full(values.size, place + shift + aside), values, s=7, color=colour, alpha=0.6, linewidths=0
            )
    for _, marker, _, label in kinds:
        axes.plot([], [], marker, color="0.3", markerfacecolor="0.3" if marker == "o" else "white", label=label)
    axes.scatter([], [], s=7, color="0.3", alpha=0.6, label="one seed")
    longest = max(map(len, finished))
    turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(finished)), list(finished), **(turned if longest > 12 or crowded else {}))
    axes.set_xlim(-0.5, len(finished) - 0.5)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel(axis(test))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, handletextpad=0.2, columnspacing=1.2)
    return figure


def _differences(against, groups):
    """A line per method: its test metric at the last step less that of `against`, on the seeds that both have."""
    finished = _finished(groups)
    if against not in finished:
        return None
    metric = finished[against][0].about["metric"]
    shown = metric_of(metric)
    reference = {_place(run): run.result[f"test_{metric}"] for run in finished[against]}
    found = {}
    for method, runs in _of_metric(finished, metric).items():
        pairs = [(run.result[f"test_{metric}"], reference.get(_place(run))) for run in runs]
        values = shown.scale * np.array([value - other for value, other in pairs if other is not None])
        if method != against and values.size:
            found[method] = values
    if not found:
        return None
    figure, axes = plt.subplots(figsize=(4.5, 0.8 + 0.21 * len(found)))
    for place, (method, values) in enumerate(found.items()):
        mean, half = mean_and_interval(values)
        colour = look_of(list(groups).index(method))["color"]
        options = {"fmt": "o", "markersize": 4, "capsize": 2.5, "linewidth": 1.2, "zorder": 3}
        axes.errorbar(mean, place, xerr=None if np.isnan(half) else half, color=colour, **options)
        axes.scatter(values, np.full(values.size, place + 0.28), s=7, color=colour, alpha=0.6, linewidths=0)
    axes.axvline(0.0, color="0.3", linewidth=0.8, zorder=1)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    unit = f" ({'points' if shown.unit == '%' else shown.unit})" * bool(shown.unit)
    axes.set_xlabel(f"test {shown.label} less that of {against}{unit}: mean, 95 % interval and seeds")
    return figure


def _place(run) -> tuple:
    return run.about["config"], run.about["seed"]


def _curves(axes, runs, name, look, scale=1.0, spread=True, **options) -> bool:
    """Mean, and range if expected, over the runs, at the steps all have logged; runs without any do not count."""
    logs = [{line["step"]: line[name] for line in run.log if name in line} for run in runs]
    logs = [log for log in logs if log]
    steps = sorted(set.intersection(*map(set, logs))) if logs else []
    if not steps:
        return False
    values = scale * np.array([[log[step] for step in steps] for log in logs])
    marker = "." if len(steps) == 1 else None
    axes.plot(steps, values.mean(0), marker=marker, **{"linewidth": 1.4, **look, **options})
    if spread:
        axes.fill_between(steps, values.min(0), values.max(0), color=look["color"], alpha=0.15, linewidth=0)
    return True


def _training(groups):
    logged = {method: [run for run in runs if run.log] for method, runs in groups.items()}
    logged = {method: runs for method, runs in logged.items() if runs}
    kinds = [metric for metric in METRICS if _of_metric(logged, metric)]
    if not kinds:
        return None
    crowded = len(logged) > 8  # ranges on top of each other would hide the means
    figure, grid = plt.subplots(len(kinds), 1, figsize=(4.5, 3.0 * len(kinds)), squeeze=False)
    figure.subplots_adjust(hspace=0.35)
    for axes, metric in zip(grid.flat, kinds, strict=True):
        name = f"validation_{metric}"
        for method, runs in _of_metric(logged, metric).items():
            look = look_of(list(groups).index(method))
            _curves(axes, runs, name, look, metric_of(metric).scale, spread=not crowded, label=method)
        axes.set_xlabel("inner updates")
        axes.set_ylabel(axis(name))
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
        title = "mean over seeds" if crowded else "mean and range\nover seeds"
        options = {"title": title, "alignment": "left", "ncols": 1 + (len(groups) > 16)}
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), **options)
    return figure


def _cut_outliers(panels) -> None:
    """One scale for all panels; a panel that would leave nothing to see of the others is cut, and says so."""
    drawn = {axes: np.concatenate([np.zeros(1), *(line.get_ydata() for line in axes.get_lines())]) for axes in panels}
    drawn = {axes: values[np.isfinite(values)] for axes, values in drawn.items()}
    usual = max(4.0 * float(np.median([np.abs(values).max() for values in drawn.values()])), 1.0)
    inside = np.concatenate([values for values in drawn.values() if np.abs(values).max() <= usual])
    margin = 0.05 * max(np.ptp(inside), 0.1)
    panels[0].set_ylim(inside.min() - margin, inside.max() + margin)  # a weight of 0 is a line, too
    for axes, values in drawn.items():
        if np.abs(values).max() > usual:
            largest = values[np.abs(values).argmax()]
            place = {"transform": axes.transAxes, "ha": "right", "va": "top", "zorder": 5}
            axes.text(0.97, 0.97, f"up to {largest:.2g}", fontsize=7, bbox={"color": "white", "pad": 1.5}, **place)


def _legend_above(figure, panels) -> None:
    """One legend for all panels, in as many columns as the figure has room for."""
    handles = {
        label: line for axes, *_ in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    columns = min(len(handles), max(2, int(figure.get_figwidth() / 0.9)))
    figure.set_figheight(figure.get_figheight() + 0.2 * (-(-len(handles) // columns) - 1))
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=columns)


def _tasks(runs) -> list[str]:
    names = {name for run in runs for line in run.log for name in line if name.startswith("weight/")}
    primary = f"weight/{runs[0].about['primary']}"
    return sorted(names, key=lambda name: (name != primary, _natural(name)))


def _natural(name: str) -> list:
    """Sort key that has Class2 before Class10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _weights(groups):
    groups = {method: runs for method, runs in groups.items() if _tasks(runs)}
    if not groups:
        return None
    tasks = list(dict.fromkeys(task for runs in groups.values() for task in _tasks(runs)))
    figure, panels = _panels(list(groups), 2.0, 1.7, sharex=True, sharey=True)
    for (axes, leftmost, lowest), runs in zip(panels, groups.values(), strict=True):
        for place, task in enumerate(tasks):
            # Wide and plain below, narrow and dashed above: equal weights stay visible, both of them.
            look = {**_task_look(place), "linewidth": max(2.6 - 0.8 * place, 1.2)}
            _curves(axes, runs, task, look, label=task.removeprefix("weight/"))
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], integer=True))
        axes.set_xlabel("inner updates" if lowest else None)
        axes.set_ylabel("mean weight" if leftmost else None)
    _cut_outliers([axes for axes, *_ in panels])
    _legend_above(figure, panels)
    return figure


LABELS = {
    "label_usage": "entropy of the batch's\nmean label (nats)",
    "label_entropy": "mean entropy\nof one label (nats)",
}


def _labels(groups):
    """How the generated labels are used: at 0 above, all examples of a batch have one; at 0 below, they are hard."""
    found = {
        method: runs for method, runs in groups.items() if any("label_usage" in line for r in runs for line in r.log)
    }
    if not found:
        return None
    figure, rows = plt.subplots(len(LABELS), 1, figsize=(6.2, 4.2), sharex=True, layout="constrained")
    for axes, (name, label) in zip(rows, LABELS.items(), strict=True):
        for method, runs in found.items():
            _curves(axes, runs, name, look_of(list(groups).index(method)), label=method)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    rows[-1].set_xlabel("inner updates")
    rows[-1].xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    handles, names = rows[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", title="mean and range\nover seeds", alignment="left")
    return figure


def _filter(groups):
    found = {}
    for method, runs in groups.items():
        ends = [run.log[-1] for run in runs if run.log]
        tasks = {name.removeprefix("slope/") for end in ends for name in end if name.startswith("slope/")}
        primary = runs[0].about["primary"]
        tasks = sorted(tasks, key=lambda task: (task != primary, _natural(task)))
        if tasks:
            found[method] = (tasks, ends)
    if not found:
        return None
    figure, panels = _panels(list(found), 2.8, 2.2, sharex=True, sharey=True)
    losses = np.linspace(-3.0, 3.0, 241)
    for (axes, leftmost, lowest), (tasks, ends) in zip(panels, found.values(), strict=True):
        for place, task in enumerate(tasks):
            label = task
            for end in ends:
                if f"slope/{task}" not in end or f"offset/{task}" not in end:
                    continue
                filtered = 0.5 * (1 + np.tanh(0.5 * (end[f"slope/{task}"] * losses + end[f"offset/{task}"])))
                axes.plot(losses, filtered, linewidth=1.3, alpha=0.85, label=label, **_task_look(place))
                label = None
        axes.set_xlabel("standardised loss of an example" if lowest else None)
        axes.set_ylabel("loss filter (a line per seed)" if leftmost else None)
        axes.set_ylim(-0.02, 1.02)
    _legend_above(figure, panels)
    return figure


def _samples(groups):
    found = {}
    for method, runs in _finished(groups).items():
        run = min(runs, key=lambda run: run.about["seed"])
        path = run.directory / "weights.npz"
        if not path.exists() or "corrupted_auroc" not in run.result:
            continue
        with np.load(path) as arrays:
            weights, corrupted = arrays[f"weight/{run.about['primary']}"], arrays["corrupted"]
        if np.isfinite(weights).all() and np.ptp(weights) > 0:  # constant weights tell nothing apart
            title = f"{method}, seed {run.about['seed']}: AUROC {run.result['corrupted_auroc']:.3f}"
            found[title] = (weights, corrupted)
    if not found:
        return None
    figure, panels = _panels(list(found), 2.8, 2.2)
    for (axes, leftmost, lowest), (weights, corrupted) in zip(panels, found.values(), strict=True):
        bins = np.linspace(min(0.0, weights.min()), weights.max(), 31)
        for chosen, colour, label in ((~corrupted, COLOURS[0], "right label"), (corrupted, COLOURS[3], "wrong label")):
            axes.hist(weights[chosen], bins, histtype="stepfilled", color=colour, alpha=0.35)
            axes.hist(weights[chosen], bins, histtype="step", color=colour, label=f"{label} ({chosen.sum()})")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("weight in the primary task" if lowest else None)
        axes.set_ylabel("training examples" if leftmost else None)
        axes.legend(loc="best")
    return figure
