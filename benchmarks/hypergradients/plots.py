"""The plots of the hypergradient benchmark, from its results alone; every one as PNG and as SVG.

    pareto_<problem>      error against time: colour and marker are the library, thin lines join the settings of one
                          method, the dark line is the front that nothing beats in both, with its points named
    products_<problem>    error against the number of Hessian-vector products; lines are auxjax's, points its peers'
    <sequence>            time added up over the outer steps, the best method of each peer and auxjax's five fastest
    unrolled_memory       memory of intermediate values against the number of unrolled steps

A plot for which there are no numbers is left out, and one from an earlier call is deleted.
"""

import pathlib

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from experiments.reporting.plots.comparison import STYLE as SHARED_STYLE

# Okabe and Ito's colours, black for auxjax; markers tell the libraries apart in print.
LOOKS = {
    "auxjax": ("#000000", "o"),
    "jaxopt": ("#0072B2", "s"),
    "lineax": ("#56B4E9", "D"),
    "optimistix": ("#009E73", "P"),
    "torchopt": ("#D55E00", "^"),
    "betty": ("#E69F00", "v"),
    "hypertorch": ("#CC79A7", "<"),
    "hypergrad": ("#999999", "X"),
    "higher": ("#882255", ">"),
}
OWN = 5  # so many of auxjax's methods in the plot of a sequence
SPARE = (("#44AA99", "p"), ("#AA4499", "h"), ("#332288", "d"))
WIDTH, FLOOR = 5.4, 1e-8  # inches; smaller errors are drawn there
# Where a name may stand by its point: horizontal and vertical offset, and the side of the name that is there.
PLACES = ((5, 3, "left"), (5, -8, "left"), (-5, -8, "right"), (-5, 3, "right"), (5, 11, "left"), (-5, -16, "right"))
STYLE = {**SHARED_STYLE, "svg.hashsalt": "auxjax"}


def draw_all(result: dict, directory: pathlib.Path) -> list[pathlib.Path]:
    """Draws everything that the results have numbers for.

    Args:
      result: what hypergradients.json holds.
      directory: where the files go.

    Returns:
      The files written.
    """
    drawings = {}
    for name, record in result["problems"].items():
        slug = name.replace(".", "")
        drawings[f"pareto_{slug}"] = lambda record=record, name=name: _pareto(name, record)
        drawings[f"products_{slug}"] = lambda record=record, name=name: _products(name, record)
    for name, record in result["sequences"].items():
        drawings[name.replace("-", "_")] = lambda record=record, name=name: _sequence(name, record)
    drawings["unrolled_memory"] = lambda: _memory(result.get("memory", {}))
    written = []
    with plt.rc_context(STYLE):
        for name, draw in drawings.items():
            figure = draw()
            for kind in ("png", "svg"):
                path = directory / f"{name.replace('-', '_')}.{kind}"
                if figure is None:
                    path.unlink(missing_ok=True)
                    continue
                figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if kind == "svg" else None)
                written.append(path)
            plt.close("all")
    return written


def _look(library: str) -> tuple[str, str]:
    """Colour and marker of a library."""
    return LOOKS.get(library) or SPARE[sum(map(ord, library)) % len(SPARE)]


def _measured(record: dict, x: str) -> list[dict]:
    """Entries with an error and a positive `x`."""
    return [entry for entry in record["entries"] if entry.get("error") is not None and (entry.get(x) or 0) > 0]


def _error(entry: dict) -> float:
    return max(entry["error"], FLOOR)


def pareto_front(entries: list[dict], x: str) -> list[dict]:
    """Entries that no other beats in both `x` and error, by `x`."""
    front, best = [], float("inf")
    for entry in sorted(entries, key=lambda entry: (entry[x], _error(entry))):
        if _error(entry) < best:
            front.append(entry)
            best = _error(entry)
    return front


def _pareto(name: str, record: dict):
    """Error against time."""
    entries = _measured(record, "median_s")
    if not entries:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 3.8), layout="constrained")
    _families(axes, entries, "median_s", 1e3)
    front = pareto_front(entries, "median_s")
    xs = [1e3 * entry["median_s"] for entry in front]
    ys = [_error(entry) for entry in front]
    axes.step(xs, ys, where="post", color="#444444", linewidth=1.0, alpha=0.6, zorder=1.5)
    _scales(axes, entries, "median_s", 1e3)
    _name_points(axes, front, _places(entries, "median_s", 1e3), "median_s", 1e3)
    axes.set_xlabel("milliseconds, median (bars: 95 % interval)")
    _finish(axes, name, record, entries)
    return figure


