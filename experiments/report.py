"""Makes the table and the plots of a comparison from the files of its runs, again whenever it is called.

    python -m experiments.report out/digits --against equal

Means are over seeds; the interval is the 95 % confidence interval of the mean, mean +- t(0.975, n - 1) s / sqrt(n).
Differences are taken seed by seed. The table is printed, and written as table.md.
"""

if __name__ == "__main__":  # first: the imports take seconds
    from experiments.runtime import interruption

    interruption.exit_on_interrupt()

import pathlib

from experiments import cli
from experiments.reporting import runs as all_runs
from experiments.reporting import summary, terminal
from experiments.reporting.plots import comparison


def write(directory: pathlib.Path, against: str | None = None) -> None:
    """Writes `table.csv`, `table.md` and the plots, and shows the table.

    Args:
      directory: folder of the runs.
      against: label of the method that the differences are to; the first one if `None`.
    """
    runs = all_runs.read_runs(directory)
    groups = all_runs.by_method(runs)
    against = next(iter(groups)) if against is None and len(groups) > 1 else against
    found = summary.summarise(groups, all_runs.selected_by(runs), against)
    all_runs.write_table(runs, directory / "table.csv")
    (directory / "table.md").write_text(summary.as_markdown(found))
    drawn = comparison.draw_all(groups, directory, against)
    titles = sorted({f"{run.about['config']}, {run.about['settings']['steps']} steps" for run in runs})
    terminal.show(summary.as_table(found, "; ".join(titles)))
    terminal.explain([name for run in runs for name in run.result or ()], all_runs.selected_by(runs), against)
    unfinished = [run for run in runs if run.result is None]
    if unfinished:
        terminal.line(f"Not finished: {len(unfinished)} of {len(runs)} runs, such as {unfinished[0].directory}")
    terminal.show_files("Table", [directory / "table.csv", directory / "table.md"])
    if drawn:
        terminal.show_files("Plots", drawn)


def main(argv=None) -> int:
    """Runs the command line; bad input ends with one message on standard error and status 2."""
    found = cli.bare_parser("python -m experiments.report", __doc__)
    found.add_argument("directory", metavar="DIR", type=cli.path, help="what --out was")
    found.add_argument(
        "--against", metavar="METHOD", help="what the differences are to (the first method of the table)"
    )
    arguments = found.parse_args(argv)
    return cli.guarded(lambda: write(arguments.directory, arguments.against))


if __name__ == "__main__":
    interruption.exit_process(main())
