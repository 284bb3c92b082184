"""A sweep as one program against its runs one after the other: compilation, time per update, time in all.

    python -m benchmarks.sweep_speed digits_noise --method equal --over auxiliary_weight=0.1,0.3,1,3 --seeds 0,1,2
    python -m benchmarks.sweep_speed digits_noise --method jtds --over outer_learning_rate=0.05,0.1,0.2 --seeds 0,1,2,3

The runs one by one are those of `experiments.compare`: seeds of one value share what was compiled. Both sides have the
same data and begin from the same states. Compilation is the first step of each program, with the cache on disk off;
after it the sweep and the loop take turns in one process, a step of all runs each, and ratios are formed within a turn.
Loading, initial states and evaluation are in neither.
"""

import argparse
import sys
import time

import jax
import numpy as np
from rich.table import Table

from benchmarks.shared.command import measure_and_show
from benchmarks.shared.machine import describe_machine
from benchmarks.shared.paths import home_path
from benchmarks.shared.timing import median_interval
from experiments import cli, configs
from experiments.reporting import terminal
from experiments.training import grid, sources
from experiments.training import sweep as sweep_training
from experiments.training.single import compiled, on_device


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = cli.bare_parser("python -m benchmarks.sweep_speed", __doc__)
    parser.add_argument("config", choices=configs.names(), help="a config of experiments")
    parser.add_argument("--method", required=True, metavar="M", help="label of a method")
    parser.add_argument("--over", action="append", default=[], metavar="NAME=A,B", help="as for experiments.sweep")
    parser.add_argument("--seeds", default="0,1,2", metavar="0,1,2", help="seeds, separated by commas (0,1,2)")
    parser.add_argument(
        "--data-dir", type=cli.home, metavar="D", help="where the data set lies, for configs that read one from disk"
    )
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the config")
    parser.add_argument("--turns", type=int, default=15, metavar="N", help="steps of each side (default 15)")
    parser.add_argument(
        "--json", type=home_path, metavar="FILE", help="also write all numbers and the hardware to this file"
    )
    options = parser.parse_args(arguments)
    if options.turns < 1:
        parser.error("--turns must be at least 1")
    return options


def _timed(step) -> float:
    start = time.perf_counter()
    jax.block_until_ready(step())
    return time.perf_counter() - start


def measure(options: argparse.Namespace) -> dict:
    """Times both sides.

    Raises:
      ValueError: an impossible sweep, see `experiments.sweep`.
    """
    settings = configs.override(configs.get(options.config).Settings(), options.set)
    sweep = grid.make(options.config, settings, options.method, options.over, cli.seeds_of(options.seeds))
    grid.check(sweep)
    jax.config.update("jax_enable_compilation_cache", False)
    loaded = sweep_training.load(sweep, options.data_dir)
    prepared = sweep_training.prepare(sweep, loaded, None)
    swept = {"state": prepared.init()}

    def step_together():
        swept["state"], metrics = prepared.step(swept["state"], prepared.inner_data, prepared.outer_data)
        return swept["state"].params, metrics

    singles = []
    for (point, seed), one in zip(sweep.runs(), loaded.trained_on, strict=True):
        label = (options.config, sweep.settings_of(point), sweep.label_of(point).removesuffix("+dev"), loaded.shapes)
        experiment, init, step, _ = compiled(*label)
        data = on_device(sources.inner_arrays(experiment, one))
        dev = on_device(sources.outer_arrays(experiment, one, dev=settings.dev))
        key_params, key_run = jax.random.split(jax.random.key(seed))
        params, model_state = experiment.init_params(key_params)
        state = init(key_run, params, data, model_state)
        singles.append({"state": state, "step": step, "data": (data, dev)})

    def step_alone():
        found = []
        for single in singles:
            single["state"], metrics = single["step"](single["state"], *single["data"])
            found.append(jax.block_until_ready((single["state"].params, metrics)))
        return found

    sides = {"one program": step_together, "one by one": step_alone}
    first = {name: _timed(step) for name, step in sides.items()}
    seconds = {name: [] for name in sides}
    for step in sides.values():
        _timed(step)  # the first calls after compilation are slower than the others
    for turn in range(options.turns):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            seconds[name].append(_timed(sides[name]))
    together, alone = (np.array(seconds[name]) for name in sides)
    calls = -(-settings.steps // settings.inner_steps)
    rows = []
    for name, values in seconds.items():
        once = float(np.median(values))
        rows.append(
            {
                "side": name,
                "first_call_s": first[name],
                "updates_per_second": settings.inner_steps * len(singles) / once,
                "ms_per_update": median_interval(1e3 * np.array(values) / settings.inner_steps),
                "total_s": first[name] + (calls - 1) * once,
            }
        )
    about = {"config": options.config, "method": sweep.method, "over": options.over, "set": options.set}
    about |= {"runs": len(singles), "steps": settings.steps, "turns": options.turns}
    ratios = {"speed": median_interval(alone / together), "total": rows[1]["total_s"] / rows[0]["total_s"]}
    return {**about, "machine": describe_machine(), "rows": rows, "ratios": ratios}


def show(result: dict) -> None:
    """The table, in the terminal."""
    table = Table(title=f"{result['config']}, {result['method']}: {result['runs']} runs of {result['steps']} updates")
    for name in ("", "first step s", "ms per update of all runs", "updates per s", "in all s"):
        table.add_column(name, justify="right" if name else "left")
    for row in result["rows"]:
        numbers = (row["first_call_s"], row["ms_per_update"]["median"], row["updates_per_second"], row["total_s"])
        table.add_row(row["side"], *(f"{number:.1f}" for number in numbers))
    terminal.show(table)
    speed = result["ratios"]["speed"]
    interval = "" if speed["low"] is None else f" [{speed['low']:.2f}, {speed['high']:.2f}]"
    terminal.line(f"One program is {speed['median']:.2f}{interval} times as fast per update and takes")
    terminal.line(f"{1 / result['ratios']['total']:.2f} times the time in all, compilation included.")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; bad input ends with one message on standard error and status 2."""
    return measure_and_show(parse(arguments), measure, show)


if __name__ == "__main__":
    sys.exit(main())
