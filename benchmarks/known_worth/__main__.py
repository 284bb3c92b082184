"""What methods win of what can be won, where it is known which auxiliary tasks help.

    python -m benchmarks.known_worth --out out/known-worth
    python -m benchmarks.known_worth --variants plain,easy_image --methods arml,jtds --seeds 10 --out out/known-worth
    python -m benchmarks.known_worth --config known_worth_cifar10 --data-dir DIR --seeds 5 --out out/known-worth-images

For every variant of the config it trains, on digits all seeds in one program: the controls (no task, equal weights,
the best scalar, each group of tasks alone, the oracle); every method in a run of its own; and, with the weights that it
has learned, `+refit`, a run from scratch on all labels. Methods without a dev set train on all labels in their own run,
too. `cross_fit` is `auxjax.learn_weights`, which has no run of its own.

Given is the share of the oracle's gain: (accuracy - equal+dev) / (oracle - equal+dev), means over the seeds, with 95 %
intervals by the bootstrap over seeds, both means in it. Rows that are in DIR/rows.jsonl are not repeated.
"""

import json
import pathlib
import time

import numpy as np

from auxjax import methods as known_methods
from auxjax.training.refit import kept, relative_weights
from benchmarks.known_worth import cross_fit, report, retraining
from benchmarks.known_worth.training import Bench, inputs, train
from benchmarks.shared.paths import home_path
from experiments import cli
from experiments.data.known_worth import GROUPS, VARIANTS
from experiments.evaluation.statistics import auroc

STEPS = 2000
METHODS = (
    "adaloss",
    "arml",
    "auto_lambda",
    "auxilearn",
    "auxinash",
    "cosine_similarity",
    "dwa",
    "gradnorm",
    "jtds",
    "maoal",
    "ol_aux",
    "random_weights",
    "uncertainty",
    "cross_fit",
)
RARE = ("helpful at 30", "helpful at 100", "helpful at 300")  # where the right weights are far larger
# What parts of cross_fit are worth: rows with other options, for --methods alone.
ABLATION: dict[str, dict] = {
    "cross_fit, one step": {"estimator": "one_step"},
    "cross_fit, three Neumann terms": {"estimator": "neumann"},
    "cross_fit, MINRES": {"estimator": "minres"},
    "cross_fit, two folds": {"folds": 2},
    "cross_fit, one round": {"rounds": 1},
    "cross_fit, no restarts": {"restart": False},
    "cross_fit, no simplex": {"simplex": False},
    "cross_fit, early moments too": {"measure_at": (0.5, 0.75, 1.0)},
}
# The same on images: rounds and rates of several lengths, none of which is right yet.
LONG = {"updates": 250, "measure_at": (0.7, 0.85, 1.0)}
CAREFUL = {"updates": 400, "measure_at": (0.25, 0.5, 1.0), "rate": 0.5, "outer_loss": "expected_error"}
SHORT = {"updates": 50, "measure_at": (0.5, 1.0), "outer_loss": "expected_error", "total": 36.0}  # as `signals` has it
IMAGES: dict[str, dict] = {
    "short cross_fit": SHORT,
    "short slow cross_fit": {**SHORT, "rate": 0.4},
    "cross_fit, careful": CAREFUL,
    "cross_fit, careful, one step": {**CAREFUL, "estimator": "one_step"},
    "cross_fit, long rounds, expected error": {**LONG, "outer_loss": "expected_error"},
    "cross_fit, long rounds": LONG,
}
# What a sceptic would do instead: train without a task and look; short trainings, as long as a round, and whole ones.
RETRAINING: dict[str, dict] = {
    "leave one out": {"how": "leave one out", "updates": 100},
    "leave one out, long": {"how": "leave one out", "updates": STEPS},
    "forward selection": {"how": "forward selection", "updates": 100},
    "forward selection, long": {"how": "forward selection", "updates": STEPS},
}
SETS = {"ablation": ABLATION, "images": IMAGES, "retraining": RETRAINING}  # words for --methods
CROSS_FITS = {"cross_fit": {}, **ABLATION, **IMAGES}
ORACLES = {"known_worth": 3.0, "known_worth_cifar10": 10.0}  # weight of the helpful tasks; the others have 0
GRID = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # other weights for them
OPTIONS = {"auxinash": "auxinash:refresh=outer"}


