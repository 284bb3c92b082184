"""Scheduling of the measurements on one problem, and along one sequence.

All entries of all libraries on a problem take turns, in an order drawn anew for every round, so that a drift of the
machine hits all alike; only one process computes at a time. What is measured goes into a plain dictionary, written to
disk after every entry and every round; entries that stand there already are not measured again.
"""

import math
import random
import re
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from benchmarks.hypergradients.problems.exchange import LeftOut, Problem
from benchmarks.hypergradients.worker import Worker, WorkerFailed, flat, relative_error
from benchmarks.shared.timing import interval_of_median

# The settings measured on each kind of problem: those with all methods, the others, and a quick look.
GRIDS = {
    "broad": {"K": (5, 10, 20, 40, 80), "T": (20, 80), "rank": (10, 20, 40), "tol": (1e-1, 1e-3, 1e-5)},
    "core": {"K": (5, 10, 20, 80), "T": (20,), "rank": (10,), "tol": (1e-3, 1e-5)},
    "quick": {"K": (20,), "T": (), "rank": (), "tol": (1e-5,)},
}
BROAD = ("hypercleaning-small", "hypercleaning-large", "convnet")
ALONE = ("hypercleaning-large",)  # memory is measured in a process of its own as well, at K = 20
LARGEST_ERROR = 1e-3  # along a sequence
LEAST_GRID = 160  # a method without tolerances is tried along a sequence if its settings go so far


class Plan(NamedTuple):
    """How much to measure.

    Attributes:
      repeats: timed runs of an entry.
      seconds: time after which an entry is not run again (it is run three times at least).
      sequence_seconds: time after which a sequence is given up.
      quick: only a few settings.
      seed: handed to the entries, and of the order of the turns.
      save: writes everything measured so far to disk.
      say: says what is being done.
    """

    repeats: int
    seconds: float
    sequence_seconds: float
    quick: bool
    seed: int
    save: Callable[[], None]
    say: Callable[[str], None]


def parse_label(label: str) -> tuple[str, str, float | None]:
    """Method, name of its setting and its value: `"cg tol=1e-5 warm"` -> `("cg warm", "tol", 1e-5)`."""
    found = re.fullmatch(r"(.*?)\s*\b(K|T|rank|tol)=(\S+)(.*)", label)
    if found is None:
        return label, "", None
    before, name, value, after = found.groups()
    return f"{before}{after}", name, float(value)


def wanted(label: str, grid: dict) -> bool:
    """Whether an entry is measured on a single problem: its setting is in the grid, and it has no memory."""
    method, name, value = parse_label(label)
    if " warm" in f" {method}":
        return False
    return value is None or any(math.isclose(value, known, rel_tol=1e-6) for known in grid[name])


def summary_of(times: list[float]) -> dict[str, float]:
    """Median and its 95 % interval; the whole range where the runs are too few for that."""
    low, high = interval_of_median(times) or (min(times), max(times))
    return {"median_s": statistics.median(times), "low_s": low, "high_s": high}


def measure_problem(workers: list[Worker], problem: Problem, path: str, record: dict, plan: Plan) -> None:
    """Measures all entries of all libraries on one problem into `record["entries"]`."""
    grid = GRIDS["quick" if plan.quick else "broad" if problem.name in BROAD else "core"]
    turns = []
    for worker in workers:
        for label in _labels(worker, path, record, plan):
            if not wanted(label, grid):
                continue
            entry = _entry(record, worker.name, label)
            if "error" not in entry and not _over(entry):
                plan.say(f"{problem.name}: preparing {worker.name}, {label}")
                _prepare(worker, problem, path, entry, plan)
                plan.save()
            turns.append((worker, entry))
    shuffle = random.Random(plan.seed).shuffle
    while True:
        open_turns = [turn for turn in turns if not _over(turn[1]) and not _enough(turn[1], plan)]
        if not open_turns:
            break
        done = min(len(entry["times"]) for _, entry in open_turns)
        plan.say(f"{problem.name}: round {done + 1} of {plan.repeats}, {len(open_turns)} entries")
        shuffle(open_turns)
        for worker, entry in open_turns:
            if len(entry["times"]) == done:
                _time(worker, path, entry, plan)
        plan.save()
    alone = turns if problem.name in ALONE else []
    for worker, entry in alone:
        measured = "alone" in entry or _over(entry)
        if not measured and parse_label(entry["label"])[1:] in (("K", 20), ("T", 20)):
            plan.say(f"{problem.name}: memory of {worker.name}, {entry['label']}")
            entry["alone"] = _memory_alone(worker, path, entry["label"], plan)
            plan.save()
    record["complete"] = True


