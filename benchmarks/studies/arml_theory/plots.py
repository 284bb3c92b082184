"""The plots of benchmarks.studies.arml_theory, from its results alone.

    theory_<setting>.png   weights in closed form: distance to the ideal ones and excess KL against n_0, a column per d
    arml_<setting>.png     the same for ARML as it ran, beside its fixed point in closed form
    noise.png              gradient noise over injected noise in one step; how far either noise moves the weights

Lines are means over seeds; bands are 95 % intervals, of ARML's fixed points and of the ratio of noises.
"""

import pathlib

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter

from experiments.reporting.plots.comparison import COLOURS, STYLE

BLUE, ORANGE, GREEN, RED, PINK, SKY, BLACK, _ = COLOURS
GREY = "#777777"
# Label, colour, line, marker.
THEORY = {
    "equal": ("equal weights", GREY, (0, (4, 2)), None),
    "A7, full": ("A7, posterior moves", PINK, "-", "v"),
    "A7": ("A7, posterior held", ORANGE, "-", "^"),
    "Fisher, full": ("Fisher, posterior moves", SKY, "-", "D"),
    "Fisher": ("Fisher, posterior held", BLUE, "-", "o"),
    "Fisher, mode": ("Fisher at the mode", BLACK, (0, (1, 1.2)), None),
}
RUNS = {
    "equal": ("equal weights", GREY, (0, (4, 2)), None),
    "Fisher": ("closed form, posterior", BLUE, "-", None),
    "Fisher, batch": ("closed form, mini-batches", RED, "-", None),
    "langevin": ("ARML, Langevin noise", SKY, "none", "o"),
    "no noise": ("ARML, no noise", BLACK, "none", "x"),
    "batches": ("ARML, mini-batches", ORANGE, "none", "s"),
    "both": ("ARML, mini-batches and noise", GREEN, "none", "^"),
}
SHIFTS = {"o": -0.3, "x": -0.1, "s": 0.1, "^": 0.3}  # in powers of 2, where there are only markers
BANDS = ("Fisher", "Fisher, batch")
MOVES = {
    "injected, closed form": ("injected (closed form)", SKY, "-", None),
    "injected": ("injected, full batches", BLUE, "-", "o"),
    "injected beside gradient": ("injected, mini-batches", GREEN, "-", "^"),
    "gradient": ("gradient noise", ORANGE, "-", "s"),
}
SETTINGS = {
    "alike": ("alike", BLUE, "-", "o"),
    "unequal": ("unequal", RED, "-", "s"),
    "mean": ("mean losses", GREEN, "-", "^"),
}
LEAST = 0.03  # nats; smaller values are drawn there


def draw_all(result: dict, directory: pathlib.Path) -> list[pathlib.Path]:
    """Draws everything; returns the files written.

    Args:
      result: what arml_theory.json holds.
      directory: where the files go.
    """
    summary, figures = result["summary"], {}
    with plt.rc_context(STYLE):
        for setting in dict.fromkeys(record["setting"] for record in summary):
            chosen = [record for record in summary if record["setting"] == setting]
            figures[f"theory_{setting}"] = _weights(chosen, THEORY)
            figures[f"arml_{setting}"] = _weights(chosen, RUNS)
        figures["noise"] = _noise(summary)
        written = []
        for name, figure in figures.items():
            written.append(directory / f"{name}.png")
            figure.savefig(written[-1], bbox_inches="tight")
            plt.close(figure)
    return written


def _grid(summary: list[dict], labels: tuple[str, str]):
    """Two rows of panels, one column per dimension, over the number of primary examples."""
    dims = sorted({record["dim"] for record in summary})
    size = (0.8 + 1.75 * max(len(dims), 2), 4.6)
    figure, grid = plt.subplots(
        2, len(dims), figsize=size, squeeze=False, sharex=True, sharey="row", layout="constrained"
    )
    numbers = sorted({record["primary"] for record in summary})
    for row, label in zip(grid, labels, strict=True):
        row[0].set_ylabel(label)
    for column, dim in enumerate(dims):
        grid[0][column].set_title(f"d = {dim}")
        axes = grid[1][column]
        axes.set_xscale("log", base=2)
        axes.set_xticks(numbers, [str(n) for n in numbers], fontsize=7.5)
        axes.minorticks_off()
        axes.set_xlabel("primary examples $n_0$")
    return figure, grid, dims


def _draw(axes, records: list[dict], value, look, band: bool) -> None:
    """One kind of entry over n_0; `value` takes the entry, mean and half width, from a record."""
    label, colour, line, marker = look
    records = sorted(records, key=lambda record: record["primary"])
    x = np.array([record["primary"] for record in records])
    mean = np.array([value(record)["mean"] for record in records])
    style = {"color": colour, "linestyle": line, "marker": marker, "markersize": 4, "linewidth": 1.3}
    filled = {"markerfacecolor": "white"} if line == "none" and marker != "x" else {}
    if line == "none":
        x = x * 2.0 ** SHIFTS[marker]
    axes.plot(x, np.maximum(mean, LEAST) if axes.get_yscale() == "log" else mean, label=label, **style, **filled)
    if band and line != "none":
        half = np.array([value(record)["half_width"] or 0.0 for record in records])
        axes.fill_between(x, np.maximum(mean - half, 0.0), mean + half, color=colour, alpha=0.12, linewidth=0)


def _legend(figure, axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, columnspacing=1.3, handletextpad=0.5)


def _weights(summary: list[dict], kinds: dict):
    labels = ("$|w - w_\\mathrm{ideal}|_1 / K$", "excess KL (nats)")
    figure, grid, dims = _grid(summary, labels)
    for column, dim in enumerate(dims):
        same = [record for record in summary if record["dim"] == dim]
        grid[1][column].set_yscale("log")
        for kind, look in kinds.items():
            _draw(grid[0][column], same, lambda record, kind=kind: record["distance"][kind], look, kind in BANDS)
            _draw(grid[1][column], same, lambda record, kind=kind: record["excess"][kind], look, False)
    grid[0][0].set_ylim(0, 2.05)
    low, high = np.log10(grid[1][0].get_ylim())
    grid[1][0].set_ylim(10 ** np.floor(low + 0.1), 10 ** np.ceil(high))
    for axes in grid[1]:
        axes.yaxis.set_minor_formatter(NullFormatter())
    _legend(figure, grid[0][0], 3 if len(dims) > 2 else 2)
    return figure


def _noise(summary: list[dict]):
    figure, grid, dims = _grid(summary, ("gradient / injected noise", "$|w - w'|_1 / K$ (alike)"))
    for column, dim in enumerate(dims):
        same = [record for record in summary if record["dim"] == dim]
        for setting, look in SETTINGS.items():
            chosen = [record for record in same if record["setting"] == setting]
            if chosen:
                _draw(grid[0][column], chosen, lambda record: record["noise_ratio"], look, True)
        chosen = [record for record in same if record["setting"] == "alike"]
        for kind, look in MOVES.items() if chosen else ():
            _draw(grid[1][column], chosen, lambda record, kind=kind: record["moved"][kind], look, False)
    for row in grid:
        row[0].set_ylim(bottom=0)
    handles = [axes.get_legend_handles_labels() for axes in (grid[0][0], grid[1][0])]
    for (lines, names), where in zip(handles, ("outside upper center", "outside lower center"), strict=True):
        if lines:
            figure.legend(lines, names, loc=where, ncols=4, columnspacing=1.3, handletextpad=0.5)
    return figure