def controls(config: str) -> dict[str, tuple[float, float, float]]:
    """Weights of the groups of tasks, dev in training. The scalars are one weight for all tasks."""
    best = ORACLES[config]
    helpful = {f"helpful at {weight:g}": (weight, 0.0, 0.0) for weight in GRID if weight != best}
    return {
        "equal": (1.0, 1.0, 1.0),
        "oracle": (best, 0.0, 0.0),
        "primary alone": (0.0, 0.0, 0.0),
        "scalar 0.3": (0.3, 0.3, 0.3),
        "scalar 3": (3.0, 3.0, 3.0),
        **helpful,
        "image alone": (0.0, 1.0, 0.0),
        "random alone": (0.0, 0.0, 1.0),
    }


def group_of(task: str) -> str:
    """The group in the name of a task."""
    return task.rsplit("_", 1)[0]


def learned_weights(row) -> dict[str, np.ndarray]:
    """`{task: [S]}`: means over the last tenth of the log over the primary task's, at least 0."""
    found = []
    for seed in range(len(row.accuracy)):
        last = {task: weights[-max(1, len(weights) // 10) :, seed] for task, weights in row.weights.items()}
        try:
            found.append(relative_weights(last, "class"))
        except ValueError:  # a run that diverged has learned nothing: its tasks count 0
            found.append(dict.fromkeys(last, 0.0) | {"class": 1.0})
    return {task: np.array([weights[task] for weights in found]) for task in row.weights}


def selected(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`{task: [S]}`: 1 for the tasks whose weights stand out, 0 for the others."""
    names = [task for task in weights if task != "class"]
    table = np.stack([weights[name] for name in names])
    chosen = np.stack([kept(column) for column in table.T], axis=1).astype(float)
    return {"class": weights["class"], **dict(zip(names, chosen, strict=True))}


def aurocs(weights: dict[str, np.ndarray]) -> list[float]:
    """How well the weights of each seed tell the helpful tasks."""
    names = [name for name in weights if name != "class"]
    helpful = np.array([group_of(name) == "helpful" for name in names])
    return [auroc(np.array([weights[name][seed] for name in names]), helpful) for seed in range(len(weights["class"]))]


class Book:
    """The rows of a folder, each written once."""

    def __init__(self, directory: pathlib.Path):
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "rows.jsonl"
        self.rows = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def has(self, variant: str, name: str, seeds: list[int]) -> bool:
        """Whether a row is there."""
        return any((row["variant"], row["name"], row["seeds"]) == (variant, name, seeds) for row in self.rows)

    def add(self, variant: str, name: str, seeds: list[int], accuracy, weights, **more) -> None:
        """Writes a row."""
        row = {"variant": variant, "name": name, "seeds": seeds, "accuracy": [float(value) for value in accuracy]}
        if weights is not None:
            row["auroc"] = aurocs(weights)
            row["weights"] = {task: [round(float(value), 5) for value in values] for task, values in weights.items()}
        row |= more
        with self.path.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        self.rows.append(row)
        print(f"{variant}, {name}: {100 * np.mean(accuracy):.2f} %", flush=True)


def refit(bench: Bench, variant: str, seeds, weights, steps: int):
    """Accuracies of runs from scratch on all labels with weights `{task: [S]}`."""
    return train(bench, variant, "fixed_weights", seeds, with_dev=True, weights=weights, steps=steps).accuracy


def run_control(book: Book, bench: Bench, variant: str, name: str, seeds: list[int], steps: int) -> None:
    """A row of fixed weights."""
    if not book.has(variant, name, seeds):
        by_group = dict(zip(GROUPS, controls(bench.config)[name], strict=True))
        tasks = inputs(bench, variant, tuple(seeds), True).shapes.tasks
        weights = {task: np.full(len(seeds), by_group.get(group_of(task), 1.0)) for task in tasks}
        book.add(variant, name, seeds, refit(bench, variant, seeds, weights, steps), None)


def run_method(book: Book, bench: Bench, variant: str, method: str, seeds: list[int], steps: int) -> None:
    """A method's own run and its refit."""
    if book.has(variant, f"{method}+keep", seeds):
        return
    start = time.perf_counter()
    if method in CROSS_FITS:
        weights = cross_fit.learn(bench, variant, seeds, **CROSS_FITS[method])
    elif method in RETRAINING:
        weights = retraining.learn(bench, variant, seeds, **RETRAINING[method])
    else:
        with_dev = "outer_batch" not in known_methods.info(method).needs
        row = train(bench, variant, OPTIONS.get(method, method), seeds, with_dev=with_dev, steps=steps)
        weights = learned_weights(row)
        book.add(variant, method, seeds, row.accuracy, weights, seconds=time.perf_counter() - start)
    learning = time.perf_counter() - start
    accuracy = refit(bench, variant, seeds, weights, steps)
    more = {"seconds_of_learning": learning, "seconds": time.perf_counter() - start}
    book.add(variant, f"{method}+refit", seeds, accuracy, weights, **more)
    chosen = selected(weights)
    book.add(variant, f"{method}+keep", seeds, refit(bench, variant, seeds, chosen, steps), chosen, **more)


def run_times(book: Book, bench: Bench, variant: str, method: str, seeds: list[int], steps: int, factor: float) -> None:
    """A refit with a method's weights, all auxiliary tasks' times a factor."""
    name = f"{method}+refit, times {factor:g}"
    if not book.has(variant, name, seeds):
        (row,) = (
            row
            for row in book.rows
            if (row["variant"], row["name"], row["seeds"]) == (variant, f"{method}+refit", seeds)
        )
        weights = {
            task: np.array(values) * (1 if task == "class" else factor) for task, values in row["weights"].items()
        }
        book.add(variant, name, seeds, refit(bench, variant, seeds, weights, steps), weights)


def main(argv=None) -> int:
    """Runs the command line."""
    parser = cli.bare_parser("python -m benchmarks.known_worth", __doc__)
    about = "known_worth: digits (default); known_worth_cifar10: images, a convolutional network"
    parser.add_argument("--config", default="known_worth", choices=("known_worth", "known_worth_cifar10"), help=about)
    parser.add_argument("--data-dir", type=home_path, metavar="DIR", help="where the images lie, see docs/data.md")
    parser.add_argument("--variants", default=",".join(VARIANTS), metavar="V,V,...", help="default: all")
    about = (
        "default: all; none for none; ablation for cross_fit without its parts, images for its forms on images, "
        "retraining for leaving tasks out"
    )
    parser.add_argument("--methods", default=",".join(METHODS), metavar="M,M,...", help=about)
    parser.add_argument(
        "--times", default="", metavar="F,F,...", help="factors: refit with the learned weights times each"
    )
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="how many seeds (default 10)")
    parser.add_argument("--first-seed", type=int, default=0, metavar="S", help="the first of them (default 0)")
    about = f"default: those of the table, all but {', '.join(RARE)}"
    parser.add_argument("--controls", metavar="C,C,...", help=about)
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="inner updates of a run (default 2000)")
    parser.add_argument("--out", required=True, type=home_path, metavar="DIR", help="rows, table and plots")
    options = parser.parse_args(argv)
    variants = [name for name in options.variants.split(",") if name]
    wanted = [name for name in options.methods.split(",") if name and name != "none"]
    wanted = [one for name in wanted for one in SETS.get(name, (name,))]
    for name, there in ((variants, VARIANTS), (wanted, (*METHODS, *CROSS_FITS, *RETRAINING))):
        for one in name:
            if one not in there:
                parser.error(f"{one!r}: expected one of {', '.join(there)}")
    if options.config != "known_worth" and set(wanted) & set(RETRAINING):
        parser.error(f"--config {options.config}: leaving tasks out is for digits, whose networks train side by side")
    try:
        factors = [float(factor) for factor in options.times.split(",") if factor]
    except ValueError:
        parser.error(f"--times {options.times}: expected numbers, such as 0.3,3")
    seeds = list(range(options.first_seed, options.first_seed + options.seeds))
    bench, book = Bench(options.config, options.data_dir), Book(options.out)
    known = controls(options.config)
    usual = [name for name in known if name not in RARE]
    chosen = usual if options.controls is None else [name for name in options.controls.split(",") if name]
    for name in chosen:
        if name not in known:
            parser.error(f"{name!r}: expected one of {', '.join(known)}")
    for name in chosen:
        for variant in variants:
            run_control(book, bench, variant, name, seeds, options.steps)
    for method in wanted:
        for variant in variants:
            run_method(book, bench, variant, method, seeds, options.steps)
            for factor in factors:
                run_times(book, bench, variant, method, seeds, options.steps, factor)
    report.write(book.rows, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
