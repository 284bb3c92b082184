"""Does a method's default outer optimiser do as well as the best rate of a grid?

    python -m benchmarks.outer_rates --out out/outer-rates
    python -m benchmarks.outer_rates --methods jtds,maoal --configs known_worth --seeds 3 --out out/outer-rates

On `digits_noise` (40 % wrong labels) and `known_worth` (helpful, unrelated and random tasks at 5 labels per class), for
every method with outer variables: its default optimiser, and Adam at six rates from 1e-3 to 3, one program for all
rates and seeds. An outer update follows every five inner ones; test accuracy is taken at several moments of one run,
which a constant rate does not tell from runs of these lengths.

The table names, for each, the rate whose mean accuracy is highest, with its 95 % interval over the seeds, and whether
the default's mean lies inside it or above. Rows that are in DIR/rows.jsonl are not repeated.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from auxjax.training.sweep import make_sweep, run_of
from benchmarks.known_worth.training import keys_and_params, stacked
from benchmarks.shared.options import known_names
from benchmarks.shared.paths import home_path
from experiments import cli, configs
from experiments.data import pools
from experiments.evaluation.statistics import auroc, mean_and_interval
from experiments.methods import defaults, labels
from experiments.training import judging, sources

CONFIGS = ("digits_noise", "known_worth")
METHODS = ("jtds", "n_jtds", "maoal", "auxilearn", "auto_lambda", "auxinash", "ol_aux", "gradnorm", "arml")
RATES = (1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0)
MOMENTS = (50, 200, 1000)  # outer updates, by default
INNER_STEPS = 5
OPTIMIZERS = {
    "default": lambda rate: None,
    "adam": optax.adam,
}
WITHOUT = {("known_worth", "n_jtds")}  # its batches have two pools, a table has one


def train(config_name: str, method_name: str, optimizer: str, rates, seeds, moments) -> list[dict]:
    """A row per rate: `accuracy`, seeds by moments, and the mean weights of the tasks there."""
    config = configs.get(config_name)
    settings = config.Settings()
    data = [config.load(settings, seed, None) for seed in seeds]
    shapes = pools.shapes(data[0])
    experiment = config.build(settings, shapes)
    inner = stacked([sources.inner_arrays(experiment, one) for one in data] * len(rates))
    outer = stacked([sources.outer_arrays(experiment, one, dev="held_out") for one in data] * len(rates))

    def make(rate):
        options = defaults.options_of(config, settings, shapes)
        own = {name: value for name, value in options.get(method_name, {}).items() if name != "outer_optimizer"}
        made = OPTIMIZERS[optimizer](rate)
        options[method_name] = own if made is None else {**own, "outer_optimizer": made}
        return experiment.model, labels.make(method_name, options), experiment.optimizer

    init, step = make_sweep(
        make,
        jnp.repeat(jnp.array(rates, jnp.float32), len(seeds)),
        inner_steps=INNER_STEPS,
        draw_inner=experiment.draw_inner,
        draw_outer=experiment.draw_outer,
        batches="stacked",
    )
    keys, params = keys_and_params(experiment, list(seeds) * len(rates))
    state = init(keys, params, inner)
    accuracy, weights = [], []
    for count in range(1, moments[-1] + 1):
        state, metrics = step(state, inner, outer)
        if count in moments:
            host, found = jax.device_get((judging.trained_of(state), metrics))
            runs = [run_of(host, place) for place in range(len(rates) * len(seeds))]
            accuracy.append(
                [
                    judging.judge(experiment, run, data[place % len(seeds)], "test")["accuracy"]
                    for place, run in enumerate(runs)
                ]
            )
            weights.append({task: found[f"weight/{task}"] for task in shapes.tasks if f"weight/{task}" in found})
    by_rate = np.array(accuracy).reshape(len(moments), len(rates), len(seeds))
    rows = []
    for place, rate in enumerate(rates):
        of_rate = slice(place * len(seeds), (place + 1) * len(seeds))
        learned = {
            task: np.round([line[task][of_rate] for line in weights], 4).T.tolist() for task in (weights[0] or {})
        }
        rows.append({"rate": rate, "accuracy": by_rate[:, place].T.tolist(), "weights": learned})
    return rows


def run(path: pathlib.Path, config: str, method: str, optimizer: str, rates, seeds, moments) -> list[dict]:
    """The rows of an optimiser; those of the file, or new ones, which are added to it."""
    about = {"config": config, "method": method, "optimizer": optimizer, "seeds": list(seeds)}
    about["moments"] = list(moments)
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found = [row for row in known if about.items() <= row.items() and row["rate"] in rates]
    left = [rate for rate in rates if rate not in [row["rate"] for row in found]]
    if left:
        new = [about | row for row in train(config, method, optimizer, left, seeds, moments)]
        with path.open("a") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in new)
        found += new
    return found


def helpful_auroc(row: dict, place: int) -> str:
    """How well the weights tell the helpful tasks, mean over the seeds; nothing where it is not known which help."""
    weights = {task: np.array(values)[:, place] for task, values in row.get("weights", {}).items() if task != "class"}
    helpful = np.array([task.startswith("helpful") for task in weights])
    if not helpful.any():
        return ""
    by_seed = np.stack(list(weights.values()), axis=1)
    return f"{np.mean([auroc(one, helpful) for one in by_seed]):.2f}"


def table(rows: list[dict]) -> str:
    """The default beside the best rate, per config, method and moment."""
    lines = [
        "| config | method | outer updates | default, % | best rate of the grid | its accuracy, % | inside or above "
        "| AUROC of the weights, default | of the best rate |",
        "|---|---|---:|---:|---:|---:|---|---:|---:|",
    ]
    pairs = dict.fromkeys((row["config"], row["method"]) for row in rows)
    for config, method in pairs:
        own = [row for row in rows if (row["config"], row["method"]) == (config, method)]
        for place, moment in enumerate(own[0]["moments"]):
            at_moment = [[one[place] for one in row["accuracy"]] for row in own]
            found = {
                (row["optimizer"], row["rate"]): mean_and_interval(values)
                for row, values in zip(own, at_moment, strict=True)
            }
            grid = {key: value for key, value in found.items() if key[0] != "default" and np.isfinite(value[0])}
            (_, rate), (best, half) = max(grid.items(), key=lambda item: item[1][0])
            mean, own_half = found["default", 0.0]
            told_apart = {(row["optimizer"], row["rate"]): helpful_auroc(row, place) for row in own}
            inside = "yes" if mean >= best - half else f"no, {100 * (mean - best):+.1f}"
            lines.append(
                f"| {config} | {method} | {moment} | {100 * mean:.1f} ± {100 * own_half:.1f} | {rate:g} "
                f"| {100 * best:.1f} ± {100 * half:.1f} | {inside} "
                f"| {told_apart['default', 0.0]} | {told_apart['adam', rate]} |"
            )
    return "\n".join(lines) + "\n"


def main(argv=None) -> int:
    """Runs the command line."""
    parser = cli.bare_parser("python -m benchmarks.outer_rates", __doc__)
    parser.add_argument("--configs", default=",".join(CONFIGS), metavar="C,C", help="default: both")
    parser.add_argument("--methods", default=",".join(METHODS), metavar="M,M,...", help="default: all")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="how many seeds (default 5)")
    parser.add_argument("--first-seed", type=int, default=0, metavar="S", help="the first of them (default 0)")
    parser.add_argument("--updates", default="50,200,1000", metavar="N,N", help="outer updates of the moments")
    parser.add_argument("--out", required=True, type=home_path, metavar="DIR", help="rows and table")
    options = parser.parse_args(argv)
    chosen = known_names(parser, "--configs", options.configs, CONFIGS)
    methods = known_names(parser, "--methods", options.methods, METHODS)
    try:
        moments = [int(number) for number in options.updates.split(",")]
        if moments != sorted(set(moments)) or moments[0] < 1:
            raise ValueError
    except ValueError:
        parser.error(f"--updates {options.updates}: expected whole numbers, ascending, such as 50,200,1000")
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for config in chosen:
        for method in methods:
            if (config, method) not in WITHOUT:
                rows += run(options.out / "rows.jsonl", config, method, "default", (0.0,), seeds, moments)
                rows += run(options.out / "rows.jsonl", config, method, "adam", RATES, seeds, moments)
                (options.out / "table.md").write_text(table(rows))
                print(f"{config}, {method}: done", flush=True)
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
