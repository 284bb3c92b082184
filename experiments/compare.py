"""Trains several methods over several seeds on one config and shows them side by side.

    python -m experiments.compare digits_noise --methods stl,equal,arml,jtds --seeds 0,1,2 --out out/digits

Runs that are finished are not repeated, so the same command with more methods or seeds adds to what is there, and after
an interruption (Ctrl-C, a kill, or SIGTERM, which saves first) it resumes. A run whose loss stops being finite is left
unfinished and reported at the end; the others continue. DIR/table.csv has a row per logged step, the plots and the
table are made from the files.

A method may carry options, NAME:OPTION=VALUE, and several of them behind a +. A sweep over one weight for all auxiliary
tasks is  --methods equal:auxiliary_weight=0.1,equal:auxiliary_weight=0.3,equal:auxiliary_weight=3

NAME+refit trains from scratch, on train and dev, with the weights that NAME has learned, held fixed; NAME+keep with
those tasks and examples alone whose weights stand out. Both learn from the run of NAME, which is trained and shown
beside them. NAME+twice trains for twice the steps, which is what a refit costs. Suffixes come in one order, as in
NAME+dev+twice+refit.
"""

if __name__ == "__main__":  # first: the imports take seconds
    from experiments.runtime import interruption

    interruption.exit_on_interrupt()

import argparse
import pathlib

from experiments import cli, report
from experiments.methods import labels
from experiments.methods.labels import folder_of, parse, text_of
from experiments.reporting import terminal
from experiments.runtime import processes, records
from experiments.settings import check_settings
from experiments.training.single import check_method, describe, train


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = cli.parser("python -m experiments.compare", __doc__)
    found.add_argument(
        "--methods",
        required=True,
        metavar="A,B,C",
        help=f"names, separated by commas; NAME:OPTION=VALUE has options, and there are suffixes: {labels.HELP}",
    )
    found.add_argument("--seeds", default="0,1,2", metavar="0,1,2", help="seeds, separated by commas (0,1,2)")
    return found


def methods_of(text: str) -> list[str]:
    """`["stl", "jtds"]` from "stl,jtds": labels, see `methods.labels`.

    Raises:
      ValueError: an unknown method or option, none at all, or one twice.
    """
    names = [text_of(parse(part.strip())) for part in text.split(",") if part.strip()]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"--methods {text}: expected at least one name, each once, such as stl,equal,jtds.")
    return names


def learning_of(name: str) -> str | None:
    """The label of the run whose weights a refit takes, `None` for a method that learns its own."""
    found = labels.learning(parse(name))
    return None if found is None else text_of(found)


def with_learning(names: list[str]) -> list[str]:
    """The labels, each once, with the runs that refits learn from in front of them."""
    pairs = [(learning_of(name), name) for name in names]
    return list(dict.fromkeys(name for pair in pairs for name in pair if name is not None))


def check_folder(directory: pathlib.Path, config: str, settings, runs: list[tuple[str, int]]) -> None:
    """Looks at the folders of all runs before the first one starts, and at what else is there.

    Raises:
      ValueError: the folder is another comparison's, holds runs with other settings, or other files.
    """
    for name, seed in runs:
        records.find_run(run_folder(directory, name, seed), describe(config, settings, name, seed))
    there = sorted(directory.glob("*/seed_*/run.json")) if directory.is_dir() else []
    for path in there:
        wanted = describe(config, settings, "", 0)
        different = records.differences(records.read_json(path), wanted, ("config", "settings"))
        if different:
            raise ValueError(
                f"{directory} holds a comparison with other settings: {'; '.join(different)} ({path.parent}). "
                "Use another --out."
            )
    foreign = set() if there or not directory.exists() else {path.name for path in directory.iterdir()}
    foreign -= {folder_of(name) for name, _ in runs}
    if foreign:
        raise ValueError(f"{directory} holds other files, such as {min(foreign)}, and no runs. Use another --out.")


def run_folder(directory: pathlib.Path, method: str, seed: int) -> pathlib.Path:
    """The folder of one run of a comparison."""
    return directory / folder_of(method) / f"seed_{seed}"


def main(argv=None) -> int:
    """Runs the command line; bad input ends with one message on standard error and status 2."""
    arguments = parser().parse_args(argv)

    def work():
        mesh = cli.mesh(arguments)
        settings = cli.settings(arguments)
        check_settings(settings)
        names = with_learning(methods_of(arguments.methods))
        for name in names:
            check_method(arguments.config, settings, name)
        runs = [(name, seed) for name in names for seed in cli.seeds_of(arguments.seeds)]
        check_folder(arguments.out, arguments.config, settings, runs)
        broken = {}
        with terminal.progress() as follow:
            overall = follow(f"{arguments.config}:", len(runs))
            for done, (name, seed) in enumerate(runs):
                run = follow(f"{name}, seed {seed}", labels.updates_of(parse(name), settings))

                def on_step(step, done=done, run=run):
                    overall(done)
                    run(step)

                folder, learning = run_folder(arguments.out, name, seed), learning_of(name)
                try:
                    if (learning, seed) in broken:
                        raise FloatingPointError(f"not trained, because {learning} failed.")
                    options = {"data_dir": arguments.data_dir, "mesh": mesh, "on_step": on_step}
                    if learning is not None:
                        options["learning"] = run_folder(arguments.out, learning, seed)
                    train(arguments.config, settings, name, seed, folder, **options)
                except FloatingPointError as error:
                    broken[name, seed] = f"{name}, seed {seed}: {error}"
                overall(done + 1)
        if processes.is_first():
            report.write(arguments.out)
        if broken:
            raise FloatingPointError("\n  ".join([f"{len(broken)} of {len(runs)} runs failed.", *broken.values()]))

    return cli.guarded(work)


if __name__ == "__main__":
    interruption.exit_process(main())
