"""The table of a comparison: a row per method, with mean and 95 % interval of every result over the seeds.

Seeds differ in split, noise and params, and their spread is in every interval. Two methods that ran on the same seeds
are better told apart by the mean of their differences seed by seed, which is a column of its own.

Where methods do not all train for as many updates, as a refit, which trains twice, two more columns tell what each of
them costs, as a multiple of the method that differences are to.
"""

import math
from typing import NamedTuple

import numpy as np
from rich.table import Table

from experiments.evaluation import metrics
from experiments.evaluation.statistics import mean_and_interval


class Summary(NamedTuple):
    """Headings and cells, `seeds` being those of finished runs.

    Attributes:
      headings: of the columns behind method and seeds.
      rows: `(method, seeds, cells)`.
    """

    headings: list[str]
    rows: list[tuple[str, int, list[str]]]


def summarise(groups: dict[str, list], selected_by: list[str], against: str | None) -> Summary:
    """Means, intervals and differences.

    Args:
      groups: `{label: runs}`, see `runs.by_method`.
      selected_by: the metrics the runs choose their best step by.
      against: the label whose results are taken from the others' of the same config and seeds, in the first metric
        at the last step; `None` for no such column.

    Raises:
      ValueError: there is no such label.
    """
    if against is not None and against not in groups:
        raise ValueError(f"--against {against}: there are no runs of it. There are runs of {', '.join(groups)}.")
    results = {
        method: {(run.about["config"], run.about["seed"]): run.result for run in group if run.result is not None}
        for method, group in groups.items()
    }
    shown = metrics.columns({name for of in results.values() for one in of.values() for name in one}, selected_by)
    headings = [metrics.heading(name) for name in shown]
    costs = {} if against is None else _costs(groups, against)
    if against is not None and shown:
        headings.append(f"{headings[0]}, difference to {against}")
    rows = []
    for method, found in results.items():
        cells = [_cell([one[name] for one in found.values() if name in one], name) for name in shown]
        if against is not None and shown:
            pairs = [(one, results[against].get(place)) for place, one in found.items()]
            both = [one[shown[0]] - other[shown[0]] for one, other in pairs if other and shown[0] in {*one} & {*other}]
            cells.append("" if method == against else _cell(both, shown[0], sign="+"))
        cells += [of[method] for of in costs.values()]
        rows.append((method, len(found), cells))
    return Summary([*headings, *costs], rows)


def _costs(groups: dict[str, list], against: str) -> dict[str, dict[str, str]]:
    """`{heading: {method: cell}}`: updates and time of the finished runs; empty where all need as many updates."""
    found = {
        "updates": lambda run: run.result.get("updates", run.result.get("step")),
        "time": lambda run: run.seconds,
    }
    means = {
        what: {
            method: [value for run in group if run.result is not None and (value := of(run)) is not None]
            for method, group in groups.items()
        }
        for what, of in found.items()
    }
    if len({value for values in means["updates"].values() for value in values}) < 2:
        return {}

    def cell(values, reference):
        return f"{np.mean(values) / np.mean(reference):.1f}x" if values and reference else "-"

    return {
        f"{what}, as a multiple of {against}": {method: cell(values, of[against]) for method, values in of.items()}
        for what, of in means.items()
    }


def _cell(values, name: str, sign: str = "") -> str:
    if not values:
        return "-"
    metric = metrics.metric_of(name)
    mean, half = mean_and_interval(np.asarray(values) * metric.scale)
    mean = round(mean, metric.digits) + 0.0  # no -0.0
    return f"{mean:{sign}.{metric.digits}f}" + ("" if math.isnan(half) else f" ± {half:.{metric.digits}f}")


def as_table(summary: Summary, title: str, first: str = "method") -> Table:
    """For the terminal: numbers stay on one line, names of methods and headings are folded where there is no room."""
    table = Table(title=title, title_justify="left")
    table.add_column(first, overflow="fold")
    table.add_column("seeds", justify="right")
    for column, heading in enumerate(summary.headings):
        width = max((len(cells[column]) for *_, cells in summary.rows), default=0)
        table.add_column(heading, justify="right", min_width=width)
    for method, seeds, cells in summary.rows:
        table.add_row(method, str(seeds), *cells)
    return table


def as_markdown(summary: Summary, first: str = "method") -> str:
    """For a page or a paper's draft."""
    lines = [[first, "seeds", *summary.headings], ["---", *["---:"] * (1 + len(summary.headings))]]
    lines += [[f"`{method}`", str(seeds), *cells] for method, seeds, cells in summary.rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
