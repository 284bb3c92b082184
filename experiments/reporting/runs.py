"""The runs of a folder, as their files tell: read, grouped by method, and as one table of all numbers."""

import csv
import json
import os
import pathlib
from typing import NamedTuple

from experiments import configs
from experiments.evaluation.metrics import register
from experiments.methods.labels import order_of
from experiments.runtime import records


class Run(NamedTuple):
    """One run, as its files tell.

    Attributes:
      directory: its folder.
      about: `run.json`.
      log: the lines of `metrics.jsonl`.
      result: `result.json`, `None` for a run that is not finished; the weights that a refit has learned are single
        numbers, `learned_weight/<task>`.
      seconds: that it took, with the run a refit learns from; `None` for a run that is not finished.
    """

    directory: pathlib.Path
    about: dict
    log: list[dict]
    result: dict | None
    seconds: float | None = None


def read_runs(directory: pathlib.Path) -> list[Run]:
    """The runs in a folder, wherever in it they lie: single-task learning first, then by method, settings and seed.

    The run that a refit has learned from, within its folder, is a run of its own, unless it lies elsewhere as well.

    Raises:
      ValueError: no runs there, a damaged file, or the same run in two folders.
    """
    found = {}
    for path in sorted(directory.rglob("run.json"), key=lambda path: (path.parent.name == records.LEARNING, path)):
        folder, about = path.parent, records.read_json(path)
        if missing := [field for field in (*records.IDENTITY, "primary", "metric") if field not in about]:
            raise ValueError(f"{path} lacks {', '.join(missing)}: it was not written by experiments.run.")
        if about.get("learning_only"):  # it has trained no model that could be judged
            continue
        register(about.get("metrics", {}))
        log, result, timing = (folder / name for name in ("metrics.jsonl", "result.json", "timing.jsonl"))
        run = Run(
            folder,
            about,
            records.read_lines(log) if log.exists() else [],
            flat(records.read_json(result)) if result.exists() else None,
            sum(line["seconds"] for line in records.read_lines(timing)) if timing.exists() else None,
        )
        identity = json.dumps([about[field] for field in records.IDENTITY], sort_keys=True)
        if identity in found and folder.name == records.LEARNING:
            continue
        if identity in found:
            raise ValueError(
                f"{found[identity].directory} and {folder} hold the same run. Delete one, or move it away."
            )
        found[identity] = run
    if not found:
        raise ValueError(f"{directory} holds no runs (no run.json in it or below). Make some with experiments.compare.")
    return [found[identity] for identity in sorted(found, key=lambda identity: _order(found[identity].about))]


def flat(result: dict) -> dict:
    """A result with the weights that a refit has learned as single numbers, `learned_weight/<task>`."""
    plain = {name: value for name, value in result.items() if name != "learned_weights"}
    return plain | {f"learned_weight/{task}": weight for task, weight in result.get("learned_weights", {}).items()}


def _order(about: dict) -> tuple:
    settings = json.dumps(about["settings"], sort_keys=True)
    return about["config"], *order_of(about["method"]), settings, about["seed"]


def selected_by(runs: list[Run]) -> list[str]:
    """The metrics the runs choose their best step by: one, unless they are of different configs."""
    return list(dict.fromkeys(run.about["metric"] for run in runs))


def by_method(runs: list[Run]) -> dict[str, list[Run]]:
    """`{label: its runs}`, in the order of `read_runs`; seeds of one method, config and settings belong together.

    The label is the method's name, and in brackets the config and those settings that are not the same everywhere.
    """
    several = len({run.about["config"] for run in runs}) > 1
    groups = {}
    for run in runs:
        about = run.about
        others = [other.about["settings"] for other in runs if other.about["config"] == about["config"]]
        differ = [
            f"{name}={configs.as_text(value)}"
            for name, value in about["settings"].items()
            if any(other.get(name) != value for other in others)
        ]
        brackets = ", ".join([about["config"]] * several + differ)
        groups.setdefault(about["method"] + f" ({brackets})" * bool(brackets), []).append(run)
    return groups


def write_table(runs: list[Run], path: pathlib.Path) -> None:
    """`table.csv`: config, method, seed, step and one column per metric; a row per logged step of every run.

    The results (`test_accuracy` and what belongs to it) stand in the row of the last step. Settings that are not the
    same in all runs get a column at the end, `setting/<name>`.
    """
    rows = []
    for run in runs:
        head = {name: run.about[name] for name in ("config", "method", "seed")}
        lines = {line["step"]: {**head, **line} for line in run.log}
        if run.result is not None:
            lines.setdefault(run.result["step"], {**head}).update(run.result)
        rows += [(run.about["settings"], lines[step]) for step in sorted(lines)]
    first = ["config", "method", "seed", "step"]
    results = sorted({name for run in runs if run.result for name in run.result} - set(first))
    metrics = sorted({name for _, row in rows for name in row} - set(first) - set(results))
    settings = [run.about["settings"] for run in runs]
    names = sorted({name for setting in settings for name in setting})
    differ = [name for name in names if any(setting.get(name) != settings[0].get(name) for setting in settings)]
    temporary = path.with_suffix(".partial")
    with temporary.open("w", newline="") as stream:
        writer = csv.DictWriter(
            stream, [*first, *results, *metrics, *(f"setting/{name}" for name in differ)], restval=""
        )
        writer.writeheader()
        for setting, row in rows:
            row |= {f"setting/{name}": configs.as_text(setting.get(name, "")) for name in differ}
            writer.writerow(row)
    os.replace(temporary, path)
