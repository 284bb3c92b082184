"""Trains a method with all values of a number and all seeds as one program, and shows the metric against the number.

    python -m experiments.sweep digits_noise --method equal --over auxiliary_weight=0.1,0.3,1,3 --seeds 0,1 --out out/w
    python -m experiments.sweep digits_noise --method jtds --over outer_learning_rate=0.05,0.2,0.8 --out out/rate

A number is an option of the method or a setting of the config; several `--over` give a grid, none several seeds alone.
Every run is what `experiments.run` trains with that option and seed, up to rounding. The value is chosen on validation,
and its result on the test set is then told.

Compilation is paid once for all runs, and an accelerator trains many small models in the time of one; on a CPU a sweep
of convolutional networks is slower than the runs one by one, see docs/guide.md. The data of all runs lie on the device.

The same command resumes. A run whose loss stops being finite is reported at the end; the others continue.
"""

if __name__ == "__main__":  # first: the imports take seconds
    from experiments.runtime import interruption

    interruption.exit_on_interrupt()

import argparse

from auxjax import methods
from experiments import cli
from experiments.reporting import sweep_report, terminal
from experiments.training import grid
from experiments.training import sweep as sweep_training


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = cli.parser("python -m experiments.sweep", __doc__)
    found.add_argument(
        "--method",
        required=True,
        metavar="M",
        help=f"one of {', '.join(methods.names())}, with options that all runs share if expected",
    )
    found.add_argument(
        "--over",
        action="append",
        default=[],
        metavar="NAME=A,B,C",
        help="values of a number, an option of the method or a setting of the config; repeat it for a grid",
    )
    found.add_argument("--seeds", default="0,1,2", metavar="0,1,2", help="seeds, separated by commas (0,1,2)")
    return found


def main(argv=None) -> int:
    """Runs the command line; bad input ends with one message on standard error and status 2."""
    arguments = parser().parse_args(argv)

    def work():
        if arguments.distributed is not None:
            raise ValueError("--distributed: a sweep runs in one process. --devices N splits its runs over N devices.")
        mesh = cli.mesh(arguments)
        settings = cli.settings(arguments)
        sweep = grid.make(arguments.config, settings, arguments.method, arguments.over, cli.seeds_of(arguments.seeds))
        with terminal.progress() as follow:
            on_step = follow(f"{arguments.method}, {len(sweep.runs())} runs", settings.steps)
            options = {"data_dir": arguments.data_dir, "mesh": mesh, "on_step": on_step}
            found = sweep_training.train(sweep, arguments.out, **options)
        sweep_report.write(sweep, arguments.out)
        broken = [run for run in found["runs"] if run["result"] is None]
        if broken:
            which = (f"{grid.text_of(run['point'])}, seed {run['seed']}, at {run['broken_at']}" for run in broken)
            raise FloatingPointError(
                f"{len(broken)} of {len(found['runs'])} runs are no longer finite since step: {'; '.join(which)}."
            )

    return cli.guarded(work)


if __name__ == "__main__":
    interruption.exit_process(main())
