"""How a benchmark's command ends: measured, shown in the terminal, and written to `--json FILE` if expected."""

import json

from experiments import cli


def measure_and_show(options, measure, show) -> int:
    """Runs `show(measure(options))`; bad input ends with one message on standard error and status 2.

    Args:
      options: parsed arguments, with `json`, a path or `None`.
      measure: `options -> result`, plain values.
      show: prints a result.
    """

    def work() -> None:
        result = measure(options)
        show(result)
        if options.json:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump(result, file, indent=2)
                file.write("\n")

    return cli.guarded(work)
