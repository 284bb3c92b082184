"""What a run makes of its hypergradient: accuracy and weights, update by update, under several of them.

    python -m benchmarks.along_runs.paths --configs known_worth --methods jtds,auxilearn --out out/along-runs

Ten seeds as one program per method and hypergradient, the outer optimiser by default, one outer update after every five
inner ones. The table has test accuracy at several moments and its difference to three Neumann terms, seed by seed, with
95 % intervals; where it is known which tasks help, how well the weights tell them. A plot shows the mean weights of the
groups of tasks. Rows that are in DIR/paths.jsonl are not repeated.
"""

import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from auxjax.training.sweep import make_sweep, run_of
from benchmarks.along_runs import report
from benchmarks.along_runs.estimators import estimators, of_losses_too
from benchmarks.along_runs.measuring import INNER_STEPS
from benchmarks.known_worth.training import keys_and_params, stacked
from benchmarks.shared.options import known_names, moments_up_to
from benchmarks.shared.paths import home_path
from experiments import cli, configs
from experiments.data import pools
from experiments.evaluation.statistics import auroc, mean_and_interval
from experiments.methods import defaults, labels
from experiments.training import judging, sources

ESTIMATORS = (
    report.SERIES,
    "one step",
    "cg(3), Fisher",
    "cg(10), Fisher",
    "cg(3), Gauss-Newton",
    "cg(10), Gauss-Newton",
)
SHOWN = (report.SERIES, "cg(10), Fisher", "cg(10), Gauss-Newton", "exact, Gauss-Newton")  # in the plot
POSSIBLE = (
    *ESTIMATORS,
    "exact, Gauss-Newton",
    "exact, Hessian",
    "neumann(3), warm start",
    "neumann(20)",
    "cg(10)",
    "minres(10)",
    "neumann(3), Gauss-Newton",
)
CONFIGS = ("known_worth", "digits_noise")
METHODS = ("jtds", "auxilearn", "n_jtds")
EVERY = 5  # outer updates between two points of the plot
MOMENTS = (50, 100, 200, 500)


class Path(NamedTuple):
    """What the runs of all seeds gave.

    Attributes:
      weights: `{task: [U, S]}`, the mean weight in the batch after every outer update.
      accuracy: `[U', S]`, on the test examples at the moments asked for.
    """

    weights: dict[str, np.ndarray]
    accuracy: np.ndarray


def train(config_name: str, method_name: str, estimator: str, seeds, moments) -> Path:
    """Trains a method with one of the estimators, its outer optimiser by default, all seeds as one program."""
    config = configs.get(config_name)
    settings = config.Settings()
    data = [config.load(settings, seed, None) for seed in seeds]
    shapes = pools.shapes(data[0])
    experiment = config.build(settings, shapes)
    inner = stacked([sources.inner_arrays(experiment, one) for one in data])
    outer = stacked([sources.outer_arrays(experiment, one, dev="held_out") for one in data])
    model = of_losses_too(experiment.model)
    options = defaults.options_of(config, settings, shapes)
    own = {name: value for name, value in options.get(method_name, {}).items() if name != "outer_optimizer"}
    own["hypergradient"] = estimators(model, method_name)[estimator]
    method = labels.make(method_name, {**options, method_name: own})
    init, step = make_sweep(
        lambda point: (model, method, experiment.optimizer),
        (),
        inner_steps=INNER_STEPS,
        draw_inner=experiment.draw_inner,
        draw_outer=experiment.draw_outer,
        batches="stacked",
    )
    keys, params = keys_and_params(experiment, list(seeds))
    state = init(keys, params, inner)
    weights, accuracy = [], []
    for count in range(1, moments[-1] + 1):
        state, metrics = step(state, inner, outer)
        weights.append({task: metrics[f"weight/{task}"] for task in shapes.tasks})
        if count in moments:
            host = jax.device_get(judging.trained_of(state))
            runs = [run_of(host, place) for place in range(len(data))]
            found = [judging.judge(experiment, *pair, "test")["accuracy"] for pair in zip(runs, data, strict=True)]
            accuracy.append(found)
    logged = {task: np.asarray(jnp.stack([line[task] for line in weights])) for task in shapes.tasks}
    return Path(logged, np.array(accuracy))