def _labels(worker: Worker, path: str, record: dict, plan: Plan) -> list[str]:
    """The library's entries for the problem; none, with the reason in the record, if it cannot be asked."""
    try:
        if worker.loaded != path:
            worker.ask("load", path)
        return worker.ask("labels")
    except WorkerFailed as error:
        record.setdefault("failed", {})[worker.name] = str(error)
        plan.save()
        return []


def _entry(record: dict, library: str, label: str) -> dict:
    """The entry's dictionary in the record, a new one if there is none."""
    for entry in record["entries"]:
        if (entry["library"], entry["label"]) == (library, label):
            return entry
    method, name, value = parse_label(label)
    entry = {"library": library, "label": label, "method": method, "setting": name, "value": value, "times": []}
    record["entries"].append(entry)
    return entry


def _over(entry: dict) -> bool:
    return "failed" in entry or "left_out" in entry


def _enough(entry: dict, plan: Plan) -> bool:
    runs = len(entry["times"])
    return runs >= plan.repeats or (runs >= 3 and sum(entry["times"]) > plan.seconds)


def _guarded(entry: dict, action: Callable):
    """The result of `action()`, or `None` with the reason in the entry."""
    try:
        return action()
    except LeftOut as reason:
        entry["left_out"] = str(reason)
    except WorkerFailed as error:
        entry["failed"] = str(error)
    return None


def _ensure(worker: Worker, path: str, label: str, plan: Plan, report: bool = False) -> dict | None:
    """Makes sure that the entry is made in the worker's process; what making it told if it was made now."""
    options = {"seed": plan.seed, "report": report}
    if worker.loaded != path:
        worker.ask("load", path)
    return None if label in worker.made else worker.ask("make", label, options)


def _prepare(worker: Worker, problem: Problem, path: str, entry: dict, plan: Plan) -> None:
    """First run of an entry: its result against the reference, its memory, its rounding error."""
    answer = _guarded(entry, lambda: _ensure(worker, path, entry["label"], plan, problem.name in BROAD))
    if answer is None:
        return
    result = answer.pop("result")
    if sorted(result) != sorted(problem.meta):
        entry["failed"] = f"returned {sorted(result)}; expected {sorted(problem.meta)}"
        return
    vector, reference = flat(result), flat(problem.reference)
    finite = bool(np.all(np.isfinite(vector)))
    size = np.linalg.norm(vector) * np.linalg.norm(reference)
    entry |= {
        **answer,
        "finite": finite,
        "error": relative_error(result, problem.reference) if finite else None,
        "cosine": float(vector @ reference / size) if finite and size > 0 else None,
        "own_rounding": None,
    }
    fixed = entry["setting"] in ("K", "T") and entry["value"] == 20  # at a tolerance, float64 may stop at another step
    if problem.precision == "float32" and finite and fixed:
        try:
            double = worker.ask("double", entry["label"], {"seed": plan.seed})
        except WorkerFailed as error:
            entry["rounding_failed"] = str(error)
        else:
            entry["own_rounding"] = relative_error(result, double)


def _time(worker: Worker, path: str, entry: dict, plan: Plan) -> None:
    """One timed run; a process that was lost is started again first."""

    def run():
        _ensure(worker, path, entry["label"], plan)
        return worker.ask("time", entry["label"])

    seconds = _guarded(entry, run)
    if seconds is not None:
        entry["times"].append(seconds)
        entry |= summary_of(entry["times"])


