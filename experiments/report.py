"""Makes the table and the plots of a comparison from the files of its runs, again whenever it is called.

    python -m experiments.report out/digits

Means are over seeds; the interval is the 95 % confidence interval of the mean, mean +- t(0.975, n - 1) s / sqrt(n).
"""

import argparse
import csv
import json
import math
import pathlib
import sys
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments import command_line, plots, records, terminal
from experiments.statistics import mean_and_interval


class Run(NamedTuple):
    """One run, as its files tell.

    Attributes:
      directory: its folder.
      about: `run.json`.
      log: the lines of `metrics.jsonl`.
      result: `result.json`, `None` for a run that is not finished.
    """

    directory: pathlib.Path
    about: dict
    log: list[dict]
    result: dict | None


def read_runs(directory: pathlib.Path) -> list[Run]:
    """The runs in a folder, wherever in it they lie, sorted by method (as first met) and seed.

    Raises:
      ValueError: no runs there.
    """
    found = []
    for path in sorted(directory.rglob("run.json")):
        folder = path.parent
        log = folder / "metrics.jsonl"
        result = folder / "result.json"
        found.append(
            Run(
                folder,
                json.loads(path.read_text()),
                records.read_lines(log) if log.exists() else [],
                json.loads(result.read_text()) if result.exists() else None,
            )
        )
    if not found:
        raise ValueError(f"{directory} holds no runs (no run.json in it or below). Make some with experiments.compare.")
    order = ["stl", "stl+dev", "equal", "equal+dev"]
    rank = lambda run: run.about["method"]  # noqa: E731
    known = [method for method in order if any(rank(run) == method for run in found)]
    known += sorted({rank(run) for run in found} - set(known))
    return sorted(found, key=lambda run: (known.index(rank(run)), run.about["seed"]))


def by_method(runs: list[Run]) -> dict[str, list[Run]]:
    """`{method: its runs}`, in the order of `read_runs`."""
    groups = {}
    for run in runs:
        groups.setdefault(run.about["method"], []).append(run)
    return groups


def write_table(runs: list[Run], path: pathlib.Path) -> None:
    """`table.csv`: config, method, seed, step and one column per metric; a row per logged step of every run.

    The results (`test_accuracy` and what belongs to it) stand in the row of the last step.
    """
    rows = []
    for run in runs:
        head = {name: run.about[name] for name in ("config", "method", "seed")}
        lines = {line["step"]: {**head, **line} for line in run.log}
        if run.result is not None:
            lines.setdefault(run.result["step"], {**head}).update(run.result)
        rows += [lines[step] for step in sorted(lines)]
    first = ["config", "method", "seed", "step"]
    results = sorted({name for run in runs if run.result for name in run.result} - set(first))
    columns = [*first, *results, *sorted({name for row in rows for name in row} - set(first) - set(results))]
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def summary_table(runs: list[Run], title: str) -> Table:
    """The comparison for the terminal: a row per method, mean and interval of every result."""
    table = Table(
        title=title, title_justify="left", caption="mean over seeds, 95 % interval of the mean", caption_justify="left"
    )
    table.add_column("method")
    table.add_column("seeds", justify="right")
    shown = [name for name in terminal.NAMES if any(run.result and name in run.result for run in runs)]
    for name in shown:
        table.add_column(terminal.NAMES[name], justify="right")
    for method, group in by_method(runs).items():
        finished = [run.result for run in group if run.result is not None]
        cells = []
        for name in shown:
            values = [result[name] for result in finished if name in result]
            cells.append(_cell(values, 100 if "accuracy" in name else 1, 1 if "accuracy" in name else 3))
        table.add_row(method, str(len(finished)), *cells)
    return table


def _cell(values, scale: float, digits: int) -> str:
    if not values:
        return "-"
    mean, half = mean_and_interval(np.asarray(values) * scale)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def write(directory: pathlib.Path) -> None:
    """Writes `table.csv` and the plots, and shows the table."""
    runs = read_runs(directory)
    write_table(runs, directory / "table.csv")
    drawn = plots.draw_all(by_method(runs), directory)
    configs = ", ".join(sorted({run.about["config"] for run in runs}))
    settings = runs[0].about["settings"]
    terminal.show(summary_table(runs, f"{configs}, {settings['steps']} steps"))
    console = Console()
    for path in [directory / "table.csv", *drawn]:
        console.print(f"  {path}", soft_wrap=True, highlight=False)


def main(argv=None) -> int:
    """Runs the command line; bad input ends with one message on standard error and status 2."""
    first, _, rest = __doc__.partition("\n\n")
    found = argparse.ArgumentParser(
        "python -m experiments.report",
        description=first,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("directory", metavar="DIR", type=pathlib.Path, help="what --out was")
    arguments = found.parse_args(argv)
    return command_line.guarded(lambda: write(arguments.directory))


if __name__ == "__main__":
    sys.exit(main())