def aurocs(weights: dict[str, np.ndarray], moments) -> list[list[float]]:
    """How well the weights tell the helpful tasks, by moment and seed; empty where it is not known which help."""
    names = [task for task in weights if task != "class"]
    helpful = np.array([name.startswith("helpful") for name in names])
    if not helpful.any():
        return []
    at = [np.stack([weights[name][moment - 1] for name in names]) for moment in moments]
    return [[round(auroc(column, helpful), 4) for column in table.T] for table in at]


def row_of(path: Path, moments) -> dict:
    """What is kept of a path: accuracies and areas, and the groups' mean weights after every few updates."""
    groups = {task.rsplit("_", 1)[0] for task in path.weights if task != "class"}
    means = {
        group: np.mean([path.weights[task] for task in path.weights if task.startswith(group)], axis=(0, 2))[::EVERY]
        for group in sorted(groups)
    }
    return {
        "accuracy": np.round(path.accuracy, 5).tolist(),
        "auroc": aurocs(path.weights, moments),
        "weights": {group: np.round(values, 4).tolist() for group, values in means.items()},
    }


def table(rows: list[dict]) -> str:
    """Accuracies, differences to the default, and areas, in Markdown."""
    moments = rows[0]["moments"]
    lines = [
        f"| config | method | hypergradient | {' | '.join(f'{m}, % | less Neumann | AUROC' for m in moments)} |",
        f"|---|---|---|{'---:|---:|---:|' * len(moments)}",
    ]
    for row in rows:
        same = [other for other in rows if (other["config"], other["method"]) == (row["config"], row["method"])]
        series = next((other for other in same if other["estimator"] == report.SERIES), None)
        cells = [row["config"], row["method"], row["estimator"]]
        for place in range(len(moments)):
            mine = 100 * np.array(row["accuracy"][place])
            cells.append("{:.1f} ± {:.1f}".format(*mean_and_interval(mine)))
            if series in (None, row):
                cells.append("")
            else:
                less = mine - 100 * np.array(series["accuracy"][place])
                cells.append("{:+.1f} ± {:.1f}".format(*mean_and_interval(less)))
            cells.append(f"{np.mean(row['auroc'][place]):.2f}" if row["auroc"] else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv=None) -> int:
    """Runs the command line."""
    parser = cli.bare_parser("python -m benchmarks.along_runs.paths", __doc__)
    parser.add_argument("--configs", default="known_worth,digits_noise", metavar="C,C", help="default: both")
    parser.add_argument("--methods", default="jtds,auxilearn", metavar="M,M", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--estimators", default=";".join(ESTIMATORS), metavar="E;E", help="names with ; between them")
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="how many seeds (default 10)")
    parser.add_argument("--updates", type=int, default=MOMENTS[-1], metavar="N", help="outer updates (default 500)")
    parser.add_argument("--out", required=True, type=home_path, metavar="DIR", help="rows, table and plots")
    options = parser.parse_args(argv)
    chosen = known_names(parser, "--configs", options.configs, CONFIGS)
    methods = known_names(parser, "--methods", options.methods, METHODS)
    wanted = known_names(parser, "--estimators", options.estimators, POSSIBLE, separator=";")
    moments = moments_up_to(parser, options.updates, MOMENTS)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "paths.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for config in chosen:
        for method in methods:
            for estimator in wanted:
                about = {"config": config, "method": method, "estimator": estimator}
                about |= {"seeds": list(range(options.seeds)), "moments": moments}
                if any(about.items() <= row.items() for row in rows):
                    continue
                path = train(config, method, estimator, about["seeds"], moments)
                rows.append(about | row_of(path, moments))
                with file.open("a") as stream:
                    stream.write(json.dumps(rows[-1]) + "\n")
                (options.out / "paths.md").write_text(table(rows))
                print(f"{config}, {method}, {estimator}: {100 * path.accuracy[-1].mean():.1f} %", flush=True)
    draw(rows, options.out)
    print(table(rows))
    return 0


def draw(rows: list[dict], directory: pathlib.Path) -> None:
    """A plot per method of the config whose groups of tasks are known."""
    for method in dict.fromkeys(row["method"] for row in rows if row["auroc"]):
        shown = {
            row["estimator"]: row["weights"] for row in rows if row["method"] == method and row["estimator"] in SHOWN
        }
        if shown:
            report.plot_paths(shown, EVERY, directory / f"{method}.png")


if __name__ == "__main__":
    raise SystemExit(main())
