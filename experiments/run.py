"""Trains one method with one seed on one config. The same command, repeated, resumes where the last one stopped.

    python -m experiments.run digits_noise --method jtds --seed 0 --out out/jtds-0

Repeating the command after any interruption (Ctrl-C, a kill, a power cut) continues from the newest checkpoint and ends
with the same numbers, to the bit, as a run that nothing interrupted. A finished run shows its result again.

SIGTERM, as a cluster sends it, saves at the next step and ends with status 143; Ctrl-C ends with 130, bad input and a
full disk with 2. A damaged checkpoint is set aside, with a warning, and the one before it is used.

With +refit behind the method the command trains twice: the method first, in DIR/learning, and then from scratch, on
train and dev, with the weights that it has learned, held fixed.

With --dry-run the command compiles the step, prints what it will need of the device's memory, and stops.
"""

if __name__ == "__main__":  # first: the imports take seconds
    from experiments.runtime import interruption

    interruption.exit_on_interrupt()

import argparse

from auxjax import methods
from experiments import cli
from experiments.methods import labels
from experiments.reporting import terminal
from experiments.runtime import processes
from experiments.training.single import estimate, train


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = cli.parser("python -m experiments.run", __doc__)
    found.add_argument(
        "--method",
        required=True,
        metavar="M",
        help=f"one of {', '.join(methods.names())}, with options if expected, as equal:auxiliary_weight=0.3, and "
        f"suffixes: {labels.HELP}; stl{labels.WITH_DEV} is the fair single-task baseline",
    )
    found.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="seed of the split, the label noise, the params and all later draws (default 0)",
    )
    found.add_argument(
        "--dry-run",
        action="store_true",
        help="load the data, compile the step, print what it needs of the device's memory and stop; nothing is written",
    )
    return found


def main(argv=None) -> int:
    """Runs the command line; bad input ends with one message on standard error and status 2."""
    arguments = parser().parse_args(argv)

    def work():
        mesh = cli.mesh(arguments)
        settings = cli.settings(arguments)
        title = f"{arguments.config}: {arguments.method}, seed {arguments.seed}"
        if arguments.dry_run:
            run = (arguments.config, settings, arguments.method, arguments.seed)
            memory = estimate(*run, data_dir=arguments.data_dir, mesh=mesh)
            if processes.is_first():
                terminal.show_memory(title, memory)
            return
        with terminal.progress() as follow:
            updates = labels.updates_of(labels.parse(arguments.method), settings)
            on_step = follow(f"{arguments.method} seed {arguments.seed}", updates)
            result = train(
                arguments.config,
                settings,
                arguments.method,
                arguments.seed,
                arguments.out,
                data_dir=arguments.data_dir,
                mesh=mesh,
                on_step=on_step,
            )
        if processes.is_first():
            terminal.show_result(title, result, arguments.out)

    return cli.guarded(work)


if __name__ == "__main__":
    interruption.exit_process(main())
