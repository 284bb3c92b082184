"""The plots of a comparison, made from the files of its runs.

accuracy.png   test accuracy by method, every seed a dot, mean and 95 % interval
training.png   validation accuracy over training
weights.png    mean weight of every task over training, a panel per method
filter.png     the loss filter a method has learned, sigmoid(slope z + offset) (JTDS)
samples.png    histogram of the weights of the training examples, clean against corrupted
"""

import pathlib

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from experiments.statistics import mean_and_interval

# Okabe and Ito's colours: told apart by colour-blind readers and in grey print.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
STYLE = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def draw_all(groups: dict[str, list], directory: pathlib.Path) -> list[pathlib.Path]:
    """Draws every plot the runs have data for.

    Args:
      groups: `{method: runs}`, see `report.by_method`.
      directory: where the files go.

    Returns:
      The files written.
    """
    colours = {method: COLOURS[index % len(COLOURS)] for index, method in enumerate(groups)}
    written = []
    with plt.rc_context(STYLE):
        for name, draw in (
            ("accuracy", _accuracy),
            ("training", _training),
            ("weights", _weights),
            ("filter", _filter),
            ("samples", _samples),
        ):
            figure = draw(groups, colours)
            if figure is not None:
                path = directory / f"{name}.png"
                figure.savefig(path, bbox_inches="tight")
                plt.close(figure)
                written.append(path)
    return written


def _finished(groups):
    found = {method: [run for run in runs if run.result is not None] for method, runs in groups.items()}
    return {method: runs for method, runs in found.items() if runs}


def _accuracy(groups, colours):
    groups = _finished(groups)
    if not groups:
        return None
    figure, axes = plt.subplots(figsize=(1.2 + 0.9 * len(groups), 3.0))
    kinds = (("test_accuracy", "o", -0.13, "last step"), ("selected_test_accuracy", "D", 0.13, "best validation step"))
    for place, (method, runs) in enumerate(groups.items()):
        for name, marker, shift, _ in kinds:
            values = 100 * np.array([run.result[name] for run in runs])
            mean, half = mean_and_interval(values)
            filled = colours[method] if marker == "o" else "white"
            axes.errorbar(
                place + shift,
                mean,
                yerr=None if np.isnan(half) else half,
                fmt=marker,
                markersize=5,
                color=colours[method],
                markerfacecolor=filled,
                capsize=3,
                linewidth=1.2,
                zorder=3,
            )
            axes.scatter(
                np.full(values.size, place + shift + 0.1), values, s=6, color=colours[method], alpha=0.5, linewidths=0
            )
    for _, marker, _, label in kinds:
        axes.plot([], [], marker, color="0.3", markerfacecolor="0.3" if marker == "o" else "white", label=label)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("test accuracy (%)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, handletextpad=0.2)
    return figure


def _curves(axes, runs, name, colour, scale=1.0, **options):
    """Mean over the runs and their range, over the steps that all of them have logged."""
    logs = [{line["step"]: line[name] for line in run.log if name in line} for run in runs]
    steps = sorted(set.intersection(*map(set, logs))) if logs else []
    if not steps:
        return False
    values = scale * np.array([[log[step] for step in steps] for log in logs])
    axes.plot(steps, values.mean(0), color=colour, linewidth=1.4, **options)
    axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    return True


def _training(groups, colours):
    figure, axes = plt.subplots(figsize=(4.5, 3.0))
    drawn = [
        _curves(axes, runs, "validation_accuracy", colours[method], 100.0, label=method)
        for method, runs in groups.items()
    ]
    if not any(drawn):
        plt.close(figure)
        return None
    axes.set_xlabel("inner updates")
    axes.set_ylabel("validation accuracy (%)")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), title="mean, range over seeds", title_fontsize=8)
    return figure


def _tasks(runs) -> list[str]:
    names = {name for run in runs for line in run.log for name in line if name.startswith("weight/")}
    return sorted(names)


def _weights(groups, colours):
    del colours
    groups = {method: runs for method, runs in groups.items() if _tasks(runs)}
    if not groups:
        return None
    tasks = sorted({task for runs in groups.values() for task in _tasks(runs)})
    figure, panels = plt.subplots(1, len(groups), figsize=(1.0 + 2.1 * len(groups), 2.6), sharex=True, squeeze=False)
    for axes, (method, runs) in zip(panels[0], groups.items(), strict=True):
        for index, task in enumerate(tasks):
            _curves(axes, runs, task, COLOURS[index % len(COLOURS)], label=task.removeprefix("weight/"))
        axes.set_title(method, fontsize=9)
        axes.set_xlabel("inner updates")
        axes.set_ylim(bottom=0)
    panels[0][0].set_ylabel("mean weight over the batch")
    panels[0][-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), title="task")
    figure.tight_layout()
    return figure


def _filter(groups, colours):
    del colours
    for method, runs in groups.items():
        slopes = sorted({name for run in runs for line in run.log[-1:] for name in line if name.startswith("slope/")})
        if not slopes:
            continue
        figure, axes = plt.subplots(figsize=(3.6, 2.8))
        losses = np.linspace(-2.5, 2.5, 201)
        for index, slope in enumerate(slopes):
            task = slope.removeprefix("slope/")
            for number, run in enumerate(runs):
                last = run.log[-1]
                curve = 1 / (1 + np.exp(-(last[slope] * losses + last[f"offset/{task}"])))
                axes.plot(
                    losses,
                    curve,
                    color=COLOURS[index % len(COLOURS)],
                    linewidth=1.3,
                    alpha=0.8,
                    label=task if number == 0 else None,
                )
        axes.set_xlabel("standardised loss of an example")
        axes.set_ylabel("loss filter")
        axes.set_ylim(-0.02, 1.02)
        axes.set_title(f"{method}: which losses are believed (a line per seed)", fontsize=9)
        axes.legend(title="task")
        return figure
    return None


def _samples(groups, colours):
    del colours
    found = {}
    for method, runs in _finished(groups).items():
        path = runs[0].directory / "weights.npz"
        if not path.exists() or "corrupted_auroc" not in runs[0].result:
            continue
        with np.load(path) as arrays:
            weights = arrays[f"weight/{runs[0].about['primary']}"]
            if np.ptp(weights) > 0:  # constant weights tell nothing apart
                found[method] = (weights, arrays["corrupted"], runs[0])
    if not found:
        return None
    figure, panels = plt.subplots(1, len(found), figsize=(3.8 * len(found), 2.8), squeeze=False)
    for axes, (method, (weights, corrupted, run)) in zip(panels[0], found.items(), strict=True):
        bins = np.linspace(0, weights.max(), 31)
        axes.hist(weights[~corrupted], bins, color=COLOURS[0], alpha=0.7, label=f"clean ({(~corrupted).sum()})")
        axes.hist(weights[corrupted], bins, color=COLOURS[3], alpha=0.7, label=f"corrupted ({corrupted.sum()})")
        axes.set_title(f"{method}, seed {run.about['seed']}: AUROC {run.result['corrupted_auroc']:.3f}", fontsize=9)
        axes.set_xlabel("weight of the example in the primary task")
        axes.set_ylabel("training examples")
        axes.legend()
    figure.tight_layout()
    return figure
