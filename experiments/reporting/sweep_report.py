"""What a sweep found: a table and a plot over the swept numbers, and the point that validation chooses.

The point is chosen by the mean over seeds of the metric on validation, once at the last step and once at the step that
was best there; only then is its result on the test set looked up.
"""

import pathlib

import numpy as np

from experiments.evaluation import metrics
from experiments.evaluation.statistics import mean_and_interval
from experiments.reporting import summary, terminal
from experiments.reporting.plots import sweep as sweep_plot
from experiments.reporting.runs import Run, write_table
from experiments.runtime import records
from experiments.training import grid

# Where a run is judged: in words, what chooses and what is then told.
STEPS = {
    "at the last step": ("validation", "test"),
    "at the best validation step": ("selected_validation", "selected_test"),
}


def write(sweep: grid.Sweep, directory: pathlib.Path) -> None:
    """Writes `table.csv`, `table.md`, `chosen.json` and `sweep.png`, and shows the table.

    Args:
      sweep: a sweep that is finished.
      directory: its folder.
    """
    about = records.read_json(directory / "sweep.json")
    groups = runs_by_point(sweep, directory, about)
    metric = about["metric"]
    metrics.register(about.get("metrics", {}))
    found = summary.summarise(groups, [metric], None)
    write_table([run for runs in groups.values() for run in runs], directory / "table.csv")
    first = ", ".join(over.name for over in sweep.over) or "method"
    (directory / "table.md").write_text(summary.as_markdown(found, first))
    title = f"{sweep.config}: {sweep.method}, {sweep.settings.steps} steps"
    terminal.show(summary.as_table(found, title, first))
    terminal.explain([name for runs in groups.values() for run in runs for name in run.result or ()], [metric], None)
    chosen = choose(sweep, groups, metric)
    records.write_json(directory / "chosen.json", chosen)
    for where, one in chosen.items():
        terminal.line(_in_words(where, one, metric))
    terminal.show_files("Files", [directory / name for name in ("table.csv", "table.md", "sweep.json", "chosen.json")])
    if sweep.over:
        sweep_plot.draw(sweep, list(groups.values()), metric, chosen, directory / "sweep.png")
        terminal.show_files("Plot", [directory / "sweep.png"])


def runs_by_point(sweep, directory: pathlib.Path, about: dict) -> dict[str, list[Run]]:
    """`{values: runs}`, a group per point, its runs as `experiments.report` has those of a comparison."""
    logs = {}
    for line in records.read_lines(directory / "metrics.jsonl"):
        logs.setdefault((line.pop("run"), line.pop("seed")), []).append(line)
    groups = {}
    for (point, seed), one in zip(sweep.runs(), about["runs"], strict=True):
        settings = grid.describe(sweep._replace(settings=sweep.settings_of(point)))["settings"]
        settings = {name: value for name, value in settings.items() if name not in ("over", "seeds")}
        what = {"config": sweep.config, "method": one["method"], "seed": seed, "settings": settings}
        what |= {"primary": about["primary"], "metric": about["metric"]}
        run = Run(directory, what, logs.get((grid.text_of(point), seed), []), one["result"])
        groups.setdefault(", ".join(f"{value:g}" for value in point.values()) or sweep.method, []).append(run)
    return groups


def choose(sweep, groups: dict[str, list], metric: str) -> dict[str, dict]:
    """The best point on validation, and what it then does on the test set; ties go to the first.

    Points with a run that is not finished are left out.

    Returns:
      For each of `STEPS`: the point, its place in the grid, and means and half widths of 95 % intervals; empty where
      there is nothing to choose.
    """
    whole = [
        place for place, runs in enumerate(groups.values()) if all(run.result is not None for run in runs)
    ]  # places in the grid
    if len(groups) < 2 or not whole:
        return {}
    runs, chosen = list(groups.values()), {}

    def over_seeds(place, name):
        return mean_and_interval([run.result[f"{name}_{metric}"] for run in runs[place]])

    for where, (judge, told) in STEPS.items():
        best = max(whole, key=lambda place: metrics.goodness(metric, over_seeds(place, judge)[0]))
        numbers = {}
        for name in (judge, told):
            mean, half = over_seeds(best, name)
            numbers |= {f"{name}_{metric}": mean, "half_width/" + f"{name}_{metric}": None if np.isnan(half) else half}
        chosen[where] = {"point": sweep.points()[best], "place": best, "seeds": len(runs[best]), **numbers}
    return chosen


def _in_words(where: str, one: dict, metric: str) -> str:
    judge, told = STEPS[where]
    shown = metrics.metric_of(metric)

    def number(name):
        mean, half = one[f"{name}_{metric}"], one[f"half_width/{name}_{metric}"]
        interval = "" if half is None else f" ± {shown.scale * half:.{shown.digits}f}"
        return f"{shown.scale * mean:.{shown.digits}f}{interval}" + f" {shown.unit}" * bool(shown.unit)

    return (
        f"Chosen on validation {where}: {grid.text_of(one['point'])} (validation {shown.label} {number(judge)}); "
        f"test {shown.label} {number(told)}"
    )