def _memory_alone(worker: Worker, path: str, label: str, plan: Plan) -> dict:
    """Memory of a process that does nothing but this entry."""
    alone = worker.twin()
    try:
        alone.ask("load", path)
        return alone.ask("make", label, {"seed": plan.seed})["memory"]
    except WorkerFailed as error:
        return {"failed": str(error)}
    finally:
        alone.close()


def measure_sequence(workers: list[Worker], name: str, path: str, record: dict, plan: Plan) -> None:
    """Measures all methods of all libraries along one sequence into `record["entries"]`.

    A method's settings are tried from the loosest on; the first whose worst error is at most `LARGEST_ERROR` counts,
    and is then timed, in turns with those of the others.
    """
    chosen = []
    for worker in workers:
        for method, labels in settings_by_method(_labels(worker, path, record, plan), plan.quick).items():
            entry = _entry(record, worker.name, method)
            if "tried" not in entry and not _over(entry):
                plan.say(f"{name}: looking for the setting of {worker.name}, {method}")
                entry["tried"] = _search(worker, path, entry, labels, plan)
                plan.save()
            chosen.append((worker, entry))
    for count in range(max(1, min(plan.repeats, 3))):
        for worker, entry in chosen:
            if not _over(entry) and len(entry["times"]) <= count:
                plan.say(f"{name}: {worker.name}, {entry['chosen']}, run {count + 1}")
                run = _guarded(entry, lambda w=worker, e=entry: _follow(w, path, e["chosen"], None, plan))
                if run is None:
                    continue
                entry["times"].append(sum(run["times"]))
                entry["steps"] = [*entry.get("steps", []), run["times"]]
                entry["errors"], entry["products"] = run["errors"], run["products"]
                entry["worst_error"] = max(run["errors"])
                entry |= summary_of(entry["times"])
                plan.save()
    record["complete"] = True


def settings_by_method(labels: list[str], quick: bool) -> dict[str, list[str]]:
    """The settings of every method, loosest first; a method that has tolerances is not tried by number of products.

    Quickly, every other setting, of methods with a warm start only.
    """
    found = {}
    for label in labels:
        method, name, value = parse_label(label)
        if name in ("K", "tol") and "certified" not in method and (name == "tol" or value >= 10):
            found.setdefault(method, {}).setdefault(name, []).append((-value if name == "tol" else value, label))
    families = {}
    for method, names in found.items():
        if "tol" not in names and max(names["K"])[0] < LEAST_GRID:
            continue  # the few settings of a single problem are not a grid
        if quick and "warm" not in method:
            continue
        settings = sorted(names.get("tol") or names["K"])
        families[method] = [label for _, label in settings][:: 2 if quick else 1]
    return families


def _search(worker: Worker, path: str, entry: dict, labels: list[str], plan: Plan) -> list[dict]:
    """Tries settings until one is good enough: `entry["chosen"]`, or the reason why there is none."""
    tried = []
    deadline = time.monotonic() + 3 * plan.sequence_seconds
    for label in labels:
        run = _guarded(entry, lambda label=label: _follow(worker, path, label, LARGEST_ERROR, plan))
        if run is None:
            return tried
        worst = max(run["errors"])
        tried.append({"label": label, "points": len(run["errors"]), "worst_error": worst, "seconds": sum(run["times"])})
        if run["complete"] and worst <= LARGEST_ERROR:
            entry["chosen"] = label
            return tried
        worker.ask("drop", label)
        if worst <= LARGEST_ERROR or time.monotonic() > deadline:
            entry["failed"] = f"slower than {plan.sequence_seconds:.0f} s (given up at {label})"
            return tried
    best = min(run["worst_error"] for run in tried)
    entry["failed"] = f"no setting has an error of at most {LARGEST_ERROR:g} at all points; the smallest is {best:.1e}"
    return tried


def _follow(worker: Worker, path: str, label: str, largest_error: float | None, plan: Plan) -> dict:
    if worker.loaded != path:
        worker.ask("load", path)
    return worker.ask("follow", label, {"seed": plan.seed}, largest_error, plan.sequence_seconds)
