"""Trains several methods over several seeds on one config and shows them side by side.

    python -m experiments.compare digits_noise --methods stl,equal,arml,jtds --seeds 0,1,2 --out out/digits

Runs that are finished are not repeated, so the same command with more methods or seeds adds to what is there, and after
an interruption it goes on. DIR/table.csv has a row per logged step, the plots and the table are made from the files.
"""

import argparse
import sys

from experiments import command_line, report, terminal
from experiments.trainer import check_settings, parse_method, train


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = command_line.parser("python -m experiments.compare", __doc__)
    found.add_argument(
        "--methods",
        required=True,
        metavar="A,B,C",
        help="names, separated by commas; NAME+dev trains on the dev examples, too",
    )
    found.add_argument("--seeds", default="0,1,2", metavar="0,1,2", help="seeds, separated by commas (0,1,2)")
    return found


def seeds_of(text: str) -> list[int]:
    """`[0, 1, 2]` from "0,1,2".

    Raises:
      ValueError: not whole numbers, none at all, or one twice.
    """
    try:
        seeds = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--seeds {text}: wanted whole numbers separated by commas, such as 0,1,2.") from None
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ValueError(f"--seeds {text}: wanted at least one seed, each once and none below 0, such as 0,1,2.")
    return seeds


def main(argv=None) -> int:
    """Runs the command line; bad input ends with one message on standard error and status 2."""
    arguments = parser().parse_args(argv)

    def work():
        settings = command_line.settings(arguments)
        check_settings(settings)
        names, seeds = [name for name in arguments.methods.split(",") if name], seeds_of(arguments.seeds)
        if not names or len(set(names)) != len(names):
            raise ValueError(f"--methods {arguments.methods}: wanted names separated by commas, each once.")
        for name in names:
            parse_method(name)
        with terminal.progress() as follow:
            runs = [(name, seed) for name in names for seed in seeds]
            overall = follow(f"{arguments.config}:", len(runs))
            for done, (name, seed) in enumerate(runs):
                directory = arguments.out / name / f"seed_{seed}"
                train(
                    arguments.config,
                    settings,
                    name,
                    seed,
                    directory,
                    data_dir=arguments.data_dir,
                    on_step=follow(f"{name}, seed {seed}", settings.steps),
                )
                overall(done + 1)
        report.write(arguments.out)

    return command_line.guarded(work)


if __name__ == "__main__":
    sys.exit(main())
