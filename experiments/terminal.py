"""What people see in the terminal: progress bars and tables, drawn by rich."""

import contextlib
import pathlib

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

NAMES = {
    "test_accuracy": "test accuracy %",
    "selected_test_accuracy": "at best validation %",
    "corrupted_auroc": "corrupted-sample AUROC",
}


@contextlib.contextmanager
def progress():
    """Gives `follow(label, total) -> on_step`: starts a bar, in place of the last one, and moves it.

    Labels that end in a colon are kept to the end; any other bar makes room for the next.
    """
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as bars:
        passing = []

        def follow(label: str, total: int):
            if not label.endswith(":"):
                while passing:
                    bars.remove_task(passing.pop())
            task = bars.add_task(label, total=total)
            if not label.endswith(":"):
                passing.append(task)
            return lambda step: bars.update(task, completed=min(step, total))

        yield follow


def show(table: Table) -> None:
    """Prints a table on standard output."""
    Console().print(table)


def show_result(title: str, result: dict, directory: pathlib.Path) -> None:
    """The result of one run, and where its files are."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in result.items():
        scaled = f"{100 * value:.2f}" if "accuracy" in name else f"{value:.4g}"
        table.add_row(NAMES.get(name, name.replace("_", " ")), scaled)
    show(table)
    Console().print(f"Files: {directory}", soft_wrap=True)
