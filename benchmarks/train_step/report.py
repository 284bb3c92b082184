"""The tables and the plot of benchmarks.train_step, made from its rows alone."""

import pathlib

import matplotlib.pyplot as plt
from rich.table import Table

from benchmarks.train_step.cases import FAMILIES, MODELS, REFERENCES
from experiments.reporting import terminal
from experiments.reporting.plots.comparison import COLOURS, LINES, STYLE

MARKERS = "osD^vP*Xh"


def show(result: dict) -> None:
    """Prints the times at every K, the ratios with their intervals, what was left out, and the goal.

    Args:
      result: what `benchmarks.train_step.main` returns.
    """
    rows = result["rows"]
    for kind, tasks in dict.fromkeys((row["model"], row["tasks"]) for row in rows):
        terminal.show(times(kind, tasks, rows))
    for kind in dict.fromkeys(row["model"] for row in rows):
        for name in REFERENCES:
            terminal.show(ratios(kind, name, rows))
    without = {}
    for entry in result["left_out"]:
        without.setdefault((entry["model"], entry["tasks"], entry["reason"]), []).append(entry["row"])
    for (kind, tasks, reason), labels in without.items():
        terminal.line(f"Left out: {'; '.join(labels)}, {MODELS[kind]}, K = {tasks}: {reason}.")
    for entry in result["growth"]:
        terminal.line(
            f"{entry['row']}, {MODELS[entry['model']]}: from K = {entry['from']} to {entry['to']} the ratio to 'equal' "
            f"changes by a factor of {entry['growth']:.2f}; goal of at most {result['goal']}: "
            f"{'met' if entry['met'] else 'missed'}."
        )


def times(kind: str, tasks: int, rows: list[dict]) -> Table:
    """Times and programs of all methods at one K."""
    table = Table(
        title=f"{MODELS[kind]}, K = {tasks}: medians in ms",
        caption="per update: inner + its share of outer. kernels: started by inner + outer.\n"
        "MiB: the larger of their temporary memories. compile s: both.",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("method", no_wrap=True)
    for heading in ("inner", "outer", "per\nupdate", "kernels", "MiB", "compiled\nin s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if (row["model"], row["tasks"]) == (kind, tasks):
            programs = row["programs"].values()
            memory = max(program["temporary_bytes"] or 0 for program in programs) / 2**20
            table.add_row(
                row["row"].replace(", ", "\n  "),
                *(f"{row[name]['median']:.2f}" if row[name] else "-" for name in ("inner_ms", "outer_ms", "update_ms")),
                "+".join(str(program["kernels"]) for program in programs),
                f"{memory:.1f}",
                f"{row['compile_s']:.1f}",
            )
    return table


def ratios(kind: str, reference: str, rows: list[dict]) -> Table:
    """Time per inner update over that of a reference, by K."""
    table = Table(
        title=f"{MODELS[kind]}: time per inner update over that of '{reference}', median and its 95 % interval",
        title_justify="left",
    )
    table.add_column("method", no_wrap=True)
    tasks = sorted({row["tasks"] for row in rows if row["model"] == kind})
    for count in tasks:
        table.add_column(f"K = {count}", justify="right")
    found = {(row["row"], row["tasks"]): row[f"to_{reference}"] for row in rows if row["model"] == kind}
    for label in dict.fromkeys(label for label, _ in found):
        cells = [ratio_text(found.get((label, count))) for count in tasks]
        table.add_row(label.replace(", ", "\n  "), *cells)
    return table


def write_markdown(rows: list[dict], path: pathlib.Path) -> None:
    """Ratios and numbers of kernels by K, as tables for a page.

    Args:
      rows: the benchmark's.
      path: of the file.
    """
    lines = []
    for kind in [kind for kind in MODELS if any(row["model"] == kind for row in rows)]:
        same = {(row["row"], row["tasks"]): row for row in rows if row["model"] == kind}
        labels, tasks = list(dict.fromkeys(label for label, _ in same)), sorted({count for _, count in same})
        for name in ("to_equal", "to_stl", "inner_to_equal", "outer_to_equal", "programs"):
            lines += [f"{MODELS[kind]}, {name}", ""]
            lines += [
                "| method | " + " | ".join(f"K = {count}" for count in tasks) + " |",
                "|---|" + "---|" * len(tasks),
            ]
            for label in labels:
                cells = [_cell(same.get((label, count)), name) for count in tasks]
                lines.append(f"| {label} | " + " | ".join(cells) + " |")
            lines.append("")
    path.write_text("\n".join(lines), encoding="utf-8")


def _cell(row: dict | None, name: str) -> str:
    """One entry of a table of `write_markdown`."""
    if row is None:
        return "left out"
    if row[name] is None:
        return "-"
    if name == "programs":
        return " + ".join(str(program["kernels"]) for program in row[name].values())
    return ratio_text(row[name]).replace("\n", " (") + ")"


def ratio_text(ratio: dict | None) -> str:
    """Median, and below it the interval, or the number of turns where they are too few for one."""
    if ratio is None:
        return "left out"
    below = f"{ratio['turns']} turns" if ratio["low"] is None else f"{ratio['low']:.2f}-{ratio['high']:.2f}"
    return f"{ratio['median']:.2f}\n{below}"


def draw(rows: list[dict], path: pathlib.Path) -> None:
    """The ratio to "equal" over K: a row of panels per model, a column per family of methods.

    Args:
      rows: the benchmark's.
      path: of the PNG file.
    """
    kinds = [kind for kind in MODELS if any(row["model"] == kind for row in rows)]
    families = [family for family in FAMILIES if any(row["family"] == family for row in rows)]
    ticks = sorted({row["tasks"] for row in rows})
    size = (0.8 + 2.7 * len(families), 1.6 + 2.4 * len(kinds))
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(kinds), len(families), figsize=size, squeeze=False, sharex=True, sharey="row", layout="constrained"
        )
        for column, family in enumerate(families):
            labels = list(dict.fromkeys(row["row"] for row in rows if row["family"] == family))
            for line, kind in enumerate(kinds):
                axes = grid[line][column]
                _panel(axes, [row for row in rows if row["model"] == kind], labels, ticks)
                axes.set_title(f"{MODELS[kind]}: {family}")
            grid[-1][column].set_xlabel("auxiliary tasks K")
            grid[-1][column].legend(loc="upper left", bbox_to_anchor=(0.0, -0.26), handlelength=2.8)
        for axes in grid[:, 0]:
            axes.set_ylabel("time per update,\njoint gradient = 1")
        figure.savefig(path, bbox_inches="tight")
        plt.close(figure)


def _panel(axes, rows: list[dict], labels: list[str], ticks: list[int]) -> None:
    """A line per method, with its intervals."""
    for place, label in enumerate(labels):
        same = [row for row in rows if row["row"] == label]
        look = {"color": COLOURS[place % 7], "linestyle": LINES[place // 7], "marker": MARKERS[place % len(MARKERS)]}
        tasks, middle = [row["tasks"] for row in same], [row["to_equal"]["median"] for row in same]
        axes.plot(tasks, middle, markersize=4.5, linewidth=1.3, label=label, **look)
        low, high = (
            [row["to_equal"][end] or m for row, m in zip(same, middle, strict=True)] for end in ("low", "high")
        )
        axes.fill_between(tasks, low, high, color=look["color"], alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
