"""The tables and the plots of benchmarks.scaling, made from its numbers and the model alone."""

import math
import pathlib
import textwrap

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from rich.table import Table

from benchmarks.scaling import model
from benchmarks.scaling.cases import GROUPS
from experiments.reporting import terminal
from experiments.reporting.plots.comparison import COLOURS, LINES, STYLE

MARKERS = "osD^vP*Xh"
LEVELS = ("inner", "outer")
KNOWN = ("explicit", "sharded")
PARTS = {"work": "#0072B2", "bytes": "#E69F00", "latency": "#999999"}
NAMES = {"work": "work", "bytes": "bytes of collectives", "latency": "latency of collectives"}
BARS = ("resnet", ("v5p", "h100"))  # network and chips of steps.png
MODEL_COLUMNS = ("v4", "v5e", "v5p", "h100")


def show(result: dict) -> None:
    """Prints what was measured, and the model's results for every network.

    Args:
      result: what scaling.json holds.
    """
    for title, headings, rows in (
        measured(result["rows"]),
        *(modelled(result["rows"], name) for name in model.NETWORKS),
    ):
        table = Table(title=title, title_justify="left")
        for place, heading in enumerate(headings):
            table.add_column(heading, justify="right" if place else "left", no_wrap=place == 0)
        for row in rows:
            table.add_row(*row)
        terminal.show(table)


def write(result: dict, directory: pathlib.Path) -> list[pathlib.Path]:
    """Writes the tables in Markdown and the plots; returns the files, scaling.json first."""
    rows, lines = result["rows"], []
    for title, headings, cells in (measured(rows), *(modelled(rows, name) for name in model.NETWORKS)):
        lines += [f"## {title}", "", "| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in cells] + [""]
    path = directory / "scaling_tables.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    written = [directory / "scaling.json", path]
    drawings = {
        "strong": lambda: efficiencies(rows, "resnet", ("v5p", "h100"), model.strong_efficiency),
        "weak": lambda: efficiencies(rows, "wrn", ("v5e", "h100"), model.weak_efficiency),
        "steps": lambda: steps(rows),
    }
    with plt.rc_context(STYLE):
        for name, draw in drawings.items():
            figure = draw()
            figure.savefig(directory / f"{name}.png", bbox_inches="tight")
            plt.close(figure)
            written.append(directory / f"{name}.png")
    return written


def measured(rows: list[dict]) -> tuple[str, list[str], list[list[str]]]:
    """Title, headings and rows of the table of what was measured."""
    headings = ["method"]
    for level in LEVELS:
        headings += [f"{level}: explicit", f"{level}: compiled", "in a row", "work"]
    cells = []
    for row in rows:
        line = [row["row"]]
        for level in LEVELS:
            if level not in row:
                line += ["-"] * 4
                continue
            found = row[level]
            text = volume(row, found["explicit"], found["sharded"]) if "explicit" in found else "-"
            depths = [
                linear(row, found[name]["depth"], found[name]["depth_per_unit"], "") for name in KNOWN if name in found
            ]
            work = linear(row, max(found["work"], 0.0), found["work_per_unit"], "")
            line += [text, volume(row, found["sharded"], found["sharded"]), "; ".join(dict.fromkeys(depths)), work]
        cells.append(line)
    title = "Measured: bytes on a device, by explicit reductions and as compiled; collectives in a row; work over stl's"
    return title, headings, cells


def volume(row: dict, traffic: dict, whole: dict) -> str:
    """Bytes as a formula: `(3 + n) P + M`, and what grows with the batch in bytes per example."""
    kinds = traffic["bytes"].values()
    a, unit = (sum(one[name] for one in kinds) for name in ("params", "params_per_unit"))
    m, s = (sum(one[name] for one in whole["bytes"].values()) for name in ("meta", "examples"))
    terms = [linear(row, a, unit, " P")] if round(a, 2) or round(unit, 2) else []
    terms += [f"{'' if round(m, 2) == 1 else f'{m:.3g} '}M"] if round(m, 2) else []
    terms += [f"{s:.3g} B"] if round(s, 2) else []
    return " + ".join(terms) or "scalars"


def linear(row: dict, at_value: float, per_unit: float, what: str) -> str:
    """A number that is linear in the row's own: `(3 + n) P`."""

    def short(number):
        return f"{number:.2f}".rstrip("0").rstrip(".")

    if not round(per_unit, 2):
        number = short(at_value)
        return f"{'' if number == '1' and what else number}{what}".strip()
    constant, factor = short(at_value - row["value"] * per_unit), short(per_unit)
    text = f"{'' if factor == '1' else f'{factor} '}n"
    text = text if constant in ("0", "-0") else f"{constant} + {text}"
    return f"({text}){what}" if what and " " in text else f"{text}{what}"


def modelled(rows: list[dict], name: str) -> tuple[str, list[str], list[list[str]]]:
    """Title, headings and rows of the model's table for one network."""
    network, last = model.NETWORKS[name], model.CHIPS[-1]
    hardware = [model.HARDWARE[key] for key in MODEL_COLUMNS]
    headings = ["method", "step / stl"]
    headings += [f"{one.label}: chips to 50 %" for one in hardware]
    headings += [f"{one.label}: least batch" for one in hardware]
    reference = next(row for row in rows if row["row"] == "stl")
    alone = model.step_time(reference, network, hardware[0], 1.0, 1).total()
    cells = []
    for row in rows:
        line = [row["row"], f"{model.step_time(row, network, hardware[0], 1.0, 1).total() / alone:.2f}"]
        line += [f"{model.most_chips(row, network, one):,}" for one in hardware]
        batches = [model.least_batch(row, network, one) for one in hardware]
        cells.append([*line, *("none" if math.isinf(batch) else f"{batch:.2g}" for batch in batches)])
    title = (
        f"Model, {network.label}: work of a step on one chip over that of stl; chips up to which {network.whole:,} "
        f"examples on all keep an efficiency of 50 %; examples per chip with which {last:,} chips have it"
    )
    return title, headings, cells


def efficiencies(rows: list[dict], name: str, keys: tuple[str, ...], efficiency):
    """Efficiency over the number of chips: a row of panels per hardware, a column per group of methods."""
    network = model.NETWORKS[name]
    groups = [group for group in GROUPS if any(row["group"] == group for row in rows)]
    weak = efficiency is model.weak_efficiency
    size = (0.8 + 2.6 * len(groups), 0.6 + 2.3 * len(keys))
    figure, grid = plt.subplots(
        len(keys), len(groups), figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    for column, group in enumerate(groups):
        lines = curves([row for row in rows if row["group"] == group], network, keys, efficiency)
        for place, (labels, found) in enumerate(lines):
            look = {"color": COLOURS[place % 7], "linestyle": LINES[place % 4], "marker": MARKERS[place % len(MARKERS)]}
            for line, key in enumerate(keys):
                text = textwrap.fill(", ".join(label.replace(", ", ": ") for label in labels), 30)
                grid[line][column].plot(model.CHIPS, found[key], markersize=3.5, linewidth=1.3, label=text, **look)
        for line, key in enumerate(keys):
            axes = grid[line][column]
            axes.axhline(50, color="#444444", linewidth=0.8, zorder=1)
            axes.set_title(f"{model.HARDWARE[key].label}: {group}", fontsize=8)
            axes.set_xscale("log", base=2)
            axes.set_xticks([1, 4, 16, 64, 256, 1024], ["1", "4", "16", "64", "256", "1,024"])
            axes.set_ylim(0, 104)
        grid[-1][column].set_xlabel("chips")
        grid[-1][column].legend(loc="upper left", bbox_to_anchor=(-0.06, -0.26), handlelength=2.4, fontsize=7)
    for axes in grid[:, 0]:
        axes.set_ylabel("efficiency, per cent")
    batch = f"{network.per_chip} examples on each chip" if weak else f"{network.whole:,} examples on all chips together"
    figure.suptitle(f"Model: {network.label}, {batch}", fontsize=9)
    return figure


def curves(rows: list[dict], network, keys: tuple[str, ...], efficiency) -> list[tuple[list[str], dict]]:
    """Labels and values, by hardware, of every line. Methods that differ by less than a per cent share one."""
    lines = []
    for row in rows:
        values = {
            key: [100 * efficiency(row, network, model.HARDWARE[key], chips) for chips in model.CHIPS] for key in keys
        }
        same = [labels for labels, other in lines if all(_close(values[key], other[key]) for key in keys)]
        if same:
            same[0].append(row["row"])
        else:
            lines.append(([row["row"]], values))
    return lines


def _close(some: list[float], others: list[float]) -> bool:
    return max(abs(one - other) for one, other in zip(some, others, strict=True)) < 1


def steps(rows: list[dict]):
    """Step times on 1,024 chips under strong scaling, in their parts, a panel per hardware."""
    (name, keys), chips = BARS, model.CHIPS[-1]
    network = model.NETWORKS[name]
    figure, grid = plt.subplots(
        1, len(keys), figsize=(8.6, 1.0 + 0.19 * len(rows)), squeeze=False, sharey=True, layout="constrained"
    )
    for axes, key in zip(grid[0], keys, strict=True):
        hardware = model.HARDWARE[key]
        times = [model.step_time(row, network, hardware, network.whole / chips, chips) for row in rows]
        left = [0.0] * len(rows)
        for part, colour in PARTS.items():
            widths = [1e3 * getattr(time, part) for time in times]
            axes.barh(range(len(rows)), widths, left=left, color=colour, height=0.72, label=NAMES[part])
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set_title(f"{hardware.label}, {chips:,} chips")
        axes.set_xlabel("milliseconds per inner update")
        axes.grid(axis="y", visible=False)
    grid[0][0].set_yticks(range(len(rows)), [row["row"] for row in rows])
    grid[0][0].set_ylim(len(rows) - 0.4, -0.6)
    figure.suptitle(
        f"Model: {network.label}, {network.whole:,} examples on all chips together, an outer update every "
        f"{model.INNER_STEPS} inner ones",
        fontsize=9,
    )
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(PARTS))
    return figure
