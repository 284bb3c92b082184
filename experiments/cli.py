"""What the commands of `experiments` share: their arguments, and how they end."""

import argparse
import dataclasses
import logging
import os
import pathlib
import sys
import textwrap

import jax

from auxjax import methods
from auxjax.training.parallel import data_mesh
from experiments import configs
from experiments.methods.labels import CROSS_FIT
from experiments.runtime import interruption, processes
from experiments.settings import check_seed


def parser(program: str, doc: str) -> argparse.ArgumentParser:
    """A parser with the arguments every training command has; the module's docstring and the configs are its help."""
    found = bare_parser(program, f"{doc}\n{choices_help()}")
    known = ", ".join(configs.names())
    found.add_argument(
        "config", metavar="CONFIG", help=f"one of {known} (see below), or a file of your own, path/to/my_setting.py"
    )
    found.add_argument("--out", required=True, metavar="DIR", type=path, help="folder of the results")
    found.add_argument(
        "--data-dir", metavar="D", type=home, help="where the data set lies, for configs that read one from disk"
    )
    found.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="inner updates, shortens (or lengthens) any run; rounded up to whole outer updates",
    )
    found.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="split every batch over N devices (default 1, and all there are with --distributed); a run may "
        "resume with another number of them",
    )
    found.add_argument(
        "--distributed",
        metavar="HOW",
        help="this is one of several processes that run the same command: auto (TPU slices, Slurm, Open MPI, "
        "Kubernetes) or HOST:PORT,COUNT,INDEX; --out must be a folder that all of them see",
    )
    found.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="assignments",
        help="change a setting of the config, e.g. --set noise=0.2; repeat it for more",
    )
    return found


def home(text: str) -> str:
    """A path with `~` as the home folder: the shell leaves it alone in `--out=~/x`."""
    return os.path.expanduser(text)


def path(text: str) -> pathlib.Path:
    """The same as a `Path`."""
    return pathlib.Path(home(text))


def bare_parser(program: str, doc: str) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring, first line first."""
    first, _, rest = doc.partition("\n\n")
    return argparse.ArgumentParser(
        program, description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def choices_help() -> str:
    """The methods and the configs, what each is about and the configs' settings, for `--help`."""
    parts = ["Methods:"]
    for name in methods.names():
        about = sys.modules[getattr(methods, name).__module__].__doc__.split("\n")[0]
        parts.append(f"  {name:<8} {about}")
    parts.append(f"  {CROSS_FIT} Task weights from short trainings on folds, and no model: take {CROSS_FIT}+refit.")
    parts.append("\nConfigs and their settings (change one with --set NAME=VALUE):")
    for name in configs.names():
        module = configs.get(name)
        settings = module.Settings()
        values = (
            f"{field.name}={configs.as_text(getattr(settings, field.name))}" for field in dataclasses.fields(settings)
        )
        title = module.__doc__.split("\n\n")[0].replace("\n", " ")
        parts.append(f"\n  {name}: {title}")
        parts += textwrap.wrap("  ".join(values), 108, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(parts)


def settings(arguments: argparse.Namespace):
    """The config's settings with the changes the command line asks for.

    Raises:
      ValueError: an unknown config or setting, or a value of another type.
    """
    found = configs.override(configs.get(arguments.config).Settings(), arguments.assignments)
    return found if arguments.steps is None else dataclasses.replace(found, steps=arguments.steps)


def seeds_of(text: str) -> list[int]:
    """`[0, 1, 2]` from "0,1,2".

    Raises:
      ValueError: not whole numbers, none at all, or one twice.
    """
    try:
        seeds = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--seeds {text}: expected whole numbers separated by commas, such as 0,1,2.") from None
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"--seeds {text}: expected at least one seed, each once, such as 0,1,2.")
    for seed in seeds:
        check_seed(seed)
    return seeds


def mesh(arguments: argparse.Namespace):
    """The device mesh the command line asks for, `None` for one device; joins the processes of the run first.

    Raises:
      ValueError: more devices than there are, fewer than all of them with several processes, or no such processes.
    """
    count = arguments.devices
    if count is not None and count < 1:
        raise ValueError(f"--devices {count}: expected a whole number of at least 1.")
    processes.start(arguments.distributed)
    alone = jax.process_count() == 1
    if (alone and count == 1) or (arguments.distributed is None and count is None):
        return None
    try:
        return data_mesh(count)
    except ValueError as error:
        raise ValueError(f"--devices {count}: {error}") from None


def guarded(work) -> int:
    """Runs `work()`. Bad input ends with one message and status 2, Ctrl-C with a hint and 130, SIGTERM with 143."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs the tracebacks of errors that it raises as well
    try:
        with interruption.handle_signals():
            work()
    except (ValueError, FloatingPointError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            if jax.process_count() == 1:
                raise
            # Not a traceback: another process is gone, and Python's clean-up would wait for it.
            print(f"error: another process of the run has probably failed ({str(error)[:200]})", file=sys.stderr)
            return 1
        print(f"error: out of memory; lower batch_size or outer_batch_size ({str(error)[:200]})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interruption.HINT, file=sys.stderr)
        return interruption.STOPPED
    except interruption.Preempted as stop:
        print(stop, file=sys.stderr)
        return interruption.PREEMPTED
    return 0
