"""The plots of the two-parameter regression, from its results alone.

trajectories.png    the params of every run in the plane, a panel per method
weights.png         share of the harmful task and distance to the optimum, a row per method, every seed a dot
"""

import pathlib

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

from experiments.reporting.plots.comparison import COLOURS, STYLE

LOOKS = {"origin": (COLOURS[0], "o"), "harmful": (COLOURS[3], "D")}
GOOD, BAD = (1.0, 1.0), (-1.0, -4.0)
COLUMNS = 5


def draw_all(result: dict, directory: pathlib.Path) -> list[pathlib.Path]:
    """Draws both plots.

    Args:
      result: what two_parameters.json holds.
      directory: where the files go.

    Returns:
      The files written; none if no method was run.
    """
    if not result["rows"]:
        return []
    written = []
    with plt.rc_context(STYLE):
        for name, draw in {"trajectories": _trajectories, "weights": _weights}.items():
            written.append(directory / f"{name}.png")
            figure = draw(result)
            figure.savefig(written[-1], bbox_inches="tight")
            plt.close(figure)
    return written


def _by_method(result):
    found = {}
    for row in result["rows"]:
        found.setdefault(row["method"], []).append(row)
    return found


def _trajectories(result):
    groups = _by_method(result)
    columns = min(COLUMNS, len(groups))
    lines = -(-len(groups) // columns)
    figure, grid = plt.subplots(
        lines,
        columns,
        figsize=(0.5 + 1.4 * columns, 0.6 + 1.65 * lines),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for place, axes in enumerate(grid.flat):
        if place >= len(groups):
            axes.set_visible(False)
            continue
        name, rows = list(groups.items())[place]
        axes.set_title(name)
        for row in rows:
            path, colour = np.array(row["path"]), LOOKS[row["start"]][0]
            axes.plot(*path.T, color=colour, linewidth=0.7, alpha=0.6)
            axes.plot(*path[-1], ".", color=colour, markersize=4, zorder=3)
        axes.plot(*GOOD, "*", color="black", markersize=8, markerfacecolor="none", markeredgewidth=0.8, zorder=4)
        axes.plot(*BAD, "X", color="black", markersize=6, markerfacecolor="none", markeredgewidth=0.8, zorder=4)
        axes.set_xlim(-3.2, 3.2)
        axes.set_ylim(-6.0, 3.0)
        axes.set_xticks([-2, 0, 2])
        axes.set_yticks([-4, -2, 0, 2])
        axes.tick_params(labelbottom=place + columns >= len(groups), labelleft=place % columns == 0)
    figure.supxlabel("$w_1$", fontsize=9)
    figure.supylabel("$w_2$", fontsize=9)
    handles = [Line2D([], [], color=LOOKS[start][0], marker=".", label=f"from near {_place(start)}") for start in LOOKS]
    outline = {"color": "black", "markerfacecolor": "none", "linestyle": ""}
    handles += [Line2D([], [], marker="*", markersize=8, label="primary and helpful optimum", **outline)]
    handles += [Line2D([], [], marker="X", markersize=6, label="harmful optimum", **outline)]
    figure.legend(handles=handles, loc="outside upper center", ncols=2 if columns < 4 else 4, columnspacing=1.2)
    return figure


def _place(start):
    return {"origin": "0", "harmful": "the harmful optimum"}[start]


def _weights(result):
    groups = _by_method(result)
    summary = {(entry["method"], entry["start"]): entry for entry in result["summary"]}
    starts = result["settings"]["starts"]
    figure, panels = plt.subplots(
        1, 2, figsize=(6.6, 1.1 + 0.27 * len(groups)), sharey=True, squeeze=True, layout="constrained"
    )
    shifts = np.linspace(-0.18, 0.18, len(starts)) if len(starts) > 1 else [0.0]
    for axes, key in zip(panels, ("share", "distance"), strict=True):
        for line, (name, rows) in enumerate(groups.items()):
            for start, shift in zip(starts, shifts, strict=True):
                entry, (colour, marker) = summary[name, start][key], LOOKS[start]
                if entry["mean"] is None:
                    continue
                values = [row[key] for row in rows if row["start"] == start and row[key] is not None]
                axes.scatter(values, np.full(len(values), line + shift), s=5, color=colour, alpha=0.4, linewidths=0)
                look = {"fmt": marker, "color": colour, "markersize": 3.5, "capsize": 2, "linewidth": 1.0}
                axes.errorbar(entry["mean"], line + shift, xerr=entry["half_width"], zorder=3, **look)
    left, right = panels
    left.set_yticks(range(len(groups)), list(groups))
    left.set_ylim(len(groups) - 0.4, -0.6)
    left.axvline(0.1, color="0.3", linewidth=0.8, linestyle=(0, (3, 2)))
    left.set_xlim(-0.05, 1.05)
    left.set_xlabel("harmful share of the auxiliary weights")
    right.set_xscale("log")
    right.set_xlabel("distance of the params to (1, 1)")
    for axes in panels:
        axes.tick_params(axis="y", length=0)
    handles = [
        Line2D([], [], color=LOOKS[start][0], marker=LOOKS[start][1], markersize=4, label=f"from near {_place(start)}")
        for start in starts
    ]
    handles += [Line2D([], [], color="0.3", linewidth=0.8, linestyle=(0, (3, 2)), label="share of 10 %")]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure
