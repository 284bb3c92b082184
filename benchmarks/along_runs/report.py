"""Tables and plots of hypergradients along runs."""

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

SERIES = "neumann(3)"  # what the others are compared with
GROUPS = {"helpful": "tab:green", "image": "tab:orange", "random": "tab:red"}


def table(rows: list[dict]) -> str:
    """Medians over moments, draws and seeds, per config, method and estimator; times are those of `relative_time`."""
    lines = [
        "| config | method | estimator | products | cosine, Gauss-Newton | worst tenth | cosine, Hessian | worst tenth "
        "| wrong signs, % | AUROC | residual | time |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for config, method, name in dict.fromkeys((row["config"], row["method"], row["estimator"]) for row in rows):
        own = [row for row in rows if (row["config"], row["method"], row["estimator"]) == (config, method, name)]
        cells = [config, method, name, f"{np.mean([row['num_matvecs'] for row in own]):.0f}"]
        for reference in ("Gauss-Newton", "Hessian"):
            found = np.concatenate([row.get(f"cosine, {reference}", []) for row in own])
            cells += [f"{np.median(found):.2f}", f"{np.quantile(found, 0.1):.2f}"] if found.size else ["", ""]
        clear = sum(row["clear"] for row in own)
        cells.append(f"{100 * sum(row['wrong'] for row in own) / clear:.1f}" if clear else "")
        told = [value for row in own for value in row.get("auroc", [])]
        cells.append(f"{np.mean(told):.2f}" if told else "")
        cells.append(f"{np.median([row['relative_residual'] for row in own]):.2f}")
        cells.append(relative_time(rows, own))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def relative_time(rows: list[dict], own: list[dict]) -> str:
    """Median over seeds of the time of an outer update over that of three Neumann terms in the same process."""
    run = ("config", "method", "seed", "moment")
    series = {
        tuple(row[key] for key in run): row["milliseconds"]
        for row in rows
        if row["estimator"] == SERIES and "milliseconds" in row
    }
    timed = [row for row in own if "milliseconds" in row]
    pairs = [(row["milliseconds"], series.get(tuple(row[key] for key in run))) for row in timed]
    found = [mine / theirs for mine, theirs in pairs if theirs]
    return f"{np.median(found):.2f}" if found else ""


def by_moment(rows: list[dict], config: str, method: str, field: str) -> str:
    """Medians of a field over draws and seeds, per estimator and moment."""
    own = [row for row in rows if (row["config"], row["method"]) == (config, method) and field in row]
    moments = sorted({row["moment"] for row in own})
    lines = [f"| estimator | {' | '.join(map(str, moments))} |", f"|---|{'---:|' * len(moments)}"]
    for name in dict.fromkeys(row["estimator"] for row in own):
        cells = [
            f"{np.median([row[field] for row in own if (row['estimator'], row['moment']) == (name, moment)]):.2f}"
            for moment in moments
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot_paths(paths: dict[str, dict[str, list[float]]], every: int, file: pathlib.Path) -> None:
    """Mean weights of the groups of tasks along the run, one panel per hypergradient.

    Args:
      paths: `{hypergradient: {group: weights after some updates}}`.
      every: outer updates between two of them.
      file: the PNG.
    """
    figure, axes = plt.subplots(
        1, len(paths), figsize=(3.2 * len(paths), 2.8), sharey=True, layout="constrained", squeeze=False
    )
    for axis, (name, groups) in zip(axes[0], paths.items(), strict=True):
        for group, colour in GROUPS.items():
            updates = 1 + every * np.arange(len(groups[group]))
            axis.plot(updates, groups[group], color=colour, linewidth=1.8, label=group)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("outer update")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("mean weight of the tasks")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)
    plt.close(figure)
