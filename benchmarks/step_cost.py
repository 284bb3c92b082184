"""What a step of a config costs with each method, as a ratio to the first: the column to put beside an accuracy.

    python -m benchmarks.step_cost cifar100 --methods stl,equal,maxl,rl_aux
    python -m benchmarks.step_cost cifar100 --set inner_steps=1 --methods stl,maxl --json c.json

The step is the config's own: its network, optimiser, batches, `inner_steps` inner updates and `outer_steps` outer ones,
on random images. All methods are compiled first and then take turns, in this order and backwards, so that whatever else
the machine does falls on all alike. Ratios are formed within a turn; given are their median and the 95 % interval of
the median that order statistics give, which needs 6 turns.
"""

import argparse
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from benchmarks.shared.command import measure_and_show
from benchmarks.shared.machine import describe_machine
from benchmarks.shared.paths import home_path
from benchmarks.shared.timing import median_interval
from experiments import configs
from experiments.data.pools import Column, PoolShape, Shapes
from experiments.methods import labels as method_labels
from experiments.reporting import terminal
from experiments.settings import check_settings
from experiments.training.single import compiled

SHAPES = {"cifar100": ((32, 32, 3), 20), "cifar10_rotation": ((32, 32, 3), 10), "cifar10n": ((32, 32, 3), 10)}


class Runner:
    """One method: its state, its compiled step, and the seconds of a step, per turn."""

    def __init__(self, config: str, settings, method: str, data, dev):
        shapes = _shapes(config, data)
        start = time.perf_counter()
        experiment, init, self._step, _ = compiled(config, settings, method, shapes)
        params, model_state = experiment.init_params(jax.random.key(0))
        self._state = init(jax.random.key(1), params, data, model_state)
        self._batches, self.seconds = (data, dev), []
        self.turn()
        self.compile_seconds = time.perf_counter() - start
        self.turn()  # the first calls after compilation are slower than the others
        self.seconds.clear()

    def turn(self) -> None:
        """One step, timed."""
        start = time.perf_counter()
        self._state, metrics = self._step(self._state, *self._batches)
        jax.block_until_ready((self._state.params, metrics))
        self.seconds.append(time.perf_counter() - start)

    def is_finite(self) -> bool:
        """Whether the params still are."""
        return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(self._state.params))


def _shapes(config: str, data) -> Shapes:
    """Those of the config's data, with as many training examples as there are here."""
    arrays = tuple((name, array.shape[1:], str(array.dtype)) for name, array in data.items())
    columns = {"image": Column("input", "real"), "label": Column("target", "class", size=SHAPES[config][1])}
    return Shapes((PoolShape("train", "train", len(data["label"]), arrays),), tuple(columns.items()), "label", ())


def random_data(config: str, count: int, seed: int) -> dict[str, jax.Array]:
    """Images, labels and sub-labels of the config's shapes."""
    (shape, classes), rng = SHAPES[config], np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (count, *shape)), jnp.uint8),
        "label": jnp.asarray(rng.integers(0, classes, count), jnp.int32),
        "sub_label": jnp.asarray(rng.integers(0, 5, count), jnp.int32),
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", choices=sorted(SHAPES), help="a config of experiments")
    parser.add_argument("--methods", required=True, metavar="M,M", help="labels; ratios are to the first")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the config")
    parser.add_argument("--turns", type=int, default=15, metavar="N", help="steps of each method (default 15)")
    parser.add_argument(
        "--json", type=home_path, metavar="FILE", help="also write all numbers and the hardware to this file"
    )
    options = parser.parse_args(arguments)
    if options.turns < 1:
        parser.error("--turns must be at least 1")
    return options


def measure(options: argparse.Namespace) -> dict:
    """Times all methods, in turns."""
    settings = configs.override(configs.get(options.config).Settings(), options.set)
    check_settings(settings)
    labels = [method_labels.text_of(method_labels.parse(text)) for text in options.methods.split(",")]
    data, dev = (random_data(options.config, 1000, seed) for seed in (0, 1))
    runners = {}
    with terminal.progress() as follow:
        on_step = follow(options.config, len(labels) + options.turns)
        for place, label in enumerate(labels):
            on_step(place)
            runners[label] = Runner(options.config, settings, label, data, dev)
        for turn in range(options.turns):
            on_step(len(labels) + turn)
            for label in labels[:: 1 if turn % 2 == 0 else -1]:
                runners[label].turn()
        on_step(len(labels) + options.turns)
    rows = []
    for label, runner in runners.items():
        if not runner.is_finite():
            raise SystemExit(f"The params of {label!r} are not finite; no times are reported.")
        seconds = np.array(runner.seconds)
        rows.append(
            {
                "method": label,
                "ms_per_inner_update": median_interval(1e3 * seconds / settings.inner_steps),
                f"to_{labels[0]}": median_interval(seconds / np.array(runners[labels[0]].seconds)),
                "compile_s": runner.compile_seconds,
            }
        )
    about = {"config": options.config, "set": options.set, "turns": options.turns}
    return {**about, "machine": describe_machine(), "rows": rows}


def show(result: dict) -> None:
    """The table, in the terminal."""
    reference = result["rows"][0]["method"]
    table = Table(title=f"{result['config']}: time per inner update, outer updates included")
    for name in ("method", "ms", f"to {reference}", "compile s"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in result["rows"]:
        ratio = row[f"to_{reference}"]
        interval = "" if ratio["low"] is None else f" [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        milliseconds = f"{row['ms_per_inner_update']['median']:.1f}"
        table.add_row(row["method"], milliseconds, f"{ratio['median']:.2f}{interval}", f"{row['compile_s']:.0f}")
    terminal.show(table)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; bad input ends with one message on standard error and status 2."""
    return measure_and_show(parse(arguments), measure, show)


if __name__ == "__main__":
    sys.exit(main())
