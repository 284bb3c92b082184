"""Terminal output: progress bars and tables, drawn by rich."""

import contextlib
import os
import pathlib
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from auxjax.training.memory import MemoryEstimate
from experiments.evaluation.metrics import heading, metric_of
from experiments.reporting.runs import flat
from experiments.runtime import processes


@contextlib.contextmanager
def progress():
    """Gives `follow(label, total) -> on_step`, a function that moves a bar to a step.

    Nothing is drawn before the first step is reported, so that messages about bad input stand alone. A label that ends
    in a colon keeps its bar to the end; any other bar makes room for the next. Nothing moves where standard error is no
    terminal: the bars are printed once, at the end.
    """
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    bars = Progress(*columns, console=Console(stderr=True), refresh_per_second=4)
    passing = []

    def follow(label: str, total: int):
        started = []

        def on_step(step: int) -> None:
            if not processes.is_first():
                return
            if not started:
                bars.start()
                if not label.endswith(":"):
                    while passing:
                        bars.remove_task(passing.pop())
                started.append(bars.add_task(label, total=total))
                if not label.endswith(":"):
                    passing.append(started[0])
            bars.update(started[0], completed=min(step, total))

        return on_step

    try:
        yield follow
    finally:
        if bars.live.is_started:
            bars.stop()


def show(table: Table) -> None:
    """Prints a table on standard output, 120 columns wide in a file or a pipe."""
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
    Console(width=wide).print(table)


def line(text: str) -> None:
    """Prints one line, however long."""
    Console().print(text, soft_wrap=True, highlight=False, markup=False)


def explain(results, metrics, against) -> None:
    """Says what the columns of a comparison are, for those of them that are among `results`.

    Args:
      results: names of the results.
      metrics: what the runs select by.
      against: the method that differences are to, or `None`.
    """
    line("Means over seeds ± half a 95 % confidence interval.")
    results = set(results)
    if any(name.startswith("test_") for name in results):
        line("  test: at the last step")
    if any(name.startswith("selected_test_") for name in results):
        by = " or ".join(metric_of(metric).label for metric in metrics)
        line(f"  at best validation: on the test set, at the step with the best {by} on validation")
    if against is not None:
        line("  difference: at the last step, the mean of the differences seed by seed")
    if against is not None and "updates" in results:
        line("  updates, time: of both runs where weights are learned first; time has compilation in it")
    if "corrupted_auroc" in results:
        line("  corrupted AUROC: how well low weights tell wrong labels (0.5: not at all, 1: perfectly)")


def show_files(label: str, paths) -> None:
    """One line for files of one folder."""
    paths = list(paths)
    names = ", ".join(path.name for path in paths)
    line(f"{label}: {paths[0] if len(paths) == 1 else f'{names} in {paths[0].parent}'}")


def show_result(title: str, result: dict, directory: pathlib.Path) -> None:
    """The result of one run, and where its files are."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in flat(result).items():
        metric = metric_of(name)
        table.add_row(heading(name), f"{100 * value:.2f}" if metric.unit == "%" else f"{value:.4g}")
    show(table)
    show_files("Files", [directory / name for name in ("result.json", "metrics.jsonl", "weights.npz")])


_MEMORY = {
    "params": "params",
    "optimizer": "state of the optimiser",
    "method": "state of the method",
    "model_state": "state of the model",
    "data": "data",
    "temporaries": "temporaries of the step",
    "outputs": "outputs of the step",
    "total": "total",
    "limit": "limit of the device",
}


def show_memory(title: str, estimate: MemoryEstimate) -> None:
    """What a step needs of the device's memory, in MB."""
    table = Table(title=title, title_justify="left")
    table.add_column("memory on one device")
    table.add_column("MB", justify="right")
    for name, value in estimate._asdict().items():
        if name == "total":
            table.add_section()
        table.add_row(_MEMORY[name], "unknown" if value is None else f"{value / 1e6:,.2f}")
    show(table)