def _families(axes, entries: list[dict], x: str, unit: float) -> None:
    """All points, the settings of one method joined, auxjax on top."""
    order = sorted(dict.fromkeys(entry["library"] for entry in entries), key=lambda library: library == "auxjax")
    for library in order:
        colour, marker = _look(library)
        mine = [entry for entry in entries if entry["library"] == library]
        for method in dict.fromkeys((entry["method"], entry["setting"]) for entry in mine):
            points = [entry for entry in mine if (entry["method"], entry["setting"]) == method]
            points.sort(
                key=lambda entry: (entry["value"] is None, -entry["value"] if method[1] == "tol" else entry["value"])
            )
            xs, ys = [unit * entry[x] for entry in points], [_error(entry) for entry in points]
            axes.plot(xs, ys, color=colour, linewidth=0.6, alpha=0.25, zorder=2)
            if x == "median_s":
                bars = [[unit * (e[x] - e["low_s"]) for e in points], [unit * (e["high_s"] - e[x]) for e in points]]
                axes.errorbar(xs, ys, xerr=bars, fmt="none", ecolor=colour, elinewidth=0.7, alpha=0.5, zorder=2)
            size = 20 if library == "auxjax" else 24
            axes.scatter(xs, ys, s=size, color=colour, marker=marker, linewidths=0.4, edgecolors="white", zorder=3)


