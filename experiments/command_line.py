"""What the commands of `experiments` share: their arguments, and how they end."""

import argparse
import dataclasses
import pathlib
import sys

from experiments import configs


def parser(program: str, doc: str) -> argparse.ArgumentParser:
    """A parser with the arguments every training command has; the module's docstring is its help."""
    first, _, rest = doc.partition("\n\n")
    found = argparse.ArgumentParser(
        program, description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("config", metavar="CONFIG", help=f"one of {', '.join(configs.names())}")
    found.add_argument("--out", required=True, metavar="DIR", type=pathlib.Path, help="folder of the results")
    found.add_argument("--data-dir", metavar="D", help="where the data set lies, for configs that read one from disk")
    found.add_argument("--steps", type=int, metavar="N", help="inner updates: shortens (or lengthens) any run")
    found.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="assignments",
        help="change a setting of the config, e.g. --set noise=0.2; repeat it for more",
    )
    return found


def settings(arguments: argparse.Namespace):
    """The config's settings with the changes the command line asks for.

    Raises:
      ValueError: an unknown config or setting, or a value of another type.
    """
    found = configs.override(configs.get(arguments.config).Settings(), arguments.assignments)
    return found if arguments.steps is None else dataclasses.replace(found, steps=arguments.steps)


def guarded(work) -> int:
    """Runs `work()`. Bad input ends with one message and status 2, Ctrl-C with a hint and status 130."""
    try:
        work()
    except (ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command goes on from the newest checkpoint.", file=sys.stderr)
        return 130
    return 0
