"""When held-out labels tell what a task is worth: signals of one round with equal weights, at several moments of it.

    python -m benchmarks.known_worth.signals --out out/signals.md
    python -m benchmarks.known_worth.signals --config known_worth_cifar10 --data-dir DIR --updates 400 --out out/s.md

For every seed the folds' networks are trained once per line of the table, from the same params on the same batches. The
signal of a task is -d L_held_out / d w, the mean over folds. Given is how well it tells the helpful tasks from all
others (area under the curve, 0.5 is chance), the mean over seeds with its 95 % interval, and the held-out loss.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from benchmarks.known_worth import cross_fit
from benchmarks.known_worth.training import Bench
from benchmarks.shared.paths import home_path
from experiments import cli
from experiments.data.known_worth import VARIANTS
from experiments.evaluation.statistics import auroc, mean_and_interval
from experiments.tasks.known_worth import OUTER_LOSSES
from experiments.training import cross_fit as rounds
from experiments.training.single import on_device

ESTIMATORS = ("exact", "one_step")
MOMENTS = (0.125, 0.25, 0.5, 0.75, 1.0)


class Line(NamedTuple):
    """What one outer loss and estimator gave.

    Attributes:
      aurocs: `[S, M]`, of the signals' means over folds, by seed and moment.
      held_out: `[M]`, the held-out loss.
    """

    aurocs: np.ndarray
    held_out: np.ndarray


def measure(bench: Bench, variant: str, seeds, *, outer_loss: str, estimator: str, updates: int, moments) -> Line:
    """One round with equal weights for every seed."""
    settings = dataclasses.replace(bench.settings(variant), outer_loss=outer_loss)
    options = {"folds": 4, "updates": updates, "measure_at": tuple(moments)}
    options["hypergradient"] = cross_fit.ESTIMATORS[estimator]
    found, losses = [], []
    for seed in seeds:
        task = rounds.prepare(bench.config, settings, options, seed, bench.data_dir, on_device)
        _, info = task.rounds.round(rounds.begin(task, seed), task.data)
        helpful = np.array([name.startswith("helpful") for name in task.rounds.tasks(task.data)])
        found.append([auroc(-signal, helpful) for signal in np.asarray(info.signal).mean(axis=1)])
        losses.append(np.asarray(info.held_out).mean(axis=1))
    return Line(np.array(found), np.mean(losses, axis=0))


def lines_of(found: dict[tuple[str, str], Line], times) -> list[str]:
    """The table, in Markdown."""
    rows = [f"| outer loss, hypergradient | {' | '.join(f'update {time}' for time in times)} |"]
    rows.append(f"|---|{'---:|' * len(times)}")
    for (outer_loss, estimator), line in found.items():
        cells = ["{:.2f} ± {:.2f}".format(*mean_and_interval(column)) for column in line.aurocs.T]
        rows.append(f"| {outer_loss}, {estimator} | {' | '.join(cells)} |")
    for outer_loss in dict.fromkeys(loss for loss, _ in found):
        line = found[outer_loss, ESTIMATORS[0]]  # the one-step gradient looks at the loss a step ahead
        rows.append(f"| held out: {outer_loss} | {' | '.join(f'{value:.2f}' for value in line.held_out)} |")
    return rows


def main(argv=None) -> int:
    """Runs the command line."""
    parser = cli.bare_parser("python -m benchmarks.known_worth.signals", __doc__)
    parser.add_argument("--config", default="known_worth", choices=("known_worth", "known_worth_cifar10"))
    parser.add_argument("--data-dir", type=home_path, metavar="DIR", help="where the images lie, see docs/data.md")
    parser.add_argument("--variant", default="plain", choices=tuple(VARIANTS))
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N - 1 (default 5)")
    parser.add_argument("--updates", type=int, default=200, metavar="N", help="of the round (default 200)")
    parser.add_argument("--out", required=True, type=home_path, metavar="FILE", help="the table, in Markdown")
    options = parser.parse_args(argv)
    bench, found = Bench(options.config, options.data_dir), {}
    times = [round(share * options.updates) for share in MOMENTS]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for outer_loss in OUTER_LOSSES:
        for estimator in ESTIMATORS:
            how = {"outer_loss": outer_loss, "estimator": estimator, "updates": options.updates, "moments": MOMENTS}
            found[outer_loss, estimator] = measure(bench, options.variant, range(options.seeds), **how)
            options.out.write_text("\n".join(lines_of(found, times)) + "\n")
            print(lines_of(found, times)[1 + len(found)], flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