def _scales(axes, entries: list[dict], x: str, unit: float) -> None:
    """Logarithmic axes with some air, and plain numbers below."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    xs = np.array([unit * entry[x] for entry in entries])
    ys = np.array([_error(entry) for entry in entries])
    axes.set_xlim(xs.min() / 1.35, xs.max() * 1.6)
    span = max(np.log10(ys.max() / ys.min()), 1.0)
    axes.set_ylim(ys.min() / 10 ** (0.08 * span), ys.max() * 10 ** (0.06 * span))
    low = "" if min(entry["error"] for entry in entries) > FLOOR else f" (below {FLOOR:.0e}: on the line)"
    axes.set_ylabel(f"relative error{low}")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if np.log10(axes.get_xlim()[1] / axes.get_xlim()[0]) < 2:
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _name_points(axes, entries: list[dict], others: list[tuple], x: str, unit: float) -> None:
    """Names of points next to them, where that covers no other name and no other point; else none: tables have them."""
    axes.figure.canvas.draw()
    renderer = axes.figure.canvas.get_renderer()
    taken = [Bbox.from_bounds(*(axes.transData.transform(place) - 4), 8, 8) for place in others]
    frame = axes.get_window_extent(renderer)
    for entry in entries:
        for dx, dy, side in PLACES:
            text = axes.annotate(
                entry["label"],
                (unit * entry[x], _error(entry)),
                (dx, dy),
                textcoords="offset points",
                ha=side,
                fontsize=6.5,
                color=_look(entry["library"])[0],
                zorder=4,
            )
            box = text.get_window_extent(renderer)
            inside = box.x0 >= frame.x0 and box.x1 <= frame.x1 and box.y0 >= frame.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def _places(entries: list[dict], x: str, unit: float) -> list[tuple]:
    """Where the points are."""
    return [(unit * entry[x], _error(entry)) for entry in entries]


def _finish(axes, name: str, record: dict, entries: list[dict]) -> None:
    """Title with the size of the problem, legend of the libraries beside the axes."""
    facts = record.get("facts")
    size = f": {facts['num_params']:,} params, {facts['num_meta']:,} outer variables" if facts else ""
    axes.set_title(f"{name}{size}" + (f", condition {_short(facts['condition'])}" if facts else ""), loc="left")
    known = [*LOOKS, *sorted({entry["library"] for entry in entries} - set(LOOKS))]
    for library in sorted({entry["library"] for entry in entries}, key=known.index):
        colour, marker = _look(library)
        axes.scatter([], [], s=24, color=colour, marker=marker, label=library)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), handletextpad=0.3)


def _short(number: float) -> str:
    """A positive number in two digits: 50, 2,300, 1.4e5."""
    if number >= 1e5:
        return f"{number:.1e}".replace("e+0", "e")
    return f"{float(f'{number:.1e}'):,.0f}"


def _products(name: str, record: dict):
    """Error against the number of products: auxjax's methods as lines, the peers as points."""
    entries = [entry for entry in _measured(record, "num_products") if not _repeats(entry)]
    mine = [entry for entry in entries if entry["library"] == "auxjax"]
    if not mine:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 3.8), layout="constrained")
    others = [entry for entry in entries if entry["library"] != "auxjax"]
    for library in dict.fromkeys(entry["library"] for entry in others):
        points = _places([entry for entry in others if entry["library"] == library], "num_products", 1.0)
        colour, marker = _look(library)
        xs, ys = zip(*points, strict=True)
        axes.scatter(xs, ys, s=14, facecolors="none", edgecolors=colour, marker=marker, linewidths=0.7, label=library)
    colours = [colour for colour, _ in (*LOOKS.values(), *SPARE)]
    methods = dict.fromkeys(entry["method"] for entry in mine)
    of = {m: sorted((e for e in mine if e["method"] == m), key=lambda e: e["num_products"]) for m in methods}
    joined = [method for method in methods if len(of[method]) > 1]
    for place, method in enumerate(joined):
        xs, ys = zip(*_places(of[method], "num_products", 1.0), strict=True)
        style = ("-", (0, (4, 1.5)))[place // len(colours)]
        look = {"color": colours[place % len(colours)], "linestyle": style, "linewidth": 1.2}
        axes.plot(xs, ys, marker="o", markersize=3, label=method, **look)
    alone = [entry for entry in mine if entry["method"] not in joined]
    for x, y in _places(alone, "num_products", 1.0):
        axes.scatter([x], [y], s=14, color="#000000", marker="*")
    _scales(axes, entries, "num_products", 1.0)
    _name_points(axes, alone, _places(entries, "num_products", 1.0), "num_products", 1.0)
    axes.set_xlabel("Hessian-vector products")
    facts = record.get("facts")
    axes.set_title(f"{name}: condition {_short(facts['condition'])}" if facts else name, loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7, title="lines: auxjax", title_fontsize=7)
    return figure


def _repeats(entry: dict) -> bool:
    """Whether an entry of auxjax has the error and the products of another one and differs in time or memory only."""
    label = entry["label"]
    same = ("certified", "unrolled remat", "unrolled sqrt", "hand step")
    return entry["library"] == "auxjax" and any(words in label for words in same)


def _sequence(name: str, record: dict):
    """Time added up over the outer steps."""
    entries = [entry for entry in record["entries"] if entry.get("steps")]
    if not entries:
        return None
    best = {}
    for entry in sorted(entries, key=lambda entry: entry["median_s"]):
        best.setdefault(entry["library"], entry)
    fastest = sorted((e for e in entries if e["library"] == "auxjax"), key=lambda entry: entry["median_s"])[:OWN]
    shown = [e for e in entries if e in fastest or (e["library"] != "auxjax" and best[e["library"]] is e)]
    shown.sort(key=lambda entry: -entry["median_s"])
    figure, axes = plt.subplots(figsize=(WIDTH + 2.0, 3.4), layout="constrained")
    shades, used = ("#000000", "#444444", "#777777", "#999999", "#bbbbbb"), 0
    markers = ("o", "s", "^", "v", "D", "P")
    for entry in shown:
        total = np.cumsum(np.median(np.array(entry["steps"]), axis=0))
        colour, marker = _look(entry["library"])
        if entry["library"] == "auxjax":  # the fastest, which comes last, in black
            place = sum(e["library"] == "auxjax" for e in shown) - 1 - used
            colour, marker, used = shades[place % len(shades)], markers[place % len(markers)], used + 1
        axes.plot(
            np.arange(1, len(total) + 1),
            total,
            color=colour,
            marker=marker,
            markevery=max(len(total) // 8, 1),
            markersize=3.5,
            linewidth=1.2,
            label=f"{entry['library']}: {entry['chosen']} ({_seconds(entry['median_s'])})",
        )
    axes.set_ylim(0, None)
    axes.set_xlim(0, None)
    axes.set_xlabel("outer step")
    axes.set_ylabel("seconds, added up")
    axes.set_title(f"{name}: every hypergradient to a relative error of at most 1e-3", loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7)
    return figure


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"


def _memory(memory: dict):
    """Memory of unrolled loops, a panel per optimiser."""
    rows = memory.get("rows", [])
    if not rows:
        return None
    optimizers = list(dict.fromkeys(row["optimizer"] for row in rows))
    size = (0.4 + 2.7 * len(optimizers), 2.9)
    figure, grid = plt.subplots(1, len(optimizers), figsize=size, sharey=True, squeeze=False, layout="constrained")
    looks = {"False": ("#D55E00", "s", "-"), "True": ("#0072B2", "^", (0, (4, 1.5))), "sqrt": ("#000000", "o", "-")}
    for axes, optimizer in zip(grid[0], optimizers, strict=True):
        for remat, (colour, marker, style) in looks.items():
            mine = sorted(
                (row["steps"], row["bytes"] / 1e6)
                for row in rows
                if (row["optimizer"], row["remat"]) == (optimizer, remat)
            )
            label = {"False": "remat=False", "True": "remat=True", "sqrt": 'remat="sqrt"'}[remat]
            exponent = memory.get("growth", {}).get(f"{optimizer} {remat}")
            label += f", ~ steps$^{{{exponent:.2f}}}$" if exponent is not None else ""
            axes.plot(*zip(*mine, strict=True), color=colour, marker=marker, linestyle=style, markersize=4, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([4, 16, 64, 256, 1024], ["4", "16", "64", "256", "1024"])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_title(f"{optimizer}, {memory['problem']}", loc="left")
        axes.set_xlabel("unrolled steps")
        axes.legend(loc="upper left", fontsize=7)
    grid[0, 0].set_ylabel("MB of intermediate values")
    return figure
