"""What logging costs a run: its steps per second with the log on, as a share of those with the log off.

    python -m benchmarks.logging_cost
    python -m benchmarks.logging_cost --log-every 20 --steps 2000 --turns 15 --json logging.json

Real runs of `experiments` on the digits, data on the device, one after the other in one process, with and without
logging in turn. The log is what every run writes: the metrics of the step, a look at the validation set (that costs
what it computes), a line on the disk. "Off" logs at the last step alone. Times are from the first step to the last,
without start-up and compilation; ratios are formed within a turn. Given are their median and its 95 % interval.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile
import time

from rich.table import Table

from benchmarks.shared.machine import describe_machine
from benchmarks.shared.paths import home_path
from benchmarks.shared.timing import interval_of_median, median_interval
from experiments import configs
from experiments.reporting import terminal
from experiments.training.single import train


def seconds_of(config: str, settings, method: str) -> float:
    """From the first step of a run to its last."""
    times = []
    with tempfile.TemporaryDirectory() as folder:
        train(
            config, settings, method, 0, pathlib.Path(folder) / "run", on_step=lambda _: times.append(time.monotonic())
        )
    return times[-1] - times[0]


def measure(method: str, steps: int, log_every: int, turns: int, say=lambda turn: None) -> dict:
    """Seconds with and without the log, a pair per turn, and the ratios."""
    base = dataclasses.replace(configs.get("digits_noise").Settings(), steps=steps, checkpoint_every=steps)
    settings = {"off": dataclasses.replace(base, log_every=steps), "on": dataclasses.replace(base, log_every=log_every)}
    seconds = {how: [] for how in settings}
    for turn in range(turns + 1):
        for how in sorted(settings, reverse=bool(turn % 2)):
            seconds[how].append(seconds_of("digits_noise", settings[how], method))
        say(turn)
    seconds = {how: times[1:] for how, times in seconds.items()}  # the first turn compiles
    ratios = [off / on for off, on in zip(seconds["off"], seconds["on"], strict=True)]
    return {"method": method, "steps": steps, "log_every": log_every, "seconds": seconds, "ratios": ratios}


def main(argv=None) -> int:
    """Runs the command line."""
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m benchmarks.logging_cost",
        description=first,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--methods", default="equal,jtds", metavar="A,B", help="methods, separated by commas")
    parser.add_argument("--steps", type=int, default=3000, metavar="N", help="inner updates of a run (3000)")
    parser.add_argument("--log-every", type=int, default=100, metavar="N", help="updates per line of the log (100)")
    parser.add_argument("--turns", type=int, default=9, metavar="N", help="pairs of runs per method (9)")
    parser.add_argument("--json", type=home_path, metavar="FILE", help="write what was measured here, too")
    options = parser.parse_args(argv)
    rows = []
    with terminal.progress() as follow:
        for method in options.methods.split(","):
            say = follow(method, options.turns)
            rows.append(measure(method, options.steps, options.log_every, options.turns, say))
    table = Table(title=f"digits_noise, a line every {options.log_every} updates", title_justify="left")
    for heading in ("method", "updates / s, log off", "log on", "on to off [95 %]"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        rates = [f"{row['steps'] / median_interval(row['seconds'][how])['median']:.0f}" for how in ("off", "on")]
        ratios = row["ratios"]
        low, high = interval_of_median(ratios) or (min(ratios), max(ratios))
        table.add_row(row["method"], *rates, f"{median_interval(ratios)['median']:.3f} [{low:.3f}, {high:.3f}]")
    terminal.show(table)
    if options.json:
        options.json.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
